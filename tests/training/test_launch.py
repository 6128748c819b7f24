"""Runs in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import ENVIRONMENT, TINY

from timm_fisher.training import launch as launching
from timm_fisher.training.launch import launch


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


def test_finished_run_is_not_run_again(started, tmp_path):
    for _ in range(2):
        launch({'batch_size': 8}, tmp_path / 'run')
    assert started == [({'batch_size': 8, 'output': str(tmp_path / 'run')}, [])]
    with pytest.raises(ValueError, match='holds a run with other options'):
        launch({'batch_size': 9}, tmp_path / 'run')


def test_interrupted_run_is_resumed(started, tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/config.yaml').touch()
    launch({}, tmp_path / 'run')
    assert started[0][1] == ['--resume', 'true']


def test_run_that_fails(tmp_path, monkeypatch):
    """The message has the sentence of the run, from its log."""
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    options = {**TINY, 'dataset': 'digits', 'head': 'agv'}
    with pytest.raises(RuntimeError, match=r"run failed, see .*\.log:\n(.|\n)*Unknown head 'agv'"):
        launch(options, tmp_path / 'run', log=tmp_path / 'run.log')
