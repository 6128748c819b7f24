"""Settings chosen from a grid, and runs in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import ENVIRONMENT, TINY

from timm_fisher.training import launch as launching
from timm_fisher.training import search


def test_grid():
    assert search.grid({'a': [1, 2], 'b.c': [3, 4]}) == [
        {'a': 1, 'b.c': 3}, {'a': 1, 'b.c': 4}, {'a': 2, 'b.c': 3}, {'a': 2, 'b.c': 4},
    ]  # fmt: skip
    assert search.grid({}) == [{}]


def test_with_settings():
    options = {'seed': 0, 'stages': {'a': {'lr': 1.0, 'epochs': 3}}}
    changed = search.with_settings(options, {'stages.a.lr': 0.5, 'head_kwargs.dim': 7})
    assert changed == {
        'seed': 0, 'stages': {'a': {'lr': 0.5, 'epochs': 3}}, 'head_kwargs': {'dim': 7},
    }  # fmt: skip
    assert options['stages']['a']['lr'] == 1.0


def test_first_of_equals_is_chosen(tmp_path, monkeypatch):
    val = {0.1: 0.6, 0.2: 0.8, 0.3: 0.8, 0.4: 0.7}
    calls = []

    def run(options, settings, folder, *, seed):
        calls.append((settings['lr'], seed))
        return {'best': {'val_accuracy': val[settings['lr']]}}

    monkeypatch.setattr(search, 'run', run)
    chosen, tried = search.choose({}, {'lr': list(val)}, tmp_path, seed=5)
    assert chosen == {'lr': 0.2}
    assert tried == [{'lr': lr, 'val_accuracy': accuracy} for lr, accuracy in val.items()]
    assert calls == [(lr, 5) for lr in val]


@pytest.fixture
def started(monkeypatch):
    """Options of the runs that were started, instead of the runs: they write empty metrics."""
    files = []

    class Process:
        exitcode = 0

        def __init__(self, target, args):
            (_, file, *resume), _ = args
            files.append((yaml.safe_load(Path(file).read_text()), resume))

        def start(self):
            folder = Path(files[-1][0]['output'])
            folder.mkdir(exist_ok=True)
            (folder / 'metrics.json').write_text(json.dumps({'best': {}}))

        def join(self):
            pass

    monkeypatch.setattr(launching._PROCESSES, 'Process', Process)
    return files


def test_options_of_a_run(started, tmp_path):
    """Those of all, then what is tried; a finished run is not run again."""
    options = {'batch_size': 8, 'stages': {'a': {'lr': 1.0, 'epochs': 3}}}
    for _ in range(2):
        search.run(options, {'stages.a.lr': 0.5}, tmp_path, seed=3)
    run = {'batch_size': 8, 'stages': {'a': {'lr': 0.5, 'epochs': 3}}, 'seed': 3}
    assert started == [({**run, 'output': str(tmp_path / 'lr0.5-s3')}, [])]
    with pytest.raises(ValueError, match='holds a run with other options'):
        search.run({**options, 'batch_size': 9}, {'stages.a.lr': 0.5}, tmp_path, seed=3)


def test_interrupted_run_is_resumed(started, tmp_path):
    (tmp_path / 's0').mkdir()
    (tmp_path / 's0/config.yaml').touch()
    search.run({}, {}, tmp_path, seed=0)
    assert started[0][1] == ['--resume', 'true']


def test_run_that_fails(tmp_path, monkeypatch):
    """The message has the sentence of the run, from its log."""
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(RuntimeError, match=r"s0 failed, see .*s0\.log:\n(.|\n)*Unknown head 'agv'"):
        search.run({**TINY, 'dataset': 'digits', 'head': 'agv'}, {}, tmp_path, seed=0)
