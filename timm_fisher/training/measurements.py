"""What the papers' experiments measured: a line for each row of a table and seed, which tables are
made from."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from timm_fisher.hub.card import installed_versions
from timm_fisher.hub.text import escape_markdown
from timm_fisher.training.report import COMMIT
from timm_fisher.training.tables import percent, records, three_digits


@dataclass(frozen=True)
class Measurement:
    """A row of a table, of one seed.

    Attributes:
        table: its name, as `table_name` gives it.
        row: its title.
        seed: of everything random.
        shares: by title of the column, 0 to 1.
        paper: likewise what the paper has, in per cent, where it has something.
        costs: by title of the column, which names the unit.
        settings: what was chosen on validation images, by name.
        commit, versions: of the code that measured.

    Raises:
        ValueError: the name of the table could not be that of a file.
    """

    table: str
    row: str
    seed: int
    shares: dict[str, float]
    paper: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    commit: str = COMMIT
    versions: dict[str, str] = field(default_factory=installed_versions)

    def __post_init__(self) -> None:
        if not re.fullmatch(r'\w+', self.table):
            raise ValueError(f"table is {self.table!r}; give letters, digits and '_'.")


def table_name(experiment: str, data: str) -> str:
    """Of an experiment on a data set, by its name in `timm_fisher.training.report.data_name`."""
    return re.sub(r'\W+', '_', f'{experiment}_{data.removesuffix(".npz")}')


def merge_measurements(measurements: Iterable[Measurement]) -> list[Measurement]:
    """All of them; of several of one row and seed the last, in the place of the first."""
    return list({(m.table, m.row, m.seed): m for m in measurements}.values())


def table_of(measurements: Iterable[Measurement]) -> str:
    """Markdown table, in per cent: mean and standard deviation over the seeds; beside them the
    paper's figures, the mean costs and what was chosen."""
    rows: dict[str, list[Measurement]] = {}
    for measured in measurements:
        rows.setdefault(measured.row, []).append(measured)
    lines: list[Mapping[str, str]] = []
    for title, of_seeds in rows.items():
        line = {'': escape_markdown(title)}
        for column in of_seeds[0].shares:
            line[column] = percent([m.shares[column] for m in of_seeds])
            if column in of_seeds[0].paper:
                line[f'{column} (paper)'] = f'{of_seeds[0].paper[column]:g}'
        for column in of_seeds[0].costs:
            line[column] = three_digits(statistics.mean(m.costs[column] for m in of_seeds))
        if of_seeds[0].settings:
            line['chosen'] = ', '.join(f'{k} {v}' for k, v in of_seeds[0].settings.items())
        lines.append(line)
    columns = list(dict.fromkeys(column for line in lines for column in line))
    seeds = sorted({m.seed for of_seeds in rows.values() for m in of_seeds})
    means = 'mean and standard deviation over seeds' if len(seeds) > 1 else 'of seed'
    return f'{records(lines, columns)}\n\nIn %, {means} {", ".join(map(str, seeds))}.'
