"""How recipes were launched."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from timm_fisher.training.accelerator import use_all_cores


@pytest.mark.parametrize('name', ['FSDP', 'DEEPSPEED', 'MEGATRON_LM', 'PARALLELISM_CONFIG'])
def test_launch_that_shards_the_model_is_refused(recipe, tmp_path, monkeypatch, name):
    monkeypatch.setenv(f'ACCELERATE_USE_{name}', 'True')
    with pytest.raises(ValueError, match=rf'launched with {name}: .* Launch without it'):
        recipe(data_dir=tmp_path)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('environment', 'processes', 'threads'),
    [
        ({}, 1, None),  # not launched
        ({'OMP_NUM_THREADS': '1'}, 1, 6),
        ({'OMP_NUM_THREADS': '1'}, 3, 2),
        ({'OMP_NUM_THREADS': '1'}, 9, 1),
        ({'OMP_NUM_THREADS': '1', 'LOCAL_WORLD_SIZE': '2'}, 8, 3),  # on four machines
        ({'OMP_NUM_THREADS': '4'}, 1, None),  # the user's choice
    ],
)
def test_cores_are_shared_by_the_processes_of_a_machine(
    monkeypatch, environment, processes, threads
):
    for name in ('OMP_NUM_THREADS', 'LOCAL_WORLD_SIZE', 'ACCELERATE_MIXED_PRECISION'):
        monkeypatch.delenv(name, raising=False)
    if environment:
        monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'no')
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(6), raising=False)
    given = []
    monkeypatch.setattr(torch, 'set_num_threads', given.append)
    use_all_cores(SimpleNamespace(device=torch.device('cpu'), num_processes=processes))
    assert given == ([] if threads is None else [threads])
