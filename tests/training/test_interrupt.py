"""Signals end a run at its next step, and it resumes exactly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ENVIRONMENT, ROOT, TINY, command_line
from run_checks import TWO_STAGES, check_same_runs, slow

import timm_fisher
from timm_fisher.descriptors import StageDescriptors
from timm_fisher.training import run

OPTIONS = {'stages': TWO_STAGES, 'test_split': None, 'batch_size': 8}  # 3 steps an epoch


def at_call(monkeypatch, owner, name, number, act):
    """`act()` before that call of `owner.name`."""
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def acting(*arguments, **keywords):
        if next(calls) == number:
            act()
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, acting)


def send(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ('number', 'step', 'checkpoint'),
    [
        (signal.SIGTERM, 2, None),
        (signal.SIGINT, 5, 'checkpoint-0001'),
        (signal.SIGTERM, 6, 'checkpoint-0002'),  # the epoch ends, and is kept
        slow(signal.SIGTERM, 9, 'checkpoint-0003'),  # so does the stage
    ],
)
def test_signal_at_a_step(recipe, few_images, tmp_path, monkeypatch, number, step, checkpoint):
    expected = recipe(output=tmp_path / 'expected', data_dir=few_images, **OPTIONS)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_call(patch, timm_fisher.PooledModel, 'project_', step, send(number))
        with pytest.raises(KeyboardInterrupt) as error:
            recipe(data_dir=few_images, **OPTIONS)
    assert signal.getsignal(number) is before
    folder = tmp_path / 'run'
    assert [path.name for path in folder.glob('checkpoint-*')] == [checkpoint] * bool(checkpoint)
    place = f'continues from {checkpoint}' if checkpoint else 'starts again: there is no checkpoint'
    assert f"The run in '{folder}' was stopped by a signal. With --resume true" in str(error.value)
    assert place in str(error.value)
    check_same_runs(recipe(data_dir=few_images, resume=True, **OPTIONS), expected)


@pytest.mark.parametrize(
    'number', [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ('owner', 'name', 'call', 'place'),
    [
        (run, 'load_splits', 1, 'starts again'),
        (StageDescriptors, 'features', 4, 'starts again'),  # while features are cached
        (timm_fisher, 'fit', 1, 'starts again'),
        (run, 'draw_curve', 1, 'continues from checkpoint-0002'),  # between stages
        (run, 'create_optimizer', 4, 'continues from checkpoint-0002'),  # two are tried at first
        (run, 'load_weights', 1, 'continues from checkpoint-0003'),  # evaluation of the best
    ],
    ids=lambda value: getattr(value, '__name__', value),
)
def test_signal_outside_of_training(
    recipe, few_images, tmp_path, monkeypatch, number, owner, name, call, place
):
    """It ends the run at once, and nothing half-written stays."""
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, call, send(number))
        with pytest.raises(KeyboardInterrupt, match=f'With --resume true it {place}'):
            recipe(data_dir=few_images, **OPTIONS)
    assert not [*tmp_path.rglob('*partial*'), *tmp_path.rglob('.saving*')]
    assert (recipe(data_dir=few_images, resume=True, **OPTIONS) / 'metrics.json').exists()


def test_second_signal_does_not_wait(recipe, few_images, monkeypatch):
    def twice():
        send(signal.SIGINT)()
        send(signal.SIGINT)()
        pytest.fail('the step went on')

    at_call(monkeypatch, timm_fisher.PooledModel, 'project_', 1, twice)
    with pytest.raises(KeyboardInterrupt):
        recipe(data_dir=few_images, **OPTIONS)


def test_error_that_a_signal_caused(recipe, few_images, monkeypatch):
    """As of a worker that got it, too."""

    def die():
        send(signal.SIGTERM)()
        raise RuntimeError('DataLoader worker exited unexpectedly')

    at_call(monkeypatch, timm_fisher.PooledModel, 'project_', 1, die)
    with pytest.raises(KeyboardInterrupt) as error:
        recipe(data_dir=few_images, **OPTIONS)
    assert isinstance(error.value.__cause__, RuntimeError)


def test_run_in_a_thread(recipe, few_images):
    """Where no signal can be caught: it goes without."""
    thread = threading.Thread(target=recipe, kwargs={'data_dir': few_images, **OPTIONS})
    thread.start()
    thread.join()
    assert (few_images.parent / 'run/metrics.json').exists()


@pytest.mark.slow  # the tests above are its twins within this process
def test_the_command(images, tmp_path):
    """The sentence, and the exit status of an interrupted command."""
    stages = {'long': {'train': 'head', 'epochs': 1000, 'lr': 0.001}}
    options = {**TINY, 'data_dir': images, 'stages': stages, 'output': tmp_path / 'run'}
    process = subprocess.Popen(
        [sys.executable, '-m', 'timm_fisher.training', *command_line(options), '--cache=false'],
        cwd=ROOT, env={**os.environ, **ENVIRONMENT}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while not (tmp_path / 'run/log.jsonl').exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    sentence = errors.strip().splitlines()[-1]
    assert sentence.startswith(f"The run in '{tmp_path}/run' was stopped by a signal.")
    assert 'Traceback' not in errors
