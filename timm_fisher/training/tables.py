"""Markdown tables of results, for all recipes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    ruler = ['---', *['---:'] * (len(header) - 1)]
    return '\n'.join(f'| {" | ".join(row)} |' for row in [header, ruler, *rows])


def records(
    rows: Sequence[Mapping[Any, Any]], columns: Mapping[Any, str] | Sequence[str] | None = None
) -> str:
    """A Markdown table of values by name; floats with three digits, nothing where a row has none.

    Args:
        rows: one or more.
        columns: names that are shown, or their titles by name; None shows those of the first row.
    """
    names = list(rows[0] if columns is None else columns)
    titles = columns.values() if isinstance(columns, Mapping) else names
    cells = ([row.get(name, '') for name in names] for row in rows)
    lines = [[three_digits(v) if isinstance(v, float) else str(v) for v in line] for line in cells]
    return table([str(title) for title in titles], lines)


def percent(shares: Sequence[float]) -> str:
    """`91.2 ± 0.3` of shares from 0 to 1; the sample's standard deviation."""
    mean = f'{100 * statistics.mean(shares):.1f}'
    return f'{mean} ± {100 * statistics.stdev(shares):.1f}' if len(shares) > 1 else mean


def three_digits(value: float) -> str:
    """Three digits; an exponent only where there would be many zeros."""
    return f'{value:.0f}' if value >= 99.95 else f'{value:#.3g}'
