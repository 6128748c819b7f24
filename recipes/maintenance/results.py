"""Rebuild the tables of results in the recipes' pages from the rows that runs left.

    python recipes/maintenance/results.py
    python recipes/maintenance/results.py runs/probe/results.jsonl

The second adds rows first: your own, or those that somebody sent. Rows of comparisons
(results.jsonl) are kept in recipes/results/, a file for each protocol, one row for each run; of
several rows of one run the last one counts. Those of the papers' experiments (measurements.jsonl)
are kept in recipes/results/papers/, a file for each table. A page has a table between two lines,
and what is between them is replaced:

    <!-- results: probe -->
    <!-- end of results -->

Plots of comparisons go to .github/pictures/, named after the protocol.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from timm_fisher.files import write
from timm_fisher.training.command_line import run
from timm_fisher.training.measurements import (
    merge_measurements,
    read_measurements,
    table_of,
    write_measurements,
)
from timm_fisher.training.results import (
    describe,
    merge,
    note,
    plot,
    plot_costs,
    read_results,
    write_results,
)

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r'(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)', re.DOTALL)


@dataclass
class Settings:
    """Rebuild the tables of results in the recipes' pages.

    Args:
        add: files of rows to add first.
        results: folder of the rows.
        pages: folder of the pages, those in its subfolders included.
        pictures: folder of the plots.
    """

    add: list[Path] = field(default_factory=list)
    results: Path = ROOT / 'recipes/results'
    pages: Path = ROOT / 'recipes'
    pictures: Path = ROOT / '.github/pictures'


def main(settings: Settings) -> None:
    experiments = [path for path in settings.add if path.name == 'measurements.jsonl']
    lines = [line for path in experiments for line in read_measurements(path)]
    for table in dict.fromkeys(line.table for line in lines):
        path = settings.results / 'papers' / f'{table}.jsonl'
        path.parent.mkdir(exist_ok=True)
        known = read_measurements(path) if path.exists() else []
        merged = merge_measurements([*known, *(line for line in lines if line.table == table)])
        write_measurements(merged, path)
        print(f'papers/{path.name}: {len(merged)} lines, {len(merged) - len(known)} of them new')
    comparisons = [path for path in settings.add if path not in experiments]
    added = [row for path in comparisons for row in read_results(path)]
    for protocol in dict.fromkeys(row.protocol for row in added):
        path = settings.results / f'{protocol}.jsonl'
        kept = read_results(path) if path.exists() else []
        rows = merge([*kept, *(row for row in added if row.protocol == protocol)])
        write_results(rows, path)
        print(f'{path.name}: {len(rows)} rows, {len(rows) - len(kept)} of them new')
    for path in sorted(settings.results.glob('*.jsonl')):
        rows = read_results(path)
        plot(rows, settings.pictures / f'{path.stem}.png')
        plot_costs(rows, settings.pictures / f'{path.stem}_costs.png')
    for page in sorted(settings.pages.glob('**/*.md')):
        text = page.read_text()
        rebuilt = rebuild(text, settings.results)
        if rebuilt != text:
            write(page, rebuilt)
            print(f'{page.name} rebuilt')


def rebuild(text: str, results: Path) -> str:
    """A page with its tables made anew."""

    def table(match: re.Match[str]) -> str:
        before, protocol, after = match.groups()
        experiment = results / 'papers' / f'{protocol}.jsonl'
        if experiment.exists():
            return f'{before}{table_of(read_measurements(experiment))}\n{after}'
        rows = read_results(results / f'{protocol}.jsonl')
        return f'{before}{describe(rows)}\n\n{note(rows)}\n{after}'

    return BLOCK.sub(table, text)


if __name__ == '__main__':
    run(main, Settings, positional='add')
