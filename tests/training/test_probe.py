"""Heads and settings trained side by side on cached features."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import TINY

import timm_fisher
from timm_fisher.training.config import Config, Stage
from timm_fisher.training.probe import nearest_neighbours, train_probes
from timm_fisher.training.run import train

HEADS = {
    'avg': {'head': 'avg'},
    'fisher': {'head': 'sparse_fisher', 'head_kwargs': {'reduce_dim': 8, 'code_dim': 4}},
    'netvlad': {'head': 'netvlad', 'head_kwargs': {'reduce_dim': 8, 'clusters': 4}},
    'both': {'head': 'avg + gem@-2', 'backbone_stage': -1},
    'dropcov': {'head': 'dropcov', 'head_kwargs': {'reduce_dim': 6}},
    'mpn_cov': {'head': 'mpn_cov', 'head_kwargs': {'reduce_dim': 6}},
}


def configs(images, folder, epochs=3, **options):
    options = {**TINY, 'data_dir': str(images), 'cache_dir': str(folder / 'cache'), **options}
    made = {}
    for name, head in HEADS.items():
        for part in ('classifier', 'head'):
            if name == 'avg' and part == 'head':
                continue
            for lr in (0.003, 0.03):
                stage = Stage(train=part, epochs=epochs, lr=lr)
                made[f'{name}, {part}, {lr}'] = Config(**{**options, **head}, stages={'s': stage})
    return made


@pytest.fixture(scope='module')
def measured(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp('probes')
    return folder, train_probes(configs(images, folder))


def of(metrics):
    """What does not depend on the clock."""
    kept = ('test', 'best', 'diverged', 'out_features', 'head_parameters', 'steps', 'knn')
    return {key: metrics[key] for key in kept if key in metrics}


def test_a_probe_is_the_same_beside_others(measured, images):
    folder, together = measured
    alone = configs(images, folder)
    for name in ('netvlad, head, 0.003', 'both, head, 0.03', 'dropcov, head, 0.03'):
        assert of(train_probes({name: alone[name]})[name]) == of(together[name])


def test_probes_learn(measured):
    _, metrics = measured
    assert max(row['best']['val_accuracy'] for row in metrics.values()) > 0.8
    assert len({json.dumps(of(row)) for row in metrics.values()}) > len(metrics) // 2
    for name, row in metrics.items():
        assert row['test']['samples'] == 51
        assert 1 <= row['best']['epoch'] <= 3
        assert row['steps'] == 3 * 8
        assert row['seconds']['train'] > 0
        assert ('knn' in row) == ('classifier' in name)
    frozen, trained = (metrics[f'netvlad, {part}, 0.003'] for part in ('classifier', 'head'))
    assert frozen['head_parameters'] == trained['head_parameters']


def test_about_as_good_as_a_run_of_its_own(measured, images, tmp_path):
    """That sees the images in another order."""
    folder, metrics = measured
    name = 'both, head, 0.03'
    config = configs(images, folder)[name]
    config.output = str(tmp_path / 'run')
    alone = train(config)
    assert abs(alone['test']['accuracy'] - metrics[name]['test']['accuracy']) < 0.15
    assert alone['out_features'] == metrics[name]['out_features']
    assert alone['head_parameters'] == metrics[name]['head_parameters']


def test_a_pass_for_all(images, tmp_path, monkeypatch):
    """The backbone runs once for each image, and cached features are read once an epoch."""
    from timm_fisher.training import features, probe

    read, ran = [], []
    get = features.Cached.__getitem__

    def counted(self, i):
        read.append((self.gives, i))
        return get(self, i)

    create = probe.create_model

    def watched(*args):
        model = create(*args)
        model.backbone.conv1[0].register_forward_hook(lambda _, x, y: ran.append(len(x[0])))
        return model

    monkeypatch.setattr(features.Cached, '__getitem__', counted)
    monkeypatch.setattr(probe, 'create_model', watched)
    chosen = {
        name: config
        for name, config in configs(images, tmp_path, epochs=2).items()
        if 'netvlad' in name and 'head' in name
    }
    train_probes(chosen)
    # One more image of each split shows the shapes.
    assert sum(ran) <= 120 + 33 + 51 + 3
    per_split = {'train': 120, 'val': 33, 'test': 51}
    fit, epochs, end = 120 * 2, 2 * (per_split['train'] + per_split['val']), per_split['test']
    assert len(read) <= fit + epochs + end


@pytest.mark.parametrize(('name', 'lr'), [('netvlad', 1e30), ('mpn_cov', 1e10)])
def test_a_rate_that_diverges_does_not_stop_the_others(images, tmp_path, name, lr):
    chosen = configs(images, tmp_path, epochs=2)
    good, bad = chosen['netvlad, head, 0.003'], chosen[f'{name}, head, 0.03']
    options = {'opt': 'sgd', 'lr': lr, 'epochs': 2, 'train': 'head'}
    bad = Config(**{**vars(bad), 'stages': {'s': Stage(**options)}})
    result = train_probes({'good': good, 'bad': bad})
    assert result['bad']['diverged']
    assert 0 < result['bad']['test']['accuracy'] < 1
    assert not result['good']['diverged']
    assert result['good']['steps'] == 16
    assert of(result['good']) == of(train_probes({'good': good})['good'])
    assert of(result['bad']) == of(train_probes({'bad': bad})['bad'])  # none is left


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'img_size': 64}, "'b' has img_size=64, others 32: heads that share a pass must share it"),
        ({'seed': 1}, "'b' has seed=1, others 0"),
        ({'stages': {'s': Stage(train='all')}}, "'b' is no probe: it takes one stage"),
        ({'stages': {'s': Stage(train='head'), 't': Stage(train='head')}}, "'b' is no probe"),
        ({'augment': {}, 'stages': {'s': Stage(train='head')}}, "'b' is no probe"),
        (
            {'stages': {'s': Stage(train='head', sched='plateau')}},
            'probes know neither sched',
        ),
        ({'stages': {'s': Stage(train='head', per_class=4)}}, 'nor per_class'),
    ],
)
def test_what_cannot_share_a_pass(images, tmp_path, change, message):
    good = configs(images, tmp_path)['netvlad, head, 0.003']
    with pytest.raises(ValueError, match=message):
        train_probes({'a': good, 'b': Config(**{**vars(good), **change})})


def test_fit_of_a_share_of_the_images(images, tmp_path, monkeypatch):
    seen = []
    fit = timm_fisher.fit
    monkeypatch.setattr(
        timm_fisher, 'fit', lambda *given, **options: seen.append(fit(*given, **options))
    )
    config = configs(images, tmp_path, epochs=1)['netvlad, head, 0.003']
    train_probes({'a': Config(**{**vars(config), 'max_fit': 50})})
    assert seen == [50]


def test_nearest_neighbours():
    """Against a loop over the queries."""

    class Vectors:
        def __init__(self, number, seed):
            random = np.random.default_rng(seed)
            self.labels = random.integers(0, 3, number)
            self.arrays = [random.normal(size=(number, 4)) + self.labels[:, None]]

    splits = {'train': Vectors(60, 0), 'val': Vectors(30, 1), 'test': Vectors(30, 2)}

    def accuracy(split, k):
        correct = 0
        train, part = splits['train'], splits[split]
        for vector, label in zip(part.arrays[0], part.labels, strict=True):
            lengths = np.linalg.norm(train.arrays[0], axis=1) * np.linalg.norm(vector)
            distances = 1 - train.arrays[0] @ vector / lengths
            votes = np.zeros(3)
            for i in np.argsort(distances)[:k]:
                votes[train.labels[i]] += 1 / distances[i]
            correct += votes.argmax() == label
        return correct / len(part.labels)

    best = max((1, 5, 20), key=lambda k: accuracy('val', k))
    assert nearest_neighbours(splits, 'test') == {'k': best, 'accuracy': accuracy('test', best)}


def test_lars_and_pre_norm(images, tmp_path):
    """The probing protocol's optimizer and norm."""
    stage = Stage(train='head', epochs=10, opt='lars', lr=0.1)
    good = configs(images, tmp_path)['netvlad, head, 0.003']
    probe = Config(**{**vars(good), 'stages': {'s': stage}, 'pre_norm': True})
    metrics = train_probes({'lars': probe})['lars']
    assert metrics['best']['val_accuracy'] > 0.5
    assert torch.isfinite(torch.tensor(metrics['test']['accuracy']))
