"""recipes/papers/deep_fisher_svm.py: what a run leaves, and what it refuses."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import timm
import torch
from conftest import ENVIRONMENT, TINY, command_line, forget_launch, load_script, write_images
from sklearn.metrics import average_precision_score
from torch.utils.data import DataLoader

from timm_fisher.training.command_line import parse
from timm_fisher.training.measurements import Measurement
from timm_fisher.training.rows import read_rows

SMALL = {'iterations': 3, 'C': 100.0}
TRAIN = {**TINY, 'head_kwargs': {'reduce_dim': 6, 'components': 4}}


@pytest.fixture(scope='module')
def script():
    return load_script('papers/deep_fisher_svm')


@pytest.fixture
def run(script, tmp_path, monkeypatch):
    """`run(mode='multi', ...)` runs the script in this process; returns the output folder."""
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)

    def start(train=None, **options):
        options = {'output': tmp_path / 'run', **SMALL, **options}
        options['train'] = {**TRAIN, 'cache_dir': str(tmp_path / 'cache'), **(train or {})}
        forget_launch()
        script.main(parse(script.DeepFisher, arguments=command_line(options)))
        return options['output']

    yield start
    forget_launch()


def decisions(folder, images, split):
    """As a stranger would compute them, who has the folder and timm."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    dataset = timm.data.create_dataset('', images, split=split, transform=transform)
    with torch.no_grad():
        found = [(model(x), y) for x, y in DataLoader(dataset, batch_size=17)]
    values, labels = (torch.cat(part) for part in zip(*found, strict=True))
    return values.numpy(), labels.numpy(), model


def check_tables(folder, metrics):
    lines = (folder / 'tables.md').read_text().splitlines()
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines if line[:1] == '|']
    assert len(rows) == 2 + 3 + 2
    assert len(rows[0]) == 10
    for name, *cells in rows[2:]:
        for i, group in enumerate(('val', 'test', 'transfer')):
            values = []
            for kind in ('base', 'deep'):
                found = metrics[group][kind]
                key = {'average': 'mean_average_precision'}.get(name, 'accuracy')
                values.append(100 * found['average_precision'].get(name, found[key]))
            base, deep = values
            expected = [f'{base:.1f}', f'{deep:.1f}', f'{deep - base:+.1f}']
            assert cells[3 * i : 3 * i + 3] == expected


@pytest.mark.parametrize('mode', [pytest.param('single', marks=pytest.mark.slow), 'multi'])
def test_run_leaves_everything(script, run, images, mode, monkeypatch):
    if mode == 'single':  # Matplotlib takes long; once is enough.
        monkeypatch.setattr(script, 'plot', lambda log, path: path.write_bytes(b''))
    folder = run(mode=mode, data_dir=images, bias=mode == 'single')
    metrics = json.loads((folder / 'metrics.json').read_text())
    check_tables(folder, metrics)
    (line,) = read_rows(folder / 'measurements.jsonl', Measurement)
    assert line.shares['(b) test: deep'] == metrics['transfer']['deep']['mean_average_precision']
    assert metrics['images'] == {'train': 120, 'val': 33, 'test': 51}
    assert set(metrics['C'].values()) == {100.0}
    classes = ['blue', 'green', 'red']

    rows = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    tasks = ['all'] if mode == 'multi' else classes
    assert list(dict.fromkeys(row['task'] for row in rows)) == tasks
    for task in tasks:
        trace = [row['objective'] for row in rows if row['task'] == task]
        assert len(trace) == 4
        assert trace == sorted(trace, reverse=True)

    # The saved models give the figures of table (b).
    names = ['model'] if mode == 'multi' else [f'model-{name}' for name in classes]
    assert {each.name for each in folder.iterdir()} == {
        'base', *names, 'config.yaml', 'log.jsonl', 'measurements.jsonl', 'metrics.json',
        'objective.png', 'tables.md',
    }  # fmt: skip
    for kind, folders in (('base', ['base']), ('deep', names)):
        found = [decisions(folder / each, images, 'test') for each in folders]
        scores, labels = np.concatenate([each[0] for each in found], 1), found[0][1]
        expected = metrics['transfer'][kind]
        assert np.mean(scores.argmax(1) == labels) == expected['accuracy']
        for c, name in enumerate(classes):
            precision = average_precision_score(labels == c, scores[:, c])
            assert precision == pytest.approx(expected['average_precision'][name], abs=1e-9)
        label_names = [name for *_, model in found for name in model.pretrained_cfg['label_names']]
        assert label_names == classes
        assert all((model.classifier.bias != 0).any() == (mode == 'single') for *_, model in found)

    settings = parse(script.DeepFisher, arguments=[f'--config={folder / "config.yaml"}'])
    assert (settings.mode, settings.iterations) == (mode, 3)
    assert settings.config.data_dir == str(images)
    with pytest.raises(ValueError, match='holds a finished run'):
        run(mode=mode, data_dir=images)


@pytest.mark.slow
def test_run_through_the_launcher(launch, images, tmp_path):
    train = {**TRAIN, 'cache_dir': str(tmp_path / 'c')}
    options = {**SMALL, 'data_dir': images, 'output': tmp_path / 'run', 'train': train}
    process = launch('recipes/papers/deep_fisher_svm.py', **options)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert (tmp_path / 'run' / 'tables.md').read_text() in text
    check_tables(tmp_path / 'run', json.loads((tmp_path / 'run' / 'metrics.json').read_text()))
    process = launch(
        'recipes/papers/deep_fisher_svm.py', processes=2, **options | {'output': tmp_path / 'two'}
    )
    text, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert 'runs in one process, not in 2' in text


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ({'mode': 'both'}, "'single'.*'multi'"),
        ({'iterations': 0}, 'iterations is 0; give 1 or more'),
        ({'descriptor_fraction': 0.0}, 'descriptor_fraction is 0.0; give more than 0'),
        ({'C': -1.0}, 'C is -1.0; give more than 0'),
        ({'code_dim': 5}, 'code_dim'),
    ],
)
def test_wrong_options(run, capsys, option, message):
    with pytest.raises(SystemExit):
        run(**option)
    assert re.search(message, capsys.readouterr().err)


def test_there_must_be_a_test_split(run, images):
    with pytest.raises(ValueError, match='test_split of train is null'):
        run(data_dir=images, train={'test_split': None})


def test_splits_must_hold_every_class(run, tmp_path):
    folder = write_images(tmp_path / 'few', train=4, val=2, test=2)
    for path in (folder / 'val' / 'red').iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"split 'val' has no images of \['red'\]"):
        run(data_dir=folder)
    for path in (folder / 'val').glob('*/*.png'):
        path.unlink()
    with pytest.raises(ValueError, match="split 'val'"):
        run(data_dir=folder)
