"""What a training run leaves, read back: shared by the tests of training."""

from __future__ import annotations

import json
from pathlib import Path

import distributed_checks
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from small_models import backbone_of
from torch.utils.data import DataLoader

import timm_fisher
from timm_fisher.training.command_line import parse
from timm_fisher.training.config import Config, Stage

HEADS = timm_fisher.list_heads()
COMPOSED = [{'name': 'avg', 'stage': -4}, {'name': 'sparse_fisher', 'code_dim': 4}]
TWO_STAGES = {
    'warm': {'train': 'head', 'epochs': 2, 'lr': 0.01, 'head_loss': 0.1},
    'tune': {'train': 'all', 'epochs': 1, 'lr': 0.001, 'clip_grad': 1.0},
}
# Labels come late.
UNSUPERVISED = {'train': 'head', 'epochs': 2, 'lr': 0.01, 'unsupervised': True}
UNSUPERVISED_FIRST = {
    'first': UNSUPERVISED,
    'tune': {'train': 'all', 'epochs': 1, 'lr': 0.001, 'layers': ['layer3', 'layer2.0']},
}


def slow(*values):
    """A parameter that is left out by default."""
    return pytest.param(*values, marks=pytest.mark.slow)


def small(head):
    """Arguments that suit a handful of descriptors."""
    return distributed_checks.SMALL.get(head, {}) if isinstance(head, str) else {}


def place(head):
    """Options of a run that a head needs."""
    if backbone_of(head) == 'test_resnet':
        return {}
    return {'backbone': 'test_vit', 'backbone_stage': -1}


def parse_config(arguments):
    return parse(Config, arguments=arguments)


def finish(process):
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text
    return text


def read_weights(folder):
    return safetensors.torch.load_file(Path(folder, 'model.safetensors'))


def is_finite(folder):
    return all(tensor.isfinite().all() for tensor in read_weights(folder).values())


def read_metrics(run):
    metrics = json.loads((run / 'metrics.json').read_text())
    del metrics['seconds'], metrics['peak_memory_mb']
    return metrics


def read_log(run):
    rows = [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()]
    for row in rows:
        del row['seconds']
    return rows


def by_plain_timm(folder, images, split):
    """Model and data set of a stranger who has the folder and timm."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return model, timm.data.create_dataset('', images, split=split, transform=transform)


def accuracy_by_plain_timm(folder, images, split):
    model, dataset = by_plain_timm(folder, images, split)
    with torch.no_grad():
        right = [model(x).argmax(1) == y for x, y in DataLoader(dataset, batch_size=17)]
    return torch.cat(right).double().mean().item()


def cross_entropy_by_plain_timm(folder, images, split):
    model, dataset = by_plain_timm(folder, images, split)
    with torch.no_grad():
        losses = [F.cross_entropy(model(x[None]), torch.tensor([y])) for x, y in dataset]
    return torch.stack(losses).double().mean().item()


def unsupervised_loss_by_plain_timm(folder, images, split):
    model, dataset = by_plain_timm(folder, images, split)
    with torch.no_grad():
        losses = [model.forward_with_loss(x[None])[1] for x, _ in dataset]
    return torch.stack(losses).double().mean().item()


def check_run(run, images, *, head, stages=TWO_STAGES, processes=1):
    """Everything that a run leaves."""
    metrics = json.loads((run / 'metrics.json').read_text())
    count = len(list((images / 'test').glob('*/*.png')))
    assert metrics['test']['samples'] == count == 51
    assert metrics['head'] == head
    assert metrics['backbone'] == backbone_of(head)
    assert metrics['processes'] == processes
    assert set(metrics['seconds']) == {'features', 'fit', 'train'}
    for key in ('head_kwargs', 'img_size', 'seed', 'versions', 'device', 'backbone_stage'):
        assert key in metrics

    log = read_log(run)
    epochs = [(name, i + 1) for name in stages for i in range(stages[name]['epochs'])]
    assert [(row['stage'], row['epoch']) for row in log] == epochs
    best = max(log, key=lambda row: row.get('val_accuracy', -1))  # the first one of equals
    assert metrics['best'] == {key: best[key] for key in ('stage', 'epoch', 'val_accuracy')}
    with Image.open(run / 'curve.png') as curve:
        assert curve.format == 'PNG'
        curve.load()

    file = run / 'config.yaml'
    config = parse_config([f'--config={file}'])
    assert config.head == head
    assert config.stages == {name: Stage(**stage) for name, stage in stages.items()}
    assert config.to_yaml() == file.read_text()

    # Far above chance, so that equality says something.
    assert metrics['test']['accuracy'] > 0.5
    assert accuracy_by_plain_timm(run / 'model', images, 'test') == metrics['test']['accuracy']
    assert accuracy_by_plain_timm(run / 'model', images, 'val') == best['val_accuracy']
    assert accuracy_by_plain_timm(run / 'last', images, 'val') == log[-1]['val_accuracy']
    model = timm.create_model(f'local-dir:{run}/last', pretrained=True)
    assert sum(p.numel() for p in model.parameters()) == metrics['parameters']
    assert model.head_hidden_size == metrics['out_features']


def check_same_runs(run, expected):
    assert read_metrics(run) == read_metrics(expected)
    assert read_log(run) == read_log(expected)
    for folder in ('model', 'last'):
        file = f'{folder}/model.safetensors'
        assert (run / file).read_bytes() == (expected / file).read_bytes(), folder
