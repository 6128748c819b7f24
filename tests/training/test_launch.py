"""Runs in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import ENVIRONMENT, TINY

from timm_fisher.training import launch as launching
from timm_fisher.training.command_line import parse
from timm_fisher.training.config import Config
from timm_fisher.training.launch import launch


@pytest.fixture
def started(monkeypatch):
    """Options of the runs that were started, instead of the runs: they write a configuration
    and empty metrics."""
    runs = []

    class Process:
        exitcode = 0

        def __init__(self, target, args):
            (_, options, *resume), _ = args
            runs.append((yaml.safe_load(options), resume))

        def start(self):
            options, _ = runs[-1]
            folder = Path(options['output'])
            folder.mkdir(exist_ok=True)
            config = parse(Config, arguments=['--config', yaml.safe_dump(options, sort_keys=False)])
            (folder / 'config.yaml').write_text(config.to_yaml())
            (folder / 'metrics.json').write_text(json.dumps({'best': {}}))

        def join(self):
            pass

    monkeypatch.setattr(launching._PROCESSES, 'Process', Process)
    return runs


def test_finished_run_is_not_run_again(started, tmp_path):
    for _ in range(2):
        launch({'batch_size': 8}, tmp_path / 'run')
    assert started == [({'batch_size': 8, 'output': str(tmp_path / 'run')}, [])]
    with pytest.raises(ValueError, match=r'other settings: batch_size was 8, is 9'):
        launch({'batch_size': 9}, tmp_path / 'run')
    launch({'batch_size': 8, 'workers': 1}, tmp_path / 'run')  # of no consequence
    assert len(started) == 1
    launch({'augment': {}}, tmp_path / 'augmented')
    with pytest.raises(ValueError, match='workers was 2, is 1'):
        launch({'augment': {}, 'workers': 1}, tmp_path / 'augmented')


def test_stages_keep_their_order(started, tmp_path):
    """Whatever their names; a run of another order is another run."""
    stages = {'warm': {'epochs': 1}, 'adapt': {'epochs': 1}}
    launch({'stages': stages}, tmp_path / 'run')
    assert list(started[0][0]['stages']) == ['warm', 'adapt']
    with pytest.raises(ValueError, match=r'other settings: the order of stages was'):
        launch({'stages': dict(reversed(stages.items()))}, tmp_path / 'run')


def test_interrupted_run_is_resumed(started, tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/config.yaml').touch()
    launch({}, tmp_path / 'run')
    assert started[0][1] == ['--resume', 'true']


@pytest.mark.parametrize('error', [KeyboardInterrupt, MemoryError])
def test_run_ends_with_who_waits_for_it(started, tmp_path, monkeypatch, error):
    """No run goes on alone."""
    calls = []

    def join(process, timeout=None):
        calls.append('join')
        if len(calls) == 1:
            raise error

    process = launching._PROCESSES.Process
    monkeypatch.setattr(process, 'join', join)
    monkeypatch.setattr(process, 'terminate', lambda _: calls.append('terminate'), raising=False)
    with pytest.raises(error):
        launch({}, tmp_path / 'run')
    assert calls == ['join', 'join', 'terminate', 'join']


@pytest.mark.slow  # test_interrupted_run_is_resumed is its small twin
def test_log_of_a_resumed_run_goes_on(tmp_path, monkeypatch):
    """A line of the interrupted run stays; a run with other options changes nothing."""
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    log, run = tmp_path / 'run.log', tmp_path / 'run'
    options = {**TINY, 'dataset': 'digits', 'cache_dir': str(tmp_path / 'cache')}
    options['stages'] = {'only': {'train': 'classifier', 'epochs': 1}}
    metrics = launch(options, run, log=log)
    (run / 'metrics.json').unlink()
    log.write_text('a line\n')
    before = {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}
    with pytest.raises(ChildProcessError, match='batch_size was 16, is 8'):
        launch({**options, 'batch_size': 8}, run, log=log)
    assert before == {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}
    assert launch(options, run, log=log)['test'] == metrics['test']
    text = log.read_text()
    assert text.startswith('a line\n')
    assert 'batch_size was 16' in text
    assert 'resuming after checkpoint-0001' in text


def test_run_that_fails(tmp_path, monkeypatch):
    """The message has the sentence of the run, from its log."""
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    options = {**TINY, 'dataset': 'digits', 'head': 'agv'}
    with pytest.raises(
        ChildProcessError, match=r"run failed, see .*\.log:\n(.|\n)*Unknown head 'agv'"
    ):
        launch(options, tmp_path / 'run', log=tmp_path / 'run.log')
