"""Markdown tables of results, for all recipes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    ruler = ['---', *['---:'] * (len(header) - 1)]
    return '\n'.join(f'| {" | ".join(row)} |' for row in [header, ruler, *rows])


def percent(shares: Sequence[float], digits: int = 1) -> str:
    """`91.2 ± 0.3` of shares from 0 to 1; the sample's standard deviation."""
    mean = f'{100 * statistics.mean(shares):.{digits}f}'
    return f'{mean} ± {100 * statistics.stdev(shares):.{digits}f}' if len(shares) > 1 else mean


def three_digits(value: float) -> str:
    """Three digits; an exponent only where there would be many zeros."""
    return f'{value:.0f}' if value >= 100 else f'{value:#.3g}'
