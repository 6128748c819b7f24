"""A run that was interrupted anywhere resumes exactly."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import distributed_checks
import pytest
import torch
from conftest import TINY
from PIL import Image
from run_checks import (
    TWO_STAGES,
    UNSUPERVISED,
    UNSUPERVISED_FIRST,
    check_run,
    check_same_runs,
    finish,
    is_finite,
    read_log,
    read_metrics,
    read_weights,
    slow,
)

import timm_fisher
from timm_fisher.training import checkpoint, run

# Augmentation and dropout draw random numbers on the way, in processes of their own too; momentum
# and plateau have a memory. The first learning rate is too high, so that plateau has to lower it.
MEMORY = {
    'head': 'sparse_fisher',
    'head_kwargs': {'code_dim': 4},
    'augment': {'auto_augment': 'rand-m5-n2'},
    'drop_rate': 0.3,
    'workers': 2,
    'stages': {
        'warm': {'train': 'head', 'epochs': 4, 'opt': 'sgd', 'lr': 1.0, 'head_loss': 0.1,
                 'sched': 'plateau', 'patience_epochs': 0, 'decay_rate': 0.1, 'clip_grad': 1.0},
        'tune': {'train': 'all', 'epochs': 4, 'lr': 0.001, 'head_lr_scale': 2.0,
                 'warmup_epochs': 1, 'weight_decay': 0.05},
    },
}  # fmt: skip


def kill_after(process, run, epochs):
    """SIGKILL to launcher, recipe and workers, at a random moment after an epoch."""
    log, delay = run / 'log.jsonl', random.uniform(0, 0.4)
    while process.poll() is None and not (
        log.exists() and len(log.read_text().splitlines()) >= epochs
    ):
        time.sleep(0.005)
    time.sleep(delay)
    assert process.poll() is None, process.communicate()[0]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    print(f'killed {delay:.3f} s after epoch {epochs}')
    assert not (run / 'metrics.json').exists()


@pytest.fixture(scope='module')
def launched(launch, images, tmp_path_factory):
    """A whole run through the launcher; and one killed in the second stage, and resumed."""
    folder = tmp_path_factory.mktemp('launched')
    options = {**TINY, 'data_dir': images, **MEMORY}
    runs = {name: folder / name for name in ('whole', 'killed')}
    whole, killed = (launch(output=run, **options) for run in runs.values())
    kill_after(killed, runs['killed'], epochs=5)
    finish(launch(output=runs['killed'], resume=True, **options))
    finish(whole)
    return runs


@pytest.mark.slow  # test_run_stopped_at_a_step always runs
def test_run_through_the_launcher(launched, images):
    stages = MEMORY['stages']
    check_run(launched['whole'], images, head='sparse_fisher', stages=stages)
    with Image.open(launched['whole'] / 'curve.png') as curve:
        assert curve.width > 1000


@pytest.mark.slow
def test_killed_run_resumes_exactly(launched):
    rates = [row['lr'] for row in read_log(launched['whole'])]
    assert min(rates[:4]) < rates[0], 'plateau never changed the rate: nothing to remember'
    check_same_runs(launched['killed'], launched['whole'])


@pytest.mark.slow
def test_run_killed_in_each_stage_resumes_exactly(launched, launch, images, tmp_path):
    options = {**TINY, 'data_dir': images, **MEMORY, 'output': tmp_path / 'run'}
    kill_after(launch(**options), tmp_path / 'run', epochs=1)
    kill_after(launch(resume=True, **options), tmp_path / 'run', epochs=5)
    finish(launch(resume=True, **options))
    check_same_runs(tmp_path / 'run', launched['whole'])


class Killed(BaseException):
    """Stands for SIGKILL within a process: nothing in the recipe catches it."""


@pytest.fixture
def stop(recipe, tmp_path, monkeypatch):
    """`stop(owner, name, when, **options)` runs until `owner.name(...)` is called and
    `when(*arguments)` holds, and then resumes."""

    def run(owner, name, when, **options):
        original = getattr(owner, name)
        stopped = False

        def stopping(*arguments):
            nonlocal stopped
            if when(*arguments):
                stopped = True
                raise Killed
            return original(*arguments)

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(owner, name, stopping)
            recipe(**options)
        assert stopped
        return recipe(resume=True, **options)

    return run


@pytest.mark.parametrize(
    ('change', 'steps'),
    [
        slow({}, (2, 8, 14, 24)),
        ({'stages': UNSUPERVISED_FIRST}, (5, 8)),
        slow({'stages': {'first': UNSUPERVISED}}, (5,)),
        # A head with a rule of its own; one that is trained through its forward.
        slow(
            {
                'head': 'gsnmf',
                'head_kwargs': {'components': 8},
                'stages': {'first': {**UNSUPERVISED, 'train': 'backbone'}},
            },
            (5,),
        ),
        (
            {
                'head': 'dbm_idfk',
                'head_kwargs': distributed_checks.SMALL['dbm_idfk'],
                'stages': {'tune': {'train': 'all', 'epochs': 2, 'lr': 0.001, 'momentum': 0.5}},
            },
            (5,),
        ),
        # A dropout of the head's own.
        slow(
            {
                'head': 'dropcov',
                'head_kwargs': {'reduce_dim': 64},
                'stages': {'tune': {'train': 'all', 'epochs': 2, 'lr': 0.001}},
            },
            (5,),
        ),
        # A loss with weights of its own, and an order of its own.
        (
            {
                'projection': 6,
                'stages': {
                    'search': {
                        'train': 'all',
                        'epochs': 2,
                        'lr': 0.001,
                        'per_class': 4,
                        'loss': {'name': 'ProxyAnchorLoss'},
                    }
                },
            },
            (5,),
        ),
        pytest.param(
            {
                'lora': {'r': 2},
                'stages': {'tune': {'train': 'all', 'epochs': 2, 'lr': 0.01}},
            },
            (5,),
            marks=pytest.mark.skipif(not find_spec('peft'), reason='needs the extra lora'),
        ),
    ],
    ids=[
        'memory',
        'unsupervised first',
        'unsupervised',
        'gsnmf',
        'dbm_idfk',
        'dropcov',
        'metric',
        'lora',
    ],
)
def test_run_stopped_at_a_step_resumes_exactly(recipe, stop, few_images, tmp_path, change, steps):
    """Before any checkpoint, in the first stage, in the first and in the last epoch of the second:
    3 steps an epoch, 4 + 4 epochs."""
    options = {**MEMORY, 'data_dir': few_images, 'test_split': None, 'workers': 0, 'batch_size': 8}
    options |= change
    expected = recipe(output=tmp_path / 'expected', **options)
    for step in steps:
        steps = iter(range(1, 100))
        output = tmp_path / f'step-{step}'
        run = stop(
            timm_fisher.PooledModel,
            'project_',
            lambda model, steps=steps, step=step: next(steps) == step,
            output=output,
            **options,
        )
        check_same_runs(run, expected)


@pytest.mark.parametrize('epoch', [1, slow(3)])
def test_run_stopped_while_it_saves(recipe, stop, few_images, tmp_path, epoch):
    """In the checkpoint, before the log, before the rename, and before model/ is replaced by the
    best; epoch 3 ends a stage, with a curve."""
    options = {'data_dir': few_images, 'stages': TWO_STAGES, 'test_split': None}
    expected = recipe(output=tmp_path / 'expected', **options)
    name = f'checkpoint-{epoch:04d}'
    moments = {
        'model': (run.Run, 'save_model', lambda run, path: name in str(path)),
        'progress': (checkpoint, 'write', lambda path, text: name in str(path)),
        'log': (
            checkpoint,
            'write',
            lambda path, text: path.name == 'log.jsonl' and text.count('\n') == epoch,
        ),
    }
    if epoch == 3:
        moments['curve'] = (run, 'draw_curve', lambda history, path: len(history) == 3)
    for moment, where in moments.items():
        folder = stop(*where, output=tmp_path / moment, **options)
        check_same_runs(folder, expected)
        assert (folder / 'curve.png').exists()
        assert {path.name for path in folder.iterdir() if path.name != f'checkpoint-{3:04d}'} == {
            path.name for path in expected.iterdir() if path.name != f'checkpoint-{3:04d}'
        }


@pytest.mark.parametrize('moment', ['checkpoint', 'model'])
def test_kept_model_is_that_of_the_figures(recipe, stop, few, tmp_path, moment):
    """Stopped between checkpoint and model/: it is neither ahead of the checkpoint nor behind."""
    options = {'data_dir': few, 'test_split': None}
    options['stages'] = {'only': {'train': 'head', 'epochs': 1}}
    expected = recipe(output=tmp_path / 'expected', **options)
    output = tmp_path / 'run'

    def when(*arguments):
        assert not (output / 'model').exists()
        assert (checkpoint.latest_checkpoint(output) is None) == (moment == 'checkpoint')
        return True

    where = {
        'checkpoint': (checkpoint, 'write', lambda path, text: 'progress' in path.name and when()),
        'model': (run.Run, 'save_model', lambda run, path: path.name == 'model'
                  and path.parent == output and when()),
    }  # fmt: skip
    folder = stop(*where[moment], output=output, **options)
    check_same_runs(folder, expected)


def test_finished_run_resumes_to_itself(recipe, few_images):
    options = {'data_dir': few_images, 'stages': TWO_STAGES, 'test_split': None}
    run = recipe(**options)
    before = read_metrics(run), read_log(run), read_weights(run / 'model')
    (run / 'model/metrics.json').write_text('{}')  # as a release adds it
    recipe(resume=True, **options)
    after = read_metrics(run), read_log(run), read_weights(run / 'model')
    assert before[:2] == after[:2]
    assert all(torch.equal(before[2][name], after[2][name]) for name in before[2])
    assert (run / 'model/metrics.json').exists()


def test_finished_run_without_its_checkpoint_is_not_overwritten(recipe, few_images):
    options = {'data_dir': few_images, 'test_split': None}
    run = recipe(**options)
    shutil.rmtree(*run.glob('checkpoint-*'))
    before = {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}
    for resume in (False, True):
        with pytest.raises(ValueError, match='holds a finished run without its checkpoint'):
            recipe(resume=resume, **options)
    assert before == {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}


STAGES = {'warm': {'train': 'head', 'epochs': 3, 'lr': 0.01}}


def test_disk_full_keeps_the_earlier_checkpoint(recipe, few, tmp_path, monkeypatch):
    """The second checkpoint meets a limit on file sizes that the first one did not."""
    options = {'data_dir': few, 'test_split': None, 'stages': STAGES, 'head': 'sparse_fisher'}
    expected = recipe(output=tmp_path / 'expected', **options)
    train_epoch = run.Run._train_epoch

    def fill_disk(self, training, epoch):
        if epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        return train_epoch(self, training, epoch)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(run.Run, '_train_epoch', fill_disk)
            with pytest.raises(Exception, match='File too large'):
                recipe(**options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    folder = tmp_path / 'run'
    assert [path.name for path in folder.glob('checkpoint-????')] == ['checkpoint-0001']
    assert is_finite(folder / 'model')
    recipe(resume=True, **options)
    for file in ('model/model.safetensors', 'last/model.safetensors'):
        assert (folder / file).read_bytes() == (expected / file).read_bytes()
    assert [path.name for path in folder.glob('checkpoint-*')] == ['checkpoint-0003']


def test_rename_that_fails_keeps_the_earlier_checkpoint(recipe, few, tmp_path, monkeypatch):
    replace = os.replace

    def fail(source, target):
        if Path(target).name == 'checkpoint-0002':
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='No space left'):
        recipe(data_dir=few, test_split=None, stages=STAGES)
    kept = tmp_path / 'run/checkpoint-0001'
    assert is_finite(kept / 'model')
    assert len(json.loads((kept / 'progress.json').read_text())['history']) == 1
