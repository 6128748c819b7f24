"""Rebuild the tables of results in the pages from the rows that runs left.

    python recipes/maintenance/results.py
    python recipes/maintenance/results.py runs/probe/results.jsonl

The second adds rows first: your own, or those that somebody sent. Rows of comparisons
(results.jsonl) are kept in recipes/results/, a file for each protocol, one row for each run; of
several rows of one run the last one counts. Those of the papers' experiments (measurements.jsonl)
are kept in recipes/results/papers/, a file for each table. benchmarks/ has what the scripts of
recipes/benchmarks left (OUTPUT/*.json), copied there under the name of the table. A page has a
table between two lines, and what is between them is replaced:

    <!-- results: probe -->
    <!-- end of results -->

Plots of comparisons, named after the protocol, go to .github/pictures/ if a page shows them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from timm_fisher.files import write
from timm_fisher.training.benchmark import benchmark_tables
from timm_fisher.training.command_line import run
from timm_fisher.training.measurements import (
    Measurement,
    merge_measurements,
    table_of,
)
from timm_fisher.training.results import (
    Result,
    describe,
    merge,
    note,
    plot,
    plot_costs,
)
from timm_fisher.training.rows import Row, read_rows, write_rows

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r'(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)', re.DOTALL)


@dataclass
class Settings:
    """Rebuild the tables of results in the pages.

    Args:
        add: files of rows to add first.
        results: folder of the rows.
        pages: folders of the pages, those in their subfolders included.
        pictures: folder of the plots.
    """

    add: list[Path] = field(default_factory=list)
    results: Path = ROOT / 'recipes/results'
    pages: list[Path] = field(default_factory=lambda: [ROOT / 'recipes', ROOT / 'hub_cards'])
    pictures: Path = ROOT / '.github/pictures'


def main(settings: Settings) -> None:
    of_papers = {path for path in settings.add if path.name == 'measurements.jsonl'}
    lines = [
        line for path in settings.add if path in of_papers for line in read_rows(path, Measurement)
    ]
    rows = [
        row for path in settings.add if path not in of_papers for row in read_rows(path, Result)
    ]
    add(lines, 'table', settings.results / 'papers', merge_measurements)
    add(rows, 'protocol', settings.results, merge)
    pages = [page for folder in settings.pages for page in sorted(folder.glob('**/*.md'))]
    texts = {page: page.read_text() for page in pages}
    for path in sorted(settings.results.glob('*.jsonl')):
        rows = read_rows(path, Result)
        for name, draw in ((f'{path.stem}.png', plot), (f'{path.stem}_costs.png', plot_costs)):
            if any(f'/{name})' in text for text in texts.values()):
                draw(rows, settings.pictures / name)
    for page, text in texts.items():
        rebuilt = rebuild(text, settings.results)
        if rebuilt != text:
            write(page, rebuilt)
            print(f'{page.name} rebuilt')


def add(
    rows: Sequence[Row], field: str, folder: Path, merged: Callable[[Sequence[Row]], list[Row]]
) -> None:
    """Merge rows into the files of a folder, named after a field of theirs."""
    folder.mkdir(exist_ok=True)
    for name in dict.fromkeys(getattr(row, field) for row in rows):
        path = folder / f'{name}.jsonl'
        kept = read_rows(path, type(rows[0])) if path.exists() else []
        kept_and_new = merged([*kept, *(row for row in rows if getattr(row, field) == name)])
        write_rows(kept_and_new, path)
        new = len(kept_and_new) - len(kept)
        print(f'{path.name}: {len(kept_and_new)} rows, {new} of them new')


def rebuild(text: str, results: Path) -> str:
    """A page with its tables made anew."""

    def table(match: re.Match[str]) -> str:
        before, name, after = match.groups()
        benchmark = results / 'benchmarks' / f'{name}.json'
        experiment = results / 'papers' / f'{name}.jsonl'
        if benchmark.exists():
            return f'{before}{benchmark_tables(json.loads(benchmark.read_text()))}{after}'
        if experiment.exists():
            return f'{before}{table_of(read_rows(experiment, Measurement))}\n{after}'
        rows = read_rows(results / f'{name}.jsonl', Result)
        return f'{before}{describe(rows)}\n\n{note(rows)}\n{after}'

    return BLOCK.sub(table, text)


if __name__ == '__main__':
    run(main, Settings, positional='add')
