"""What a stage trains, how, and with which loss."""

from __future__ import annotations

import pytest
import torch
from conftest import write_images
from run_checks import (
    UNSUPERVISED,
    read_log,
    read_metrics,
    read_weights,
)
from torch import nn

import timm_fisher
from timm_fisher.compose import ConcatHeads
from timm_fisher.training.config import Stage
from timm_fisher.training.stages import Unsupervised


def test_unsupervised_fine_tuning_of_gsnmf(recipe, few_images, tmp_path):
    """The basis by the head's rule, the chosen layer by the gradient; nothing else moves."""
    stage = {'train': 'backbone', 'layers': ['layer3'], 'freeze_bn': True, 'unsupervised': True}
    options = {'data_dir': few_images, 'test_split': None, 'head': 'gsnmf', 'batch_size': 24}
    options |= {'head_kwargs': {'components': 6}}

    def train(name, **more):
        stages = {'tune': {'epochs': 4, 'lr': 0.001, **stage, **more}}
        run = recipe(output=tmp_path / name, stages=stages, **options)
        return read_weights(run / 'last'), read_log(run)

    still, still_log = train('still', lr=0.0)
    tuned, log = train('tuned')
    moved = {name for name in tuned if not torch.equal(tuned[name], still[name])}
    assert 'head.basis' in moved
    assert all(name.startswith(('head.basis', 'backbone.layer3.')) for name in moved)
    assert any(name.startswith('backbone.') for name in moved)
    assert log[-1]['train_loss'] < still_log[-1]['train_loss']


@pytest.mark.parametrize(('batch_size', 'steps'), [(10, 2), (24, 1), (30, 1)])
def test_own_rule_sees_whole_batches(recipe, few_images, batch_size, steps):
    """24 images; where they are too few for one batch, they are the batch."""
    stages = {'first': {**UNSUPERVISED, 'epochs': 1}}
    options = {'data_dir': few_images, 'test_split': None, 'head': 'sparse_fisher'}
    run = recipe(**options, stages=stages, batch_size=batch_size)
    assert read_metrics(run)['steps'] == steps


class Centre(timm_fisher.PoolingHead):
    """Its own rule sets a centre; its unsupervised loss is the squared distance from it."""

    def __init__(self, in_features):
        super().__init__()
        self.in_features = self.out_features = in_features
        self.centre = nn.Parameter(torch.zeros(in_features))

    def forward(self, x):
        return x.mean(1)

    def forward_with_loss(self, x):
        return x.mean(1), (x - self.centre).square().sum(-1).mean()

    @torch.no_grad()
    def partial_fit(self, stream):
        total, count = torch.zeros_like(self.centre), torch.zeros(())
        for x in stream.batches():
            total, count = total + x.sum((0, 1)), count + x.shape[0] * x.shape[1]
        total, count = stream.sum(total, count)
        self.centre.copy_(total / count)


@pytest.mark.parametrize('composed', [False, True])
def test_own_rule_comes_before_the_gradient(composed):
    """Each head has its own descriptors; evaluation changes nothing."""
    head = [{'name': 'avg'}, {'name': 'gem', 'stage': -4}] if composed else 'avg'
    torch.manual_seed(0)
    model = timm_fisher.create_model('test_resnet', head, num_classes=0)
    centres = [Centre(head.in_features) for head, _ in model.heads]
    model.head = ConcatHeads(centres, model.head.places) if composed else centres[0]
    images, labels = torch.randn(6, 3, 32, 32), torch.zeros(6)
    module = Unsupervised(model, Stage(), 'images').eval()
    features = model.descriptors.features(model.backbone, images)
    descriptors = model.descriptors(features)
    parts = [descriptors[place] for _, place in model.heads]
    far = sum(part.square().sum(-1).mean() for part in parts)
    torch.testing.assert_close(module(images, labels), far)
    assert not any(centre.centre.any() for centre in centres)

    module = Unsupervised(model, Stage(), 'features').train()
    near = sum((part - part.mean((0, 1))).square().sum(-1).mean() for part in parts)
    torch.testing.assert_close(module(features, labels), near)
    for centre, part in zip(centres, parts, strict=True):
        torch.testing.assert_close(centre.centre, part.mean((0, 1)))


@pytest.mark.parametrize(
    ('head', 'stage', 'message'),
    [
        (
            'avg',
            {'unsupervised': True},
            "Stage 'only' trains nothing: the unsupervised loss of",
        ),
        (
            'sparse_fisher',
            {'train': 'backbone', 'unsupervised': True},
            'does not depend on what train: backbone',
        ),
        (
            'avg',
            {'train': 'head', 'unsupervised': True},
            'nothing to train: the head has no',
        ),
        ('avg', {'layers': ['layer3', 'layr2']}, "no layer 'layr2'. Did you mean 'layer"),
        ('avg', {'layers': ['']}, "no layer ''"),
        ('avg', {'layers': ['layer4']}, "Layer 'layer4' of the backbone has no parameters"),
    ],
    ids=str,
)
def test_stage_that_trains_nothing(recipe, few_images, head, stage, message):
    stages = {'only': {'epochs': 1, **stage}}
    with pytest.raises(ValueError, match=message):
        recipe(data_dir=few_images, test_split=None, head=head, stages=stages)


def test_backbone_that_cannot_be_trained(recipe, few_images):
    stages = {'only': {'train': 'backbone', 'unsupervised': True, 'epochs': 1}}
    with pytest.raises(ValueError, match="'only' has nothing to train: the backbone has no param"):
        recipe(
            data_dir=few_images, test_split=None, head='gsnmf', stages=stages, backbone='pixels',
            backbone_stage=-1, backbone_kwargs={'img_size': 8}, img_size=None,
        )  # fmt: skip


ONE_STEP = {'train': 'all', 'epochs': 1, 'opt': 'momentum', 'momentum': 0.0, 'sched': 'constant'}


@pytest.fixture
def step(recipe, tmp_path):
    """`step(lr=...)` trains on 16 images for one epoch and returns the weights after it."""
    folder = write_images(tmp_path / 'step', train=6, val=1)
    for name in ('blue', 'red'):
        (folder / 'train' / name / '000.png').unlink()

    def run(options=None, *, start=None, **stage):
        count = len(list(tmp_path.glob('step-*')))
        run = recipe(
            output=tmp_path / f'step-{count}',
            data_dir=folder,
            test_split=None,
            stages={'only': {**ONE_STEP, **stage}},
            **(options or {}),
        )
        weights = read_weights(run / 'last')
        return weights if start is None else {k: v - start[k] for k, v in weights.items()}

    return run


def parameters_of(weights, part):
    return {
        name: tensor
        for name, tensor in weights.items()
        if name.startswith(part) and 'running_' not in name and 'num_batches' not in name
    }


def test_gradient_accumulation(step):
    """2 x 8 images are 16 images, without batch norm."""
    start = step(train='head', lr=0.0)
    at_once = step(train='head', lr=1.0, start=start)
    in_two = step({'batch_size': 8, 'grad_accum_steps': 2}, train='head', lr=1.0, start=start)
    half = step({'batch_size': 8}, train='head', lr=1.0, start=start)
    for part in ('classifier.weight', 'classifier.bias'):
        torch.testing.assert_close(in_two[part], at_once[part], atol=1e-6, rtol=1e-5)
        assert (half[part] - at_once[part]).norm() > 0.1 * at_once[part].norm()


@pytest.mark.slow
def test_head_lr_scale(step):
    options = {'head': 'sparse_fisher', 'head_kwargs': {'code_dim': 4}}
    start = step(options, lr=0.0)
    once = step(options, lr=0.1, start=start)
    scaled = step(options, lr=0.1, head_lr_scale=10.0, start=start)
    # project_ cuts the dictionary's atoms back after the step.
    trained = ('classifier.', 'head.reduce.weight', 'head.reduce.bias', 'head.encoder')
    for part in (*trained, 'head.lateral'):
        for name, change in parameters_of(once, part).items():
            assert change.norm() > 0, name
            torch.testing.assert_close(scaled[name], 10 * change, atol=1e-5, rtol=1e-3)
    backbone = parameters_of(once, 'backbone.')
    assert max(change.norm() for change in backbone.values()) > 0
    for name, change in backbone.items():
        assert torch.equal(scaled[name], change), name


@pytest.mark.parametrize(
    ('train', 'trained'),
    [
        ('classifier', {'classifier'}),
        ('head', {'classifier', 'head', 'projection'}),
        ('all', {'classifier', 'head', 'projection', 'backbone'}),
        ('backbone', {'backbone'}),
    ],
)
def test_stage_trains_what_it_says(step, train, trained):
    options = {'head': 'sparse_fisher', 'head_kwargs': {'code_dim': 4}, 'projection': 6}
    start = step(options, train=train, lr=0.0)
    change = step(options, train=train, lr=0.1, start=start)
    for part in ('classifier', 'projection', 'head', 'backbone'):
        moved = [tensor.any().item() for tensor in parameters_of(change, part).values()]
        assert any(moved) == (part in trained), part
    statistics = [tensor for name, tensor in change.items() if 'running_mean' in name]
    assert not any(tensor.any() for tensor in statistics) or train in ('all', 'backbone')


@pytest.mark.parametrize('freeze_bn', [False, True])
def test_layers_that_are_trained(step, freeze_bn):
    """The rest of the backbone keeps its weights and its statistics."""
    names = ['layer2.0', 'layer3']
    start = step(lr=0.0, layers=names, freeze_bn=True)
    change = step(lr=0.1, layers=names, freeze_bn=freeze_bn, start=start)
    for part in ('classifier.', *(f'backbone.{name}.' for name in names)):
        assert any(tensor.any() for tensor in parameters_of(change, part).values()), part
    moved = {name for name, tensor in change.items() if tensor.any()}
    inside = ('classifier.', *(f'backbone.{name}.' for name in names))
    assert all(name.startswith(inside) for name in moved)
    assert any('running_' in name for name in moved) != freeze_bn


@pytest.mark.parametrize('freeze_bn', [False, True])
def test_freeze_bn_keeps_the_statistics(step, freeze_bn):
    start = step(train='head', lr=0.0)
    change = step(train='all', lr=0.1, freeze_bn=freeze_bn, start=start)
    statistics = [tensor for name, tensor in change.items() if 'running_' in name]
    assert any(tensor.any() for tensor in statistics) != freeze_bn
    assert any(tensor.any() for tensor in parameters_of(change, 'backbone.').values())


@pytest.mark.parametrize('accumulate', [1, 2])
def test_clip_grad(step, accumulate):
    options = {'batch_size': 16 // accumulate, 'grad_accum_steps': accumulate}
    start = step(options, lr=0.0)

    def length(**stage):
        change = parameters_of(step(options, lr=1.0, start=start, **stage), '')
        return torch.cat([tensor.flatten() for tensor in change.values()]).norm().item()

    assert length() > 0.1
    assert length(clip_grad=0.01) == pytest.approx(0.01, rel=1e-2)
