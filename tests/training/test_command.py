"""timm_fisher.training.report.command: what a card shows repeats the run."""

from __future__ import annotations

import shlex
from dataclasses import asdict

import pytest
import yaml
from conftest import TINY

from timm_fisher.training.command_line import parse
from timm_fisher.training.config import Config
from timm_fisher.training.report import command


@pytest.mark.parametrize('arguments', [[], ['--head', 'gem', '--head_kwargs.exponent', '2.5']])
def test_command_repeats_a_run(arguments, tmp_path):
    """In one line of a shell it gives the settings that came from a file and from options."""
    file = tmp_path / 'mine.yaml'
    stages = {'a': {'train': 'head', 'lr': 0.5}, 'b': {}}
    file.write_text(yaml.safe_dump({**TINY, 'stages': stages, 'data_dir': str(tmp_path)}))
    of_place = ['--cache_dir', str(tmp_path), '--output', str(tmp_path)]
    weights = ['--backbone', f'local-dir:{tmp_path}/weights', '--seed', '3']
    config = parse(Config, arguments=['--config', str(file), *arguments, *of_place, *weights])
    accelerator = type('', (), {'mixed_precision': 'no', 'num_processes': 1})
    text = command(config, accelerator)
    assert str(tmp_path) not in text
    words = shlex.split(text.replace('\\\n', ' '))
    assert words[:3] == ['accelerate', 'launch', 'recipes/train.py']
    again = {**asdict(config), 'data_dir': 'PATH', 'backbone': 'local-dir:weights'}
    again |= {key: getattr(Config, key) for key in ('output', 'cache_dir')}
    assert asdict(parse(Config, arguments=words[3:])) == again
    accelerator.num_processes, accelerator.mixed_precision = 2, 'bf16'
    text = command(config, accelerator)
    assert 'accelerate launch --num_processes 2 ' in text
    assert '--mixed_precision bf16' in text
