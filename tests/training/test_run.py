"""What a run leaves, with labels and without; and failures in the middle of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY
from run_checks import (
    COMPOSED,
    HEADS,
    TWO_STAGES,
    UNSUPERVISED,
    UNSUPERVISED_FIRST,
    accuracy_by_plain_timm,
    check_run,
    finish,
    is_finite,
    place,
    read_log,
    read_metrics,
    read_weights,
    slow,
    small,
    unsupervised_loss_by_plain_timm,
)

from timm_fisher.training import data


@pytest.mark.parametrize(
    'head',
    [
        'sparse_fisher',
        'gsnmf',
        COMPOSED,
        *(slow(h) for h in HEADS if h not in ('sparse_fisher', 'gsnmf')),
    ],
    ids=str,
)
def test_run_leaves_everything(recipe, images, head):
    options = {'head': head, 'head_kwargs': small(head), **place(head)}
    run = recipe(data_dir=images, stages=TWO_STAGES, **options)
    check_run(run, images, head=head)


@pytest.mark.slow
@pytest.mark.parametrize('head', HEADS)
def test_every_head_through_the_launcher(launch, images, tmp_path, head):
    options = {**TINY, 'data_dir': images, 'stages': TWO_STAGES, 'head': head}
    options |= {'head_kwargs': small(head), **place(head)}
    finish(launch(output=tmp_path / 'run', cache_dir=tmp_path / 'cache', **options))
    check_run(tmp_path / 'run', images, head=head)


def test_run_on_the_embedded_digits(recipe):
    stages = {'only': {'train': 'head', 'epochs': 1, 'lr': 0.001}}
    run = recipe(dataset='digits', head='sparse_fisher', stages=stages)
    metrics = read_metrics(run)
    assert metrics['test']['samples'] == 450
    assert metrics['test']['accuracy'] > 0.5


@pytest.mark.parametrize(
    'config',
    [
        path
        for path in sorted(ROOT.glob('recipes/configs/*.yaml'))
        if 'recipes/train.py' in path.read_text()
    ],
    ids=lambda path: path.stem,
)
def test_config(recipe, few_images, config):
    """Each configuration runs: here on a small backbone, one epoch a stage."""
    settings = yaml.safe_load(config.read_text())
    stages = list(settings['stages'])
    options = {'data_dir': few_images, 'dataset': '', 'test_split': None, 'pretrained': False}
    if '@' in settings.get('head', ''):
        options['backbone_stage'] = -1
    options |= {'val_fraction': 0.2, 'last_stride': None}  # four images; no such backbone
    options |= {f'stages.{name}.epochs': 1 for name in stages}
    run = recipe('--config', str(config), **options)
    assert [row['stage'] for row in read_log(run)] == stages
    assert read_metrics(run)['head'] == settings.get('head', 'avg')


def test_run_without_labels(recipe, images):
    """It ends with the last epoch, without a classifier; its result is the unsupervised loss."""
    stages = {'first': {**UNSUPERVISED, 'epochs': 3}}
    run = recipe(data_dir=images, head='sparse_fisher', head_kwargs={'code_dim': 4}, stages=stages)
    log, metrics = read_log(run), read_metrics(run)
    losses = [row['val_loss'] for row in log]
    assert losses == sorted(losses, reverse=True)
    assert [set(row) for row in log] == [{'stage', 'epoch', 'lr', 'train_loss', 'val_loss'}] * 3
    assert metrics['best'] == {'stage': 'first', 'epoch': 3, 'val_loss': losses[-1]}
    for folder in ('model', 'last'):
        expected = unsupervised_loss_by_plain_timm(run / folder, images, 'test')
        assert metrics['test']['unsupervised_loss'] == pytest.approx(expected, rel=1e-5)
        assert metrics['test']['samples'] == 51
        assert not any(name.startswith('classifier') for name in read_weights(run / folder))
    assert losses[-1] == pytest.approx(
        unsupervised_loss_by_plain_timm(run / 'last', images, 'val'), rel=1e-5
    )
    assert json.loads((run / 'model/config.json').read_text())['num_classes'] == 0


def test_labels_decide_once_they_are_read(recipe, images):
    run = recipe(
        data_dir=images,
        head='sparse_fisher',
        head_kwargs={'code_dim': 4},
        stages=UNSUPERVISED_FIRST,
    )
    log, metrics = read_log(run), read_metrics(run)
    assert ['val_accuracy' in row for row in log] == [False, False, True]
    assert metrics['best'] == {'stage': 'tune', 'epoch': 1, 'val_accuracy': log[2]['val_accuracy']}
    assert accuracy_by_plain_timm(run / 'model', images, 'test') == metrics['test']['accuracy']


def test_no_label_is_read(recipe, few_images, tmp_path, monkeypatch):
    """Whatever the labels are, and with images of one class: the same model."""
    options = {'data_dir': few_images, 'test_split': None, 'head': 'sparse_fisher'}
    options |= {'stages': {'first': UNSUPERVISED}, 'val_split': None, 'val_fraction': 0.2}
    expected = recipe(output=tmp_path / 'expected', **options)
    load_timm = data._load_timm
    for labels in ('garbage', 'one class'):

        def load(config, labels=labels):
            splits, classes = load_timm(config)
            y = splits['train'].labels
            y[:] = 0 if labels == 'one class' else range(-2, len(y) - 2)
            return splits, classes[:1] if labels == 'one class' else classes

        monkeypatch.setattr(data, '_load_timm', load)
        run = recipe(output=tmp_path / labels, **options)
        trained, weights = read_weights(run / 'model'), read_weights(expected / 'model')
        assert all(torch.equal(trained[name], weights[name]) for name in weights)


def test_run_on_arrays_without_labels(recipe, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32), dtype=np.uint8)
    np.savez(tmp_path / 'images.npz', x=pixels)
    options = {'dataset': 'npz', 'data_dir': tmp_path / 'images.npz', 'head': 'sparse_fisher'}
    run = recipe(**options, stages={'first': UNSUPERVISED})
    assert read_metrics(run)['test']['samples'] == 10
    with pytest.raises(ValueError, match="has no array 'y'"):
        recipe(**options, output=tmp_path / 'labelled', stages=UNSUPERVISED_FIRST)


def test_loss_that_is_not_finite(recipe, images, tmp_path):
    stages = {
        'warm': {'train': 'head', 'epochs': 2},
        'burn': {'train': 'all', 'epochs': 1, 'opt': 'sgd', 'lr': 1e30, 'sched': 'constant'},
    }
    with pytest.raises(
        FloatingPointError, match=r'The loss is \S+ in stage burn, epoch 1, step [2-8]\.'
    ) as error:
        recipe(data_dir=images, stages=stages)
    checkpoint = tmp_path / 'run/checkpoint-0002'
    assert f'Last good checkpoint: {checkpoint}.' in str(error.value)
    assert is_finite(checkpoint / 'model')
    assert not (tmp_path / 'run/metrics.json').exists()


@pytest.mark.parametrize('epochs', [1, 2])
def test_weights_that_the_last_step_of_an_epoch_ruins(recipe, few, tmp_path, epochs):
    """One step per epoch: the step's loss is fine, what it leaves is not."""
    stages = {
        'burn': {'train': 'all', 'epochs': epochs, 'opt': 'sgd', 'lr': 1e38, 'sched': 'constant'}
    }
    with pytest.raises(FloatingPointError, match='Last good checkpoint: none'):
        recipe(data_dir=few, stages=stages, test_split=None)
    assert not list((tmp_path / 'run').glob('checkpoint-*'))
