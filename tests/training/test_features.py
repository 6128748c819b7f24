"""Cached features: the same result, used again, and only where they are valid."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from run_checks import (
    COMPOSED,
    parse_config,
    read_log,
    read_metrics,
    read_weights,
    slow,
    small,
)

import timm_fisher
from timm_fisher.descriptors import StageDescriptors
from timm_fisher.training.data import Images, load_splits
from timm_fisher.training.features import cache_features

HEAD_ONLY = {'warm': {'train': 'head', 'epochs': 2, 'opt': 'momentum', 'lr': 0.001}}


@pytest.mark.parametrize(
    ('head', 'train'),
    [
        slow('avg', 'head'),
        slow('sparse_fisher', 'head'),
        slow('3g', 'head'),
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
    assert not list((tmp_path / 'none').glob('*.npy'))
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


def test_disk_that_is_too_small_for_features(recipe, few_images, tmp_path, monkeypatch, capsys):
    """A stage that trains the classifier alone needs pooled vectors alone."""
    stages = {'warm': {**HEAD_ONLY['warm'], 'train': 'classifier'}}
    options = {'data_dir': few_images, 'head': 'sparse_fisher', 'stages': stages}
    expected = recipe(output=tmp_path / 'expected', **options, test_split=None)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
    capsys.readouterr()
    cache = tmp_path / 'small'
    run = recipe(output=tmp_path / 'run', cache_dir=cache, **options, test_split=None)
    said = 'MiB of features do not fit into .*/small: pooled vectors alone are kept'
    text = capsys.readouterr().out
    assert re.search(said, text)
    assert not list(cache.glob('*.npy'))
    assert 'features of 24 images' in text  # pooled
    for a, b in zip(read_log(run), read_log(expected), strict=True):
        assert a['val_loss'] == pytest.approx(b['val_loss'], rel=1e-4)
    # To the byte; what is there already needs no room.
    needed = sum(np.load(path).nbytes for path in (tmp_path / 'cache').glob('*.npy'))
    for free, is_said in ((needed - 1, True), (needed, False)):
        usage = usage._replace(free=free)
        recipe(output=tmp_path / f'{free}', cache_dir=cache, **options, test_split=None)
        assert ('do not fit' in capsys.readouterr().out) == is_said
    usage = usage._replace(free=0)
    recipe(output=tmp_path / 'again', **options, test_split=None)
    assert 'do not fit' not in capsys.readouterr().out


def test_cache_is_used_again(recipe, few_images, tmp_path, monkeypatch):
    options = {'data_dir': few_images, 'stages': HEAD_ONLY, 'test_split': None}
    first = recipe(output=tmp_path / 'first', **options)

    features = StageDescriptors.features

    def refuse(self, backbone, x):
        assert x.is_meta, 'the backbone runs although its features are there'
        return features(self, backbone, x)

    monkeypatch.setattr(StageDescriptors, 'features', refuse)
    second = recipe(output=tmp_path / 'second', **options)
    assert read_metrics(first) == read_metrics(second)
    with pytest.raises(AssertionError, match='the backbone runs'):
        recipe(output=tmp_path / 'third', **options, cache_dir=tmp_path / 'other')


@pytest.mark.parametrize(
    'change',
    [
        {'seed': 1},  # of the random weights
        {'img_size': 64},
        pytest.param({'crop_pct': 0.8}, marks=pytest.mark.slow),
        {'backbone_stage': -3},
        pytest.param({'mixed_precision': 'bf16'}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_cache_is_not_used_for_something_else(recipe, few_images, tmp_path, change):
    options = {'data_dir': few_images, 'stages': HEAD_ONLY, 'test_split': None}
    recipe(output=tmp_path / 'first', **options)
    before = set((tmp_path / 'cache').glob('*.npy'))
    assert len(before) == 2
    recipe(output=tmp_path / 'second', **{**options, **change})
    assert len(set((tmp_path / 'cache').glob('*.npy')) - before) == 2


def test_cache_is_not_used_for_other_images(recipe, few_images, tmp_path):
    options = {'data_dir': few_images, 'stages': HEAD_ONLY, 'test_split': None}
    recipe(output=tmp_path / 'first', **options)
    before = set((tmp_path / 'cache').glob('*.npy'))
    image = few_images / 'train/red/000.png'
    Image.new('RGB', (32, 32)).save(image)
    recipe(output=tmp_path / 'second', **options)
    assert len(set((tmp_path / 'cache').glob('*.npy')) - before) == 1


def test_cache_is_not_used_after_the_backbone_was_trained(recipe, few_images, tmp_path):
    stages = {'tune': {'train': 'all', 'epochs': 1, 'lr': 0.01}, **HEAD_ONLY}
    recipe(data_dir=few_images, stages=stages, test_split=None)
    after = {'head_first': {'train': 'head', 'epochs': 1}, **stages}
    recipe(data_dir=few_images, stages=after, test_split=None, output=tmp_path / 'second')
    # Two files for the trained backbone of each run, and two for the untrained one of the second.
    assert len(list((tmp_path / 'cache').glob('*.npy'))) == 6


def test_cache_that_was_cut_short_is_written_again(recipe, few, tmp_path):
    options = {'data_dir': few, 'stages': HEAD_ONLY, 'test_split': None}
    first = recipe(output=tmp_path / 'first', **options)
    files = sorted((tmp_path / 'cache').glob('*.npy'))
    before = [path.read_bytes() for path in files]
    files[0].write_bytes(before[0][:-100])
    files[1].write_bytes(b'')
    second = recipe(output=tmp_path / 'second', **options)
    assert [path.read_bytes() for path in files] == before
    assert read_metrics(first) == read_metrics(second)


def test_partial_files_of_dead_runs_are_removed(recipe, few, tmp_path):
    """Not those of a run that may be alive."""
    names = (f'a.{"0f" * 16}.partial', f'b.{"0f" * 16}.partial', 'c.npy', 'another.partial')
    old, new, *others = (tmp_path / 'cache' / name for name in names)
    old.parent.mkdir()
    for path in (old, new, *others):
        path.touch()
        os.utime(path, (time.time() - 25 * 3600,) * 2)
    os.utime(new, (time.time() - 23 * 3600,) * 2)
    recipe(data_dir=few, stages=HEAD_ONLY, test_split=None)
    assert [path.exists() for path in (old, new, *others)] == [False, True, True, True]


def test_cache_that_does_not_fit(recipe, few, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'posix_fallocate', full)
    # Of 12 images, 192 channels at 2 x 2 positions, in float32.
    message = r'0\.0352 MiB of features do not fit .*No space left.*--cache false'
    with pytest.raises(OSError, match=message):
        recipe(data_dir=few, test_split=None, stages=HEAD_ONLY)
    assert {path.name.split('-')[0] for path in (tmp_path / 'cache').iterdir()} == {'readable'}


def test_two_runs_that_fill_one_cache_at_the_same_time(recipe, few, tmp_path):
    """The second run starts, and ends, while the first is half through the images."""
    from accelerate import Accelerator

    config = parse_config(
        [f'--data_dir={few}', '--test_split=null', f'--cache_dir={tmp_path}/cache', '--workers=0']
    )
    splits, _ = load_splits(config)
    torch.manual_seed(0)
    model = timm_fisher.create_model('test_resnet', num_classes=3)
    accelerator = Accelerator(cpu=True)
    transform = timm.data.create_transform(32)
    plain = Images(splits['train'], transform, 'RGB')

    class Interrupted(Images):
        done = False

        def __getitem__(self, i):
            if i == 6 and not self.done:
                self.done = True
                cache_features(model, plain, config, accelerator)
            return super().__getitem__(i)

    interrupted = Interrupted(splits['train'], transform, 'RGB')
    cached = cache_features(model, interrupted, config, accelerator)
    expected = torch.stack([plain[i][0] for i in range(len(plain))])
    with torch.no_grad():
        expected = model.eval().forward_features(expected)
    torch.testing.assert_close(torch.from_numpy(np.array(cached.arrays[0])), expected)
