"""recipes/train.py: what a run leaves, resumes, caches and shares out over processes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path

import distributed_checks
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import yaml
from conftest import ROOT, TINY, write_images
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import timm_fisher
from timm_fisher.compose import ConcatHeads


def slow(*values):
    """A parameter that is left out by default."""
    return pytest.param(*values, marks=pytest.mark.slow)


HEADS = timm_fisher.list_heads()
COMPOSED = [{'name': 'avg', 'stage': -4}, {'name': 'sparse_fisher', 'code_dim': 4}]
ONE_STEP = {'train': 'all', 'epochs': 1, 'opt': 'momentum', 'momentum': 0.0, 'sched': 'constant'}


def small(head):
    """Arguments that suit a handful of descriptors."""
    return distributed_checks.SMALL.get(head, {}) if isinstance(head, str) else {}


def finish(process):
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text


def read_weights(folder):
    return safetensors.torch.load_file(Path(folder, 'model.safetensors'))


def read_metrics(run):
    metrics = json.loads((run / 'metrics.json').read_text())
    del metrics['seconds'], metrics['peak_memory_mb']
    return metrics


def read_log(run):
    rows = [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()]
    for row in rows:
        del row['seconds']
    return rows


def accuracy_by_plain_timm(folder, images, split):
    """As a stranger would compute it, who has the folder and timm."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    dataset = timm.data.create_dataset('', images, split=split, transform=transform)
    with torch.no_grad():
        right = [model(x).argmax(1) == y for x, y in DataLoader(dataset, batch_size=17)]
    return torch.cat(right).double().mean().item()


def own_loss_by_plain_timm(folder, images, split):
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    dataset = timm.data.create_dataset('', images, split=split, transform=transform)
    with torch.no_grad():
        losses = [model(x[None], head_loss=True)[1] for x, _ in dataset]
    return torch.stack(losses).double().mean().item()


@pytest.fixture
def few_images(tmp_path):
    """24 training images, 9 for validation."""
    return write_images(tmp_path / 'few', train=8, val=3)


# A whole run

TWO_STAGES = {
    'warm': {'train': 'head', 'epochs': 2, 'lr': 0.01, 'head_loss': 0.1},
    'tune': {'train': 'all', 'epochs': 1, 'lr': 0.001, 'clip_grad': 1.0},
}


def check_run(run, images, recipes, *, head, stages=TWO_STAGES, processes=1):
    metrics = json.loads((run / 'metrics.json').read_text())
    count = len(list((images / 'test').glob('*/*.png')))
    assert metrics['test']['samples'] == count == 51
    assert metrics['head'] == head
    assert metrics['backbone'] == 'test_resnet'
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
    config = recipes.config.parse_config([f'--config={file}'])
    assert config.head == head
    assert config.stages == {key: recipes.config.Stage(**each) for key, each in stages.items()}
    assert config.to_yaml() == file.read_text()

    # Far above chance, so that equality says something.
    assert metrics['test']['accuracy'] > 0.5
    assert accuracy_by_plain_timm(run / 'model', images, 'test') == metrics['test']['accuracy']
    assert accuracy_by_plain_timm(run / 'model', images, 'val') == best['val_accuracy']
    assert accuracy_by_plain_timm(run / 'last', images, 'val') == log[-1]['val_accuracy']
    model = timm.create_model(f'local-dir:{run}/last', pretrained=True)
    assert sum(p.numel() for p in model.parameters()) == metrics['parameters']
    assert model.head_hidden_size == metrics['out_features']


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
def test_run_leaves_everything(recipe, recipes, images, head):
    run = recipe(data_dir=images, head=head, head_kwargs=small(head), stages=TWO_STAGES)
    check_run(run, images, recipes, head=head)


@pytest.mark.slow
@pytest.mark.parametrize('head', HEADS)
def test_every_head_through_the_launcher(launch, recipes, images, tmp_path, head):
    options = {**TINY, 'data_dir': images, 'stages': TWO_STAGES, 'head': head}
    options['head_kwargs'] = small(head)
    finish(launch(output=tmp_path / 'run', cache_dir=tmp_path / 'cache', **options))
    check_run(tmp_path / 'run', images, recipes, head=head)


def test_run_on_the_embedded_digits(recipe):
    stages = {'only': {'train': 'head', 'epochs': 1, 'lr': 0.001}}
    run = recipe(dataset='digits', head='sparse_fisher', stages=stages)
    metrics = read_metrics(run)
    assert metrics['test']['samples'] == 450
    assert metrics['test']['accuracy'] > 0.5


# Resuming

# Augmentation and dropout draw random numbers on the way, in processes of their own too; momentum
# and plateau have a memory. The first learning rate is too high, so that plateau has to lower it.
MEMORY = {
    'head': 'sparse_fisher',
    'head_kwargs': {'code_dim': 4},
    'augment': {'auto_augment': 'rand-m5-n2'},
    'drop_rate': 0.3,
    'workers': 2,
    'stages': {
        'warm': {'train': 'head', 'epochs': 4, 'opt': 'sgd', 'lr': 1.0, 'head_loss': 0.1,
                 'sched': 'plateau', 'patience_epochs': 0, 'decay_rate': 0.1, 'clip_grad': 1.0},
        'tune': {'train': 'all', 'epochs': 4, 'lr': 0.001, 'head_lr_scale': 2.0,
                 'warmup_epochs': 1, 'weight_decay': 0.05},
    },
}  # fmt: skip


def check_same_runs(run, expected):
    assert read_metrics(run) == read_metrics(expected)
    assert read_log(run) == read_log(expected)
    for folder in ('model', 'last'):
        file = f'{folder}/model.safetensors'
        assert (run / file).read_bytes() == (expected / file).read_bytes(), folder


def kill_after(process, run, epochs):
    """SIGKILL to launcher, recipe and workers, at a random moment after so many epochs."""
    log, delay = run / 'log.jsonl', random.uniform(0, 0.4)
    while process.poll() is None and not (
        log.exists() and len(log.read_text().splitlines()) >= epochs
    ):
        time.sleep(0.005)
    time.sleep(delay)
    assert process.poll() is None, process.communicate()[0]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    print(f'killed {delay:.3f} s after epoch {epochs}')
    assert not (run / 'metrics.json').exists()


@pytest.fixture(scope='module')
def launched(launch, images, tmp_path_factory):
    """A whole run through the launcher; and one killed in the second stage, and resumed."""
    folder = tmp_path_factory.mktemp('launched')
    options = {**TINY, 'data_dir': images, **MEMORY}
    runs = {name: folder / name for name in ('whole', 'killed')}
    whole, killed = (launch(output=run, **options) for run in runs.values())
    kill_after(killed, runs['killed'], epochs=5)
    finish(launch(output=runs['killed'], resume=True, **options))
    finish(whole)
    return runs


def test_run_through_the_launcher(launched, recipes, images):
    stages = MEMORY['stages']
    check_run(launched['whole'], images, recipes, head='sparse_fisher', stages=stages)
    with Image.open(launched['whole'] / 'curve.png') as curve:
        assert curve.width > 1000


def test_killed_run_resumes_exactly(launched):
    rates = [row['lr'] for row in read_log(launched['whole'])]
    assert min(rates[:4]) < rates[0], 'plateau never changed the rate: nothing to remember'
    check_same_runs(launched['killed'], launched['whole'])


@pytest.mark.slow
def test_run_killed_in_each_stage_resumes_exactly(launched, launch, images, tmp_path):
    options = {**TINY, 'data_dir': images, **MEMORY, 'output': tmp_path / 'run'}
    kill_after(launch(**options), tmp_path / 'run', epochs=1)
    kill_after(launch(resume=True, **options), tmp_path / 'run', epochs=5)
    finish(launch(resume=True, **options))
    check_same_runs(tmp_path / 'run', launched['whole'])


class Killed(BaseException):
    """Stands for SIGKILL within a process: nothing in the recipe catches it."""


@pytest.fixture
def stop(recipe, tmp_path, monkeypatch):
    """`stop(owner, name, when, **options)` runs until `owner.name(...)` is called and
    `when(*arguments)` holds, and then resumes."""

    def run(owner, name, when, **options):
        original = getattr(owner, name)
        stopped = False

        def stopping(*arguments):
            nonlocal stopped
            if when(*arguments):
                stopped = True
                raise Killed
            return original(*arguments)

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(owner, name, stopping)
            recipe(**options)
        assert stopped
        return recipe(resume=True, **options)

    return run


# Labels come late, or never.
OWN = {
    'own': {'train': 'head', 'epochs': 2, 'lr': 0.01, 'unsupervised': True},
    'tune': {'train': 'all', 'epochs': 1, 'lr': 0.001, 'layers': ['layer3', 'layer2.0']},
}


@pytest.mark.parametrize(
    ('change', 'steps'),
    [
        slow({}, (2, 8, 14, 24)),
        ({'stages': OWN}, (5, 8)),
        ({'stages': {'own': OWN['own']}}, (5,)),
        # A head with a rule of its own; one that is trained through its forward.
        (
            {
                'head': 'gsnmf',
                'head_kwargs': {'components': 8},
                'stages': {'own': {**OWN['own'], 'train': 'backbone'}},
            },
            (5,),
        ),
        (
            {
                'head': 'dbm_idfk',
                'head_kwargs': distributed_checks.SMALL['dbm_idfk'],
                'stages': {'tune': {'train': 'all', 'epochs': 2, 'lr': 0.001, 'momentum': 0.5}},
            },
            (5,),
        ),
    ],
    ids=['memory', 'own and tune', 'own', 'gsnmf', 'dbm_idfk'],
)
def test_run_stopped_at_a_step_resumes_exactly(recipe, stop, few_images, tmp_path, change, steps):
    """Before any checkpoint, in the first stage, in the first and in the last epoch of the second:
    3 steps an epoch, 4 + 4 epochs."""
    options = {**MEMORY, 'data_dir': few_images, 'test_split': None, 'workers': 0, 'batch_size': 8}
    options |= change
    expected = recipe(output=tmp_path / 'expected', **options)
    for step in steps:
        steps = iter(range(1, 100))
        output = tmp_path / f'step-{step}'
        run = stop(
            timm_fisher.PooledModel,
            'project_',
            lambda model, steps=steps, step=step: next(steps) == step,
            output=output,
            **options,
        )
        check_same_runs(run, expected)


@pytest.mark.parametrize('epoch', [1, slow(3)])
def test_run_stopped_while_it_saves(recipe, recipes, stop, few_images, tmp_path, epoch):
    """In the checkpoint, before the log, before the rename; epoch 3 ends a stage, with a curve."""
    options = {'data_dir': few_images, 'stages': TWO_STAGES, 'test_split': None}
    expected = recipe(output=tmp_path / 'expected', **options)
    name = f'checkpoint-{epoch:04d}'
    moments = {
        'model': (recipes.train.Run, '_save_model', lambda run, path: name in str(path)),
        'progress': (recipes.train, 'write', lambda path, text: name in str(path)),
        'log': (
            recipes.train,
            'write',
            lambda path, text: path.name == 'log.jsonl' and text.count('\n') == epoch,
        ),
    }
    if epoch == 3:
        moments['curve'] = (recipes.train, '_plot', lambda history, path: len(history) == 3)
    for moment, where in moments.items():
        run = stop(*where, output=tmp_path / moment, **options)
        check_same_runs(run, expected)
        assert (run / 'curve.png').exists()
        assert {path.name for path in run.iterdir() if path.name != f'checkpoint-{3:04d}'} == {
            path.name for path in expected.iterdir() if path.name != f'checkpoint-{3:04d}'
        }


def test_finished_run_resumes_to_itself(recipe, few_images):
    options = {'data_dir': few_images, 'stages': TWO_STAGES, 'test_split': None}
    run = recipe(**options)
    before = read_metrics(run), read_log(run), read_weights(run / 'model')
    recipe(resume=True, **options)
    after = read_metrics(run), read_log(run), read_weights(run / 'model')
    assert before[:2] == after[:2]
    assert all(torch.equal(before[2][name], after[2][name]) for name in before[2])


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
    stages = list(yaml.safe_load(config.read_text())['stages'])
    options = {'data_dir': few_images, 'dataset': '', 'test_split': None, 'pretrained': False}
    options |= {'val_fraction': 0.2, 'last_stride': None}  # four images; no such backbone
    options |= {f'stages.{name}.epochs': 1 for name in stages}
    run = recipe('--config', str(config), **options)
    assert [row['stage'] for row in read_log(run)] == stages


# Unsupervised stages


def test_run_without_labels(recipe, images):
    """It ends with the last epoch, without a classifier; its result is the own loss."""
    stages = {'own': {**OWN['own'], 'epochs': 3}}
    run = recipe(data_dir=images, head='sparse_fisher', head_kwargs={'code_dim': 4}, stages=stages)
    log, metrics = read_log(run), read_metrics(run)
    losses = [row['val_loss'] for row in log]
    assert losses == sorted(losses, reverse=True)
    assert [set(row) for row in log] == [{'stage', 'epoch', 'lr', 'train_loss', 'val_loss'}] * 3
    assert metrics['best'] == {'stage': 'own', 'epoch': 3, 'val_loss': losses[-1]}
    for folder in ('model', 'last'):
        expected = own_loss_by_plain_timm(run / folder, images, 'test')
        assert metrics['test'] == {'own_loss': pytest.approx(expected, rel=1e-5), 'samples': 51}
        assert not any(name.startswith('classifier') for name in read_weights(run / folder))
    assert losses[-1] == pytest.approx(
        own_loss_by_plain_timm(run / 'last', images, 'val'), rel=1e-5
    )
    assert json.loads((run / 'model/config.json').read_text())['num_classes'] == 0


def test_labels_decide_once_they_are_read(recipe, images):
    run = recipe(data_dir=images, head='sparse_fisher', head_kwargs={'code_dim': 4}, stages=OWN)
    log, metrics = read_log(run), read_metrics(run)
    assert ['val_accuracy' in row for row in log] == [False, False, True]
    assert metrics['best'] == {'stage': 'tune', 'epoch': 1, 'val_accuracy': log[2]['val_accuracy']}
    assert accuracy_by_plain_timm(run / 'model', images, 'test') == metrics['test']['accuracy']


def test_no_label_is_read(recipe, recipes, few_images, tmp_path, monkeypatch):
    """Whatever the labels are, and with images of one class: the same model."""
    options = {'data_dir': few_images, 'test_split': None, 'head': 'sparse_fisher'}
    options |= {'stages': {'own': OWN['own']}, 'val_split': None, 'val_fraction': 0.2}
    expected = recipe(output=tmp_path / 'expected', **options)
    load_timm = recipes.data._load_timm
    for labels in ('garbage', 'one class'):

        def load(config, labels=labels):
            splits, classes = load_timm(config)
            y = splits['train'].labels
            y[:] = 0 if labels == 'one class' else range(-2, len(y) - 2)
            return splits, classes[:1] if labels == 'one class' else classes

        monkeypatch.setattr(recipes.data, '_load_timm', load)
        run = recipe(output=tmp_path / labels, **options)
        found, weights = read_weights(run / 'model'), read_weights(expected / 'model')
        assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_run_on_arrays_without_labels(recipe, recipes, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32), dtype=np.uint8)
    np.savez(tmp_path / 'images.npz', x=pixels)
    options = {'dataset': 'npz', 'data_dir': tmp_path / 'images.npz', 'head': 'sparse_fisher'}
    run = recipe(**options, stages={'own': OWN['own']})
    assert read_metrics(run)['test']['samples'] == 10
    with pytest.raises(ValueError, match="has no array 'y'"):
        recipe(**options, output=tmp_path / 'labelled', stages=OWN)


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
    stages = {'own': {**OWN['own'], 'epochs': 1}}
    options = {'data_dir': few_images, 'test_split': None, 'head': 'sparse_fisher'}
    run = recipe(**options, stages=stages, batch_size=batch_size)
    assert read_metrics(run)['steps'] == steps


class Centre(timm_fisher.PoolingHead):
    """Its own rule sets a centre; its own loss is the squared distance from it."""

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
def test_own_rule_comes_before_the_gradient(recipes, composed):
    """Each head has its own descriptors; evaluation changes nothing."""
    head = [{'name': 'avg'}, {'name': 'gem', 'stage': -4}] if composed else 'avg'
    torch.manual_seed(0)
    model = timm_fisher.create_model('test_resnet', head, num_classes=0)
    widths = [each.in_features for each in model.head] if composed else [model.num_features]
    centres = [Centre(width) for width in widths]
    model.head = ConcatHeads(centres, model.head.places) if composed else centres[0]
    images = torch.randn(6, 3, 32, 32)
    module = recipes.train.Unsupervised(model, from_features=False).eval()
    features = model.forward_features(images)
    descriptors = model.descriptors(features)
    parts = [descriptors[place] for place in model.head.places] if composed else [descriptors]
    far = sum(part.square().sum(-1).mean() for part in parts)
    torch.testing.assert_close(module(images), far)
    assert not any(centre.centre.any() for centre in centres)

    module = recipes.train.Unsupervised(model, from_features=True).train()
    near = sum((part - part.mean((0, 1))).square().sum(-1).mean() for part in parts)
    torch.testing.assert_close(module(features), near)
    for centre, part in zip(centres, parts, strict=True):
        torch.testing.assert_close(centre.centre, part.mean((0, 1)))


@pytest.mark.parametrize(
    ('head', 'stage', 'message'),
    [
        ('avg', {'unsupervised': True}, "Stage 'only' trains nothing: the own loss of avg is zero"),
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


@pytest.mark.parametrize(
    'stage',
    [
        {'train': 'classifier', 'unsupervised': True},
        {'train': 'head', 'layers': ['layer4']},
        {'train': 'classifier', 'layers': ['layer4']},
    ],
    ids=str,
)
def test_stage_that_contradicts_itself(recipes, capsys, stage):
    with pytest.raises(SystemExit):
        recipes.config.parse_config([f'--stages={json.dumps({"only": stage})}'])
    assert 'stages.only' in capsys.readouterr().err


# Cached features

HEAD_ONLY = {'warm': {'train': 'head', 'epochs': 2, 'opt': 'momentum', 'lr': 0.001}}


@pytest.mark.parametrize(
    ('head', 'train'),
    [
        slow('avg', 'head'),
        slow('sparse_fisher', 'head'),
        ('3g', 'head'),
        slow('3g', 'classifier'),
        slow(COMPOSED, 'head'),
        (COMPOSED, 'classifier'),
        slow([{'name': 'avg'}, {'name': 'gem'}], 'classifier'),  # both on one stage
    ],
    ids=str,
)
def test_cache_does_not_change_the_result(recipe, images, tmp_path, head, train):
    """That of features, and, where the classifier alone is trained, that of pooled vectors."""
    stages = {'warm': {**HEAD_ONLY['warm'], 'train': train}}
    options = {'data_dir': images, 'head': head, 'head_kwargs': small(head), 'stages': stages}
    cached = recipe(output=tmp_path / 'cached', **options)
    files = 6 if head is COMPOSED else 3
    assert len(list((tmp_path / 'cache').glob('*.npy'))) == files
    assert not (tmp_path / 'cached' / 'pooled').exists()
    plain = recipe(output=tmp_path / 'plain', cache_dir=tmp_path / 'none', cache=False, **options)
    assert not (tmp_path / 'none').exists()
    options['stages'] = {'warm': {**stages['warm'], 'lr': 0.0}}
    start = recipe(output=tmp_path / 'start', **options)

    def distance(a, b):
        a, b = read_weights(a / 'last'), read_weights(b / 'last')
        return torch.stack([(a[name] - b[name]).abs().max() for name in a]).max().item()

    # Steps of training make more of a difference in the last bit: hence relative to what is learnt.
    assert distance(cached, plain) < 0.01 * distance(cached, start)
    for a, b in zip(read_log(cached), read_log(plain), strict=True):
        assert a['train_loss'] == pytest.approx(b['train_loss'], rel=1e-4)
        assert a['val_loss'] == pytest.approx(b['val_loss'], rel=1e-4)
    assert read_metrics(cached)['test'] == pytest.approx(read_metrics(plain)['test'], rel=1e-4)


def test_cache_is_used_again(recipe, few_images, tmp_path, monkeypatch):
    options = {'data_dir': few_images, 'stages': HEAD_ONLY, 'test_split': None}
    first = recipe(output=tmp_path / 'first', **options)

    def refuse(model, x):
        raise AssertionError('the backbone runs although its features are there')

    monkeypatch.setattr(timm_fisher.PooledModel, 'forward_features', refuse)
    second = recipe(output=tmp_path / 'second', **options)
    assert read_metrics(first) == read_metrics(second)
    with pytest.raises(AssertionError, match='the backbone runs'):
        recipe(output=tmp_path / 'third', **options, cache_dir=tmp_path / 'other')


@pytest.mark.parametrize(
    'change',
    [
        {'seed': 1},  # of the random weights
        {'img_size': 64},
        {'crop_pct': 0.8},
        {'backbone_stage': -3},
        {'mixed_precision': 'bf16'},
    ],
    ids=str,
)
def test_cache_is_not_used_for_something_else(recipe, few_images, tmp_path, change):
    options = {'data_dir': few_images, 'stages': HEAD_ONLY, 'test_split': None}
    recipe(output=tmp_path / 'first', **options)
    before = set((tmp_path / 'cache').iterdir())
    assert len(before) == 2
    recipe(output=tmp_path / 'second', **{**options, **change})
    assert len(set((tmp_path / 'cache').iterdir()) - before) == 2


def test_cache_is_not_used_for_other_images(recipe, few_images, tmp_path):
    options = {'data_dir': few_images, 'stages': HEAD_ONLY, 'test_split': None}
    recipe(output=tmp_path / 'first', **options)
    before = set((tmp_path / 'cache').iterdir())
    image = few_images / 'train/red/000.png'
    Image.new('RGB', (32, 32)).save(image)
    recipe(output=tmp_path / 'second', **options)
    assert len(set((tmp_path / 'cache').iterdir()) - before) == 1


def test_cache_is_not_used_after_the_backbone_was_trained(recipe, few_images, tmp_path):
    stages = {'tune': {'train': 'all', 'epochs': 1, 'lr': 0.01}, **HEAD_ONLY}
    recipe(data_dir=few_images, stages=stages, test_split=None)
    after = {'head_first': {'train': 'head', 'epochs': 1}, **stages}
    recipe(data_dir=few_images, stages=after, test_split=None, output=tmp_path / 'second')
    # Two files for the trained backbone of each run, and two for the untrained one of the second.
    assert len(list((tmp_path / 'cache').glob('*.npy'))) == 6


# One step of the optimizer


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
    for part in ('classifier.', 'head.reduce', 'head.encoder', 'head.lateral'):
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
        ('head', {'classifier', 'head'}),
        ('all', {'classifier', 'head', 'backbone'}),
        ('backbone', {'backbone'}),
    ],
)
def test_stage_trains_what_it_says(step, train, trained):
    options = {'head': 'sparse_fisher', 'head_kwargs': {'code_dim': 4}}
    start = step(options, train=train, lr=0.0)
    change = step(options, train=train, lr=0.1, start=start)
    for part in ('classifier', 'head', 'backbone'):
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
        return torch.cat([each.flatten() for each in change.values()]).norm().item()

    assert length() > 0.1
    assert length(clip_grad=0.01) == pytest.approx(0.01, rel=1e-2)


# Two processes


def test_recipe_on_two_processes(launch, recipes, images, tmp_path):
    """51 test images in batches of 2 x 16: some are seen twice, each is counted once."""
    stages = {'own': {**OWN['own'], 'epochs': 1}, **TWO_STAGES}
    options = {**TINY, 'data_dir': images, 'stages': stages, 'head': 'sparse_fisher'}
    options |= {'output': tmp_path / 'run', 'cache_dir': tmp_path / 'cache'}
    finish(launch(processes=2, **options))
    check_run(tmp_path / 'run', images, recipes, head='sparse_fisher', stages=stages, processes=2)


@pytest.mark.slow
def test_unsupervised_run_on_two_processes(launch, images, tmp_path):
    """Through the network, too, where DDP finds parameters that the own loss does not reach."""
    stages = {'own': {**OWN['own'], 'train': 'all'}}
    options = {**TINY, 'data_dir': images, 'stages': stages, 'head': 'sparse_fisher'}
    finish(launch(processes=2, output=tmp_path / 'run', **options))
    expected = own_loss_by_plain_timm(tmp_path / 'run/model', images, 'test')
    found = read_metrics(tmp_path / 'run')
    assert found['test'] == {'own_loss': pytest.approx(expected, rel=1e-5), 'samples': 51}
    assert found['processes'] == 2
    with Image.open(tmp_path / 'run/curve.png') as curve:
        curve.load()


@pytest.fixture(scope='module')
def ranks(launch, tmp_path_factory):
    """What distributed_checks.py computes on each of two ranks."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp('ranks')
    finish(launch('tests/distributed_checks.py', processes=2, output=output))
    results = [torch.load(output / f'rank{rank}.pt') for rank in range(2)]
    assert [each['world_size'] for each in results] == [2, 2]
    return results


@pytest.mark.parametrize('head', distributed_checks.HEADS)
def test_fit_on_two_ranks_equals_the_fit_on_one(ranks, head):
    expected = distributed_checks.fitted(head)
    for rank in ranks:
        torch.testing.assert_close(rank['fit'][head], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize('head', distributed_checks.HEADS)
def test_gradients_on_two_ranks_equal_those_on_one(ranks, head):
    expected = distributed_checks.gradients(distributed_checks.create(head))
    assert {'classifier.weight', 'backbone.conv1.0.weight'} <= set(expected)
    for rank in ranks:
        torch.testing.assert_close(rank['gradients'][head], expected, atol=1e-5, rtol=1e-5)


def test_own_update_on_two_ranks_equals_that_on_the_whole_batch(ranks):
    expected = distributed_checks.updated()
    for rank in ranks:
        torch.testing.assert_close(rank['updated'], expected, atol=1e-6, rtol=1e-6)
    alone = distributed_checks.updated(0, 2)  # of half of the images, without the other rank
    assert (alone['basis'] - expected['basis']).abs().max() > 0.01
