"""Settings from a file and from arguments: what is wrong is named."""

from __future__ import annotations

import json

import pytest
import yaml
from run_checks import (
    parse_config,
)

from timm_fisher.training.config import Stage


@pytest.mark.parametrize(
    'stage',
    [
        {'train': 'classifier', 'unsupervised': True},
        {'train': 'head', 'layers': ['layer4']},
        {'train': 'classifier', 'layers': ['layer4']},
    ],
    ids=str,
)
def test_stage_that_contradicts_itself(capsys, stage):
    with pytest.raises(SystemExit):
        parse_config([f'--stages={json.dumps({"only": stage})}'])
    assert 'stages.only' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'head': 'sparse_fishr'}, "Unknown head 'sparse_fishr'.*'sparse_fisher'"),
        ({'backbone': 'test_resnt'}, "Unknown backbone 'test_resnt'.*'test_resnet'"),
        ({'backbone_stage': -9}, 'stage=-9 does not exist'),
    ],
)
def test_unknown_value(recipe, images, options, message):
    with pytest.raises(ValueError, match=message):
        recipe(data_dir=images, **options)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'head_kwargs': {'code_dimm': 3}}, "no argument 'code_dimm'.*'code_dim'"),
        ({'head_kwargs.code_dimm': 3}, "no argument 'code_dimm'.*'code_dim'"),
        ({'augment': {'scal': 3}}, "no argument 'scal'.*'scale'"),
    ],
)
def test_unknown_argument(recipe, images, options, message):
    with pytest.raises(TypeError, match=message):
        recipe(data_dir=images, head='sparse_fisher', **options)


BAD_SETTINGS = [
    # given, and what the message must name
    ({'hed': 'avg'}, "'head'"),
    ({'whiten': 7}, 'whiten is 7; give 0 to 1'),
    ({'whiten': 0.5}, 'whiten is 0.5, but there is no projection'),
    ({'batch_size': 0}, 'batch_size is 0; give 1 or more'),
    ({'grad_accum_steps': 0}, 'grad_accum_steps is 0; give 1 or more'),
    ({'stages': {'only': {'epoch': 3}}}, "'epochs'"),
    ({'batch_size': 'many'}, 'batch_size'),
    ({'backbone_stage': 1.5}, 'backbone_stage'),
    ({'class_token': 'kep'}, 'keep'),
    ({'head_kwargs': 3}, 'head_kwargs'),
    ({'stages': {'only': {'train': 'haed'}}}, 'head'),
    ({'stages': {'only': {'sched': 'cosin'}}}, 'cosine'),
    ({'stages': {'only': {'lr': 'fast'}}}, 'lr'),
    ({'max_train': 0}, 'max_train'),
    ({'fold': 2}, 'Give folds'),
    ({'folds': 3}, 'only an .npz file'),
]


@pytest.mark.parametrize(('settings', 'named'), BAD_SETTINGS, ids=lambda value: str(value))
@pytest.mark.parametrize('source', ['argument', 'file'])
def test_unknown_key_and_wrong_type(tmp_path, capsys, source, settings, named):
    file = tmp_path / 'config.yaml'
    file.write_text(yaml.safe_dump(settings))
    arguments = [f'--{key}={json.dumps(value)}' for key, value in settings.items()]
    with pytest.raises(SystemExit) as stopped:
        parse_config(arguments if source == 'argument' else [f'--config={file}'])
    assert stopped.value.code not in (0, None)
    assert named in capsys.readouterr().err


@pytest.mark.parametrize('key', ['stages.only.epoch', 'stages.only.head-lr-scal'])
def test_unknown_nested_argument(tmp_path, capsys, key):
    file = tmp_path / 'config.yaml'
    file.write_text('stages: {only: {epochs: 1}}')
    with pytest.raises(SystemExit) as stopped:
        parse_config([f'--config={file}', f'--{key}=3'])
    assert stopped.value.code not in (0, None)
    assert {'stages.only.epoch': "'epochs'", 'stages.only.head-lr-scal': "'head_lr_scale'"}[
        key
    ] in capsys.readouterr().err


def test_arguments_override_the_file(tmp_path):
    """The twin of the errors above: what is right is taken."""
    file = tmp_path / 'config.yaml'
    file.write_text('{head: avg, batch_size: 3, stages: {only: {epochs: 1, lr: 0.5}}}')
    config = parse_config(
        [f'--config={file}', '--batch-size=4', '--stages.only.epochs', '2', '--augment={}']
    )
    assert (config.head, config.batch_size, config.augment) == ('avg', 4, {})
    assert config.stages == {'only': Stage(epochs=2, lr=0.5)}
    file.write_text(config.to_yaml())
    assert parse_config([f'--config={file}']) == config
