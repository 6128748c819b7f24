"""Lines of the papers' experiments: kept, merged, shown."""

from __future__ import annotations

import pytest

from timm_fisher.training.measurements import (
    Measurement,
    merge_measurements,
    table_name,
    table_of,
)
from timm_fisher.training.rows import read_rows, write_rows


def line(row, seed, share, **options):
    return Measurement('cluster_leaves', row, seed, {'k-means': share}, **options)


def test_file(tmp_path):
    """Read as written; a later line of one row and seed replaces the first."""
    lines = [line('CNN', 0, 0.5), line('CNN', 1, 0.7, paper={'k-means': 46.75})]
    write_rows(lines, tmp_path / 'lines.jsonl')
    assert read_rows(tmp_path / 'lines.jsonl', Measurement) == lines
    assert merge_measurements([*lines, line('CNN', 0, 0.9)]) == [line('CNN', 0, 0.9), lines[1]]


def test_table():
    lines = [line('a | b', 0, 0.5, paper={'k-means': 46.75}), line('c', 0, 0.25)]
    lines.append(line('a | b', 1, 0.7))
    assert table_of(lines).splitlines() == [
        '|  | k-means | k-means (paper) |', '| --- | ---: | ---: |',
        '| a \\| b | 60.0 ± 14.1 | 46.75 |', '| c | 25.0 |  |', '',
        'In %, mean and standard deviation over seeds 0, 1.',
    ]  # fmt: skip


def test_names_of_tables():
    assert table_name('cluster', 'my images-2.npz') == 'cluster_my_images_2'
    with pytest.raises(ValueError, match=r"table is '\.\./x'"):
        Measurement('../x', 'a', 0, {})
