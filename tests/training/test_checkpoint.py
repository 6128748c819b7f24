"""The folder of a run: neither overwritten nor shared."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from timm_fisher.training.checkpoint import latest_checkpoint

ONE_EPOCH = {'only': {'train': 'head', 'epochs': 1}}
NO_TEST = {'test_split': None, 'stages': ONE_EPOCH}


def test_latest_of_many_checkpoints(tmp_path):
    """By number, of those that are whole."""
    assert latest_checkpoint(tmp_path) is None
    for name in (
        'checkpoint-0999',
        'checkpoint-9999',
        'checkpoint-10000',
        'checkpoint-10001.partial',
    ):
        (tmp_path / name).mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / 'checkpoint-10000'


def test_resume_without_a_run(recipe, images, tmp_path):
    with pytest.raises(ValueError, match=r"run' holds no run"):
        recipe(data_dir=images, resume=True)
    assert not (tmp_path / 'run').exists()


def test_run_is_neither_overwritten_nor_resumed_with_other_settings(recipe, few):
    run = recipe(data_dir=few, **NO_TEST)
    before = {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}
    with pytest.raises(ValueError, match=r"run' holds a run already.*--resume true"):
        recipe(data_dir=few, **NO_TEST)
    with pytest.raises(ValueError, match=r'with other settings: .*batch_size was 16, is 8'):
        recipe(data_dir=few, resume=True, **{**NO_TEST, 'batch_size': 8})
    stages = {'only': {**NO_TEST['stages']['only'], 'lr': 0.5}}
    with pytest.raises(ValueError, match=r'settings: stages\.only\.lr was 0\.001, is 0\.5\. Keep'):
        recipe(data_dir=few, resume=True, **{**NO_TEST, 'stages': stages})
    with pytest.raises(ValueError, match=r'settings: head_kwargs\.normalize was not there, is Fal'):
        recipe(data_dir=few, resume=True, **NO_TEST, head_kwargs={'normalize': False})
    assert before == {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}


def test_failure_before_training_leaves_the_output_free(recipe, few):
    """A misspelt name must not make the corrected command fail."""
    with pytest.raises(ValueError, match='Unknown head'):
        recipe(data_dir=few, head='avgg', **NO_TEST)
    stages = {**NO_TEST['stages'], 'later': {'epochs': 1, 'opt': 'adamww'}}
    with pytest.raises(ValueError, match='adamww'):
        recipe(data_dir=few, head='avg', **{**NO_TEST, 'stages': stages})
    assert (recipe(data_dir=few, head='avg', **NO_TEST) / 'metrics.json').exists()


HOLD = """
import sys, time
from accelerate import Accelerator
from timm_fisher.training.checkpoint import open_folder
from timm_fisher.training.config import Config
with open_folder(Config(output=sys.argv[1]), Accelerator(cpu=True)):
    print('locked', flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock of `run`."""
    command = [sys.executable, '-c', HOLD, str(tmp_path / 'run')]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == 'locked\n'
        yield process
        process.kill()


def test_two_runs_cannot_share_a_folder(recipe, few, holder):
    owner = (
        rf': process {holder.pid} on {platform.node()}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\.'
    )
    for _ in range(2):  # nor does being refused change anything
        with pytest.raises(ValueError, match=rf"writing to '.*run'{owner} .*another --output"):
            recipe(data_dir=few, **NO_TEST)
    holder.kill()  # leaves its lock file behind
    holder.wait()
    assert (recipe(data_dir=few, **NO_TEST) / 'metrics.json').exists()
