"""The folder of a run: neither overwritten nor shared."""

from __future__ import annotations

import pytest

ONE_EPOCH = {'only': {'train': 'head', 'epochs': 1}}
NO_TEST = {'test_split': None, 'stages': ONE_EPOCH}


def test_resume_without_a_run(recipe, images, tmp_path):
    with pytest.raises(ValueError, match=r"run' holds no run"):
        recipe(data_dir=images, resume=True)
    assert not (tmp_path / 'run').exists()


def test_run_is_neither_overwritten_nor_resumed_with_other_settings(recipe, few):
    run = recipe(data_dir=few, **NO_TEST)
    before = {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}
    with pytest.raises(ValueError, match=r"run' holds a run already.*--resume true"):
        recipe(data_dir=few, **NO_TEST)
    with pytest.raises(ValueError, match=r'must keep the settings.*batch_size was 16, is 8'):
        recipe(data_dir=few, resume=True, **{**NO_TEST, 'batch_size': 8})
    assert before == {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}


def test_failure_before_training_leaves_the_output_free(recipe, few):
    """A misspelt name must not make the corrected command fail."""
    with pytest.raises(ValueError, match='Unknown head'):
        recipe(data_dir=few, head='avgg', **NO_TEST)
    assert (recipe(data_dir=few, head='avg', **NO_TEST) / 'metrics.json').exists()
