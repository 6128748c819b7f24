"""Stages that train for search."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from run_checks import read_log, read_metrics, read_weights

import timm_fisher
from timm_fisher.retrieval import evaluate_retrieval
from timm_fisher.training.config import Stage
from timm_fisher.training.data import load_folder
from timm_fisher.training.metric_learning import MetricLearning, PerClassSampler

STAGE = {
    'train': 'head', 'epochs': 3, 'lr': 0.01, 'per_class': 4,
    'loss': {'name': 'MultiSimilarityLoss', 'alpha': 2.0},
    'miner': {'name': 'MultiSimilarityMiner', 'epsilon': 0.2},
}  # fmt: skip


@pytest.fixture
def noise(tmp_path):
    """Images of three classes that nothing tells apart."""
    random = np.random.default_rng(0)
    for split, count in (('train', 24), ('val', 9), ('test', 9)):
        for name in 'abc':
            folder = tmp_path / 'noise' / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 255, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f'{i}.png')
    return tmp_path / 'noise'


def test_run(recipe, noise):
    """The loss falls, and vectors of the saved model have the recall and MAP@R of the run, also for
    classes that training has not seen."""
    for name in 'abc':
        (noise / 'test' / name).rename(noise / 'test' / f'other {name}')
    stage = {**STAGE, 'lr': 0.05, 'epochs': 5}
    run = recipe(data_dir=noise, projection=6, batch_size=24, stages={'search': stage})
    log, metrics = read_log(run), read_metrics(run)
    assert log[-1]['train_loss'] < log[0]['train_loss']
    recalls = [row['val_recall_at_1'] for row in log]
    assert metrics['best'] == {
        'stage': 'search', 'epoch': 1 + int(np.argmax(recalls)), 'val_recall_at_1': max(recalls)
    }  # fmt: skip
    model = timm.create_model(f'local-dir:{run}/model', pretrained=True)
    assert (model.num_classes, model.head_hidden_size) == (0, 6)
    test = load_folder(str(noise), 'test', None)
    reader = test.dataset.reader
    paths = [reader.filename(i, absolute=True) for i in range(len(test.labels))]
    vectors = timm_fisher.embed(model, paths, workers=0)
    found = evaluate_retrieval(vectors, torch.from_numpy(test.labels), ks=(1,))
    assert 0.1 < found['map_at_r'] < 0.9
    assert metrics['test'] == pytest.approx(
        {
            'recall_at_1': found['recall_at_1'], 'map_at_r': found['map_at_r'],
            'missing_map_at_r': 1 - found['map_at_r'], 'samples': 27,
        },
        abs=1e-3,
    )  # fmt: skip


def test_stage_before_a_classifier(recipe, few_images):
    """The best epoch is one of the last stage, which has accuracies; and the classifier rests until
    then."""
    first = {**STAGE, 'loss': {'name': 'ProxyAnchorLoss'}, 'epochs': 1}
    stages = {'search': first, 'classify': {'train': 'classifier', 'epochs': 1}}
    run = recipe(data_dir=few_images, test_split=None, projection=6, batch_size=12, stages=stages)
    assert read_metrics(run)['best']['stage'] == 'classify'
    assert read_weights(run / 'model')['classifier.weight'].shape == (3, 6)


@pytest.mark.parametrize('name', ['ArcFaceLoss', 'CosFaceLoss', 'SubCenterArcFaceLoss'])
def test_losses_with_weights_of_classes(name):
    """The run says how many, also to a class that hands it on to the one that it is made from."""
    model = timm_fisher.create_model('test_resnet', num_classes=0, projection=6)
    made = MetricLearning(model, Stage(loss={'name': name}), 'pooled', classes=3)
    assert {len(weight) for weight in made.loss.parameters()} == {6}


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'loss': {'name': 'TripletLoss'}}, r"has no 'TripletLoss' among its losses.*Triplet"),
        ({'loss': {'name': 'TripletMarginLoss', 'margn': 1}}, "no argument 'margn'"),
        ({'loss': {'name': 'FastAPLoss', 'num_bins': 'x'}}, 'FastAPLoss does not take'),
        ({'miner': {'name': 'x'}}, "has no 'x' among its miners"),
        ({'per_class': 5}, 'per_class is 5; give a divisor of batch_size, which is 24'),
        ({'per_class': -4}, 'per_class is -4; give a divisor'),
        ({'label_smoothing': 0.1}, 'head_loss 0 and label_smoothing 0.1: give 0'),
        ({'train': 'classifier'}, 'trains no classifier'),
        ({'loss': {}}, 'has a miner, but no loss'),
    ],
)
def test_mistakes(recipe, few_images, options, message, capsys):
    options = {'data_dir': few_images, 'test_split': None, 'stages': {'s': {**STAGE, **options}}}
    with pytest.raises((ValueError, TypeError, SystemExit)) as error:
        recipe(batch_size=24, projection=6, **options)
    said = capsys.readouterr()
    assert re.search(message, f'{error.value} {said.err}')
    assert 'fit:' not in said.out


def test_batches():
    """So many of a class follow each other, classes take turns, and every image has its turn; the
    order depends on seed and epoch alone."""
    labels = np.repeat([3, 1, 7], [20, 20, 3])
    sampler = PerClassSampler(labels, 4, 8, seed=0)
    order = list(sampler)
    assert len(order) == len(sampler) == 40
    groups = labels[order].reshape(-1, 4)
    assert (groups == groups[:, :1]).all()
    turns = Counter(groups[:9, 0].tolist())
    assert set(turns.values()) == {3}
    taken = Counter(order)
    assert all(taken[i] for i in range(40, 43))  # of the small class, again and again
    assert max(taken[i] for i in range(40)) == 1
    assert list(PerClassSampler(labels, 4, 8, seed=0)) == order
    sampler.set_epoch(1)
    assert list(sampler) != order
    assert list(PerClassSampler(labels, 4, 8, seed=1)) != order


def test_loss_is_computed_in_float32():
    """In bf16 the similarities of vectors that lie close together would be rounded: so would what a
    miner keeps, and the gradients."""
    torch.manual_seed(0)
    model = timm_fisher.create_model('test_resnet', num_classes=0, img_size=32)
    stage = Stage(
        train='head', loss={'name': 'MultiSimilarityLoss'},
        miner={'name': 'MultiSimilarityMiner', 'epsilon': 0.02},
    )  # fmt: skip
    objective = MetricLearning(model, stage, 'pooled', 4)
    x = torch.randn(64, model.head_hidden_size) * 0.3 + 1
    y = torch.arange(64) % 4

    def gradient(autocast):
        given = x.clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            loss = objective([given], y)
        loss.backward()
        return given.grad

    expected = gradient(False)
    error = (gradient(True) - expected).norm() / expected.norm()
    assert error < 1e-4
