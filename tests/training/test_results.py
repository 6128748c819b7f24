"""Rows of results: kept, merged, chosen from, shown."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from PIL import Image

from timm_fisher.training.results import (
    Result,
    choose,
    describe,
    merge,
    note,
    plot,
    plot_costs,
)
from timm_fisher.training.rows import read_rows, write_rows

ROW = Result(
    protocol='probe', data='leaves', name='gem', settings={'stages.only.lr': 0.1},
    backbone='resnet18', head='gem', head_kwargs={}, backbone_stage=-1, seed=0, split='test',
    accuracy=0.5, balanced_accuracy=0.4, val_accuracy=0.6, best_stage='only', out_features=7,
    head_parameters=70, fit_seconds=1.0, train_seconds=20.0, steps=100, peak_memory_mb=5,
    device='cpu', commit='abc',
    versions={'torch': '2'}, command='train --seed 0',
)  # fmt: skip


def row(lr=0.1, seed=0, **changes):
    command = f'train {changes.get("name", "")} --lr {lr} --seed {seed}'
    return replace(ROW, settings={'stages.only.lr': lr}, seed=seed, command=command, **changes)


def replace_in(result, **changes):
    """The line of a row with other values."""
    return json.dumps({**asdict(result), **changes})


def test_file(tmp_path):
    """Read as written; a foreign line is named."""
    rows = [row(), row(seed=1, knn_accuracy=0.3, diverged=True)]
    path = tmp_path / 'rows.jsonl'
    write_rows(rows, path)
    assert read_rows(path, Result) == rows
    foreign = [
        replace_in(rows[0], **change)
        for change in (
            {'accuracy': '0.9'}, {'accuracy': float('nan')}, {'val_accuracy': 2.0},
            {'protocol': '../x'}, {'name': 'a\n# b'}, {'settings': {'a': '\x1b'}}, {'split': '|'},
        )
    ]  # fmt: skip
    for line in ('{"accuracy": 1}', 'no JSON', '[]', *foreign):
        path.write_text(path.read_text().splitlines()[0] + f'\n{line}\n')
        with pytest.raises(ValueError, match=r"Line 2 of '.*rows.jsonl' is not a row of results"):
            read_rows(path, Result)


def test_merge():
    """The last of one run counts; runs on other data are others."""
    first, other, again = row(), row(seed=1), row(accuracy=0.9)
    elsewhere = row(data='trees')
    assert merge([first, other, again, elsewhere]) == [again, other, elsewhere]


def test_choice():
    """By validation, of the first seed only, the first of equals."""
    rows = [
        row(0.1, 3, val_accuracy=0.6, accuracy=0.9),
        row(0.2, 3, val_accuracy=0.8, accuracy=0.1),
        row(0.3, 3, val_accuracy=0.8, accuracy=0.9),
        row(0.1, 4, val_accuracy=1.0, accuracy=1.0),
        row(0.2, 4, val_accuracy=0.2, accuracy=0.2),
    ]
    assert choose(rows) == {'gem': [rows[1], rows[4]]}
    # Rows of several machines, in any order; a run that was repeated counts once.
    again = row(0.2, 4, val_accuracy=0.3)
    assert choose([*rows[3:], *rows[:3], again]) == {'gem': [again, rows[1]]}


def test_other_backbones_are_other_lines():
    rows = [row(), row(backbone='vit', accuracy=0.9)]
    assert choose(rows) == {'gem, resnet18': rows[:1], 'gem, vit': rows[1:]}


def test_table():
    """Mean and deviation of the chosen rows; a line of one data set alone stays empty elsewhere."""
    rows = [
        row(0.1, 0), row(0.1, 1, accuracy=0.6), row(0.1, 0, name='a | <b>', knn_accuracy=0.25),
        row(0.1, 0, data='trees', out_features=9, train_seconds=3.0),
        row(0.1, 1, data='trees', train_seconds=5.0),
    ]  # fmt: skip
    assert describe(rows).splitlines() == [
        '| head | pooled vector | leaves: validation | leaves: test | leaves: k-NN '
        '| leaves: chosen | leaves: fit | leaves: training | trees: validation | trees: test '
        '| trees: chosen | trees: fit | trees: training |',
        '| --- |' + ' ---: |' * 12,
        '| gem | 7 | 60.0 ± 0.0 | 55.0 ± 7.1 |  | lr 0.1 | 1.0 s | 20 s '
        '| 60.0 ± 0.0 | 50.0 ± 0.0 | lr 0.1 | 1.0 s | 4 s |',
        '| a \\| &lt;b&gt; | 7 | 60.0 | 50.0 (1 of 2 seeds) | 25.0 | lr 0.1 | 1.0 s | 20 s '
        '|  |  |  |  |  |',
    ]
    one = describe(rows[:2]).splitlines()
    assert one[0] == '| head | pooled vector | validation | test | chosen | fit | training |'
    assert 'seeds 0, 1' in note(rows)
    assert 'k-NN' in note(rows)
    assert 'k-NN' not in note(rows[:2])


def test_columns_of_lines_that_share_none():
    """A head on each data set, one with a test split; on two devices times are not shown; what
    was best in the first of two stages is told."""
    rows = [row(), row(name='b', data='trees', split='val', device='gpu', best_stage='all')]
    assert describe(rows).splitlines()[0] == (
        '| head | pooled vector | leaves: validation | leaves: test | leaves: best in '
        '| leaves: chosen | trees: validation | trees: val | trees: best in | trees: chosen |'
    )
    assert '| all 1 |' in describe(rows)


@pytest.mark.parametrize(('draw', 'side'), [(plot, 'width'), (plot_costs, 'height')])
def test_plot(draw, side, tmp_path):
    """More room for another data set."""
    rows = [row(), row(seed=1), row(data='trees', name='$x')]
    sizes = []
    for count in (2, 3):
        draw(rows[:count], tmp_path / 'plot.png')
        with Image.open(tmp_path / 'plot.png') as picture:
            sizes.append(getattr(picture, side))
    assert sizes[1] > 1.4 * sizes[0]
