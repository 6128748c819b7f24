"""metrics.json and the command in it: nothing in them tells of this machine."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict

import pytest
import timm
import torch
import yaml
from conftest import TINY, write_images
from PIL import Image
from run_checks import parse_config

from timm_fisher.training import report
from timm_fisher.training.config import Config
from timm_fisher.training.report import command, draw_curve, head_names


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder like somebody's home, with images and a backbone; not the working directory."""
    folder = tmp_path / 'home' / 'somebody'
    write_images(folder / 'secret-images', train=8, val=3, test=3)
    torch.manual_seed(0)
    backbone = timm.create_model('test_resnet')
    timm.models.save_for_hf(backbone, folder / 'my/tiny', safe_serialization=True)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize('source', ['{home}/my/tiny', 'home/somebody/my/tiny'])
def test_nothing_published_holds_a_path(recipe, home, source):
    run = recipe(
        backbone=f'local-dir:{source.format(home=home)}', pretrained=True,
        data_dir=home / 'secret-images', output=home / 'runs/x', cache_dir=home / 'cache',
        head='sparse_fisher', stages={'only': {'train': 'head', 'epochs': 1}},
    )  # fmt: skip
    published = [run / 'metrics.json', *(run / 'model').iterdir(), *(run / 'last').iterdir()]
    assert {path.name for path in published} >= {'metrics.json', 'config.json'}
    for path in published:
        text = path.read_bytes().decode(errors='ignore')
        for word in ('somebody', 'secret-images', str(home)):
            assert word not in text, path
    metrics = json.loads((run / 'metrics.json').read_text())
    assert metrics['backbone'] == 'local-dir:tiny'
    assert metrics['dataset'] == ''
    assert '--data-dir PATH' in metrics['command']
    assert '--backbone local-dir:tiny' in metrics['command']


def test_data_sets_with_a_name(recipe):
    run = recipe(dataset='digits', stages={'only': {'train': 'classifier', 'epochs': 1}})
    metrics = json.loads((run / 'metrics.json').read_text())
    assert metrics['dataset'] == 'digits'
    assert '--dataset digits' in metrics['command']
    assert '--data-dir' not in metrics['command']


@pytest.mark.parametrize(
    'arguments',
    [
        [],
        ['--head', 'gem', '--head_kwargs.exponent', '2.5'],
        ['--head', 'avg + sparse_fisher@-2', '--head_kwargs', '{code_dim: 64}'],
        ['--augment', '{scale: [0.5, 1.0]}'],  # which depends on the number of workers
    ],
)
def test_command_repeats_a_run(arguments, tmp_path):
    """In one line of a shell it gives the settings that came from a file and from options."""
    file = tmp_path / 'mine.yaml'
    stages = {'a': {'train': 'head', 'lr': 0.5}, 'b': {}}
    file.write_text(yaml.safe_dump({**TINY, 'stages': stages, 'data_dir': str(tmp_path)}))
    of_place = ['--cache_dir', str(tmp_path), '--output', str(tmp_path)]
    weights = ['--backbone', f'local-dir:{tmp_path}/weights', '--seed', '3']
    config = parse_config(['--config', str(file), *arguments, *of_place, *weights])
    text = command(config, 'no', 1)
    assert str(tmp_path) not in text
    words = shlex.split(text.replace('\\\n', ' '))
    assert words[:3] == ['accelerate', 'launch', 'recipes/train.py']
    again = {**asdict(config), 'data_dir': 'PATH', 'backbone': 'local-dir:weights'}
    again |= {key: getattr(Config, key) for key in ('output', 'cache_dir')}
    if config.augment is None:
        again['workers'] = Config.workers
    assert asdict(parse_config(words[3:])) == again
    text = command(config, 'bf16', 2)
    assert 'accelerate launch --num_processes 2 ' in text
    assert '--mixed_precision bf16' in text


@pytest.mark.parametrize(
    ('options', 'names'),
    [
        ({'head': 'avg+sparse_fisher @-2'}, 'avg + sparse_fisher@-2'),
        ({'head': [{'name': 'avg'}, {'name': 'gem', 'stage': -3, 'p': 2.0}]}, 'avg + gem@-3'),
        ({'head': 'gem', 'backbone_stage': -2, 'head_kwargs': {'p': 2.0}}, 'gem@-2'),
    ],
)
def test_names_of_heads(options, names):
    assert head_names(Config(**options)) == names


@pytest.mark.parametrize('supervised', [True, False])
def test_curve(tmp_path, supervised):
    rows = [
        {'stage': name, 'epoch': epoch, 'train_loss': 1.0, 'val_loss': 2.0}
        for name in ('a', 'b')
        for epoch in (1, 2)
    ]
    if supervised:
        rows[-1]['val_accuracy'] = 0.5
    draw_curve(rows, tmp_path / 'curve.png')
    with Image.open(tmp_path / 'curve.png') as picture:
        assert picture.format == 'PNG'
        assert picture.width > 1000


def test_commit_of_the_checkout_alone(tmp_path, monkeypatch):
    """Not of a checkout that the package happens to be installed in."""
    assert report._commit() == report._git('describe', '--always', '--dirty', '--exclude', '*')
    monkeypatch.setattr(report.timm_fisher, '__file__', f'{tmp_path}/.venv/timm_fisher/__init__.py')
    assert report._commit() == ''
