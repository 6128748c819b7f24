"""Images to train on: what is wrong with them is said before training starts."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import write_images
from hostile_files import NO_IMAGES, make_black_nan, write_nan
from limits import within
from PIL import Image
from run_checks import (
    parse_config,
)

from timm_fisher.training import data
from timm_fisher.training.config import Config, Stage
from timm_fisher.training.data import Images, Split, load_splits

ONE_EPOCH = {'only': {'train': 'head', 'epochs': 1}}
NO_TEST = {'test_split': None, 'stages': ONE_EPOCH}


def test_missing_data_folder(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere/train' is not a folder; --data-dir must hold"):
        recipe(data_dir=tmp_path / 'nowhere')


def test_no_data_folder_given(recipe):
    with pytest.raises(ValueError, match='--data-dir must hold'):
        recipe()


def test_missing_split_names_the_option(recipe, few):
    with pytest.raises(ValueError, match=r"few/test' is not a folder.*--test_split null"):
        recipe(data_dir=few)


def test_folder_without_images(recipe, tmp_path):
    (tmp_path / 'empty/train/red').mkdir(parents=True)
    with pytest.raises(ValueError, match=r"split 'train' of '.*empty'"):
        recipe(data_dir=tmp_path / 'empty', val_split=None, test_split=None)


def test_classes_with_synonyms(monkeypatch):
    """As torchvision's ImageNet has them: the first name of each counts."""
    names = {'tench': 0, 'Tinca tinca': 0, 'goldfish': 1, 'Carassius auratus': 1}

    def create(dataset, data_dir, split, **options):
        pixels = np.full((4, 8, 8), ('train', 'val', 'test').index(split), np.uint8)
        made = data.ArrayImages(pixels, np.array([0, 1, 1, 0]))
        made.class_to_idx = names
        return made

    monkeypatch.setattr(data, '_create_dataset', create)
    assert load_splits(Config(dataset='torch/imagenet'))[1] == ['tench', 'goldfish']


@pytest.mark.parametrize(
    ('where', 'label', 'classes'),
    [
        ('train', -1, []),
        ('train', 2, ['red', 'blue']),
        ('test', -1, []),
        ('test', 2, []),
        ('test', 2, ['red', 'blue']),
    ],
)
def test_labels_outside_the_classes(monkeypatch, where, label, classes):
    """Public test splits often have -1 for a label that is kept secret."""

    def create(dataset, data_dir, split, **options):
        pixels = np.full((4, 8, 8), ('train', 'val', 'test').index(split), np.uint8)
        return data.ArrayImages(pixels, np.array([0, 1, 1, label if split == where else 0]))

    monkeypatch.setattr(data, '_create_dataset', create)
    options = {'dataset': 'hfds/some', 'classes': classes}
    searched = Stage(train='head', loss={'name': 'ProxyAnchorLoss'})
    for stage in (Stage(), searched):
        config = Config(**options, stages={'only': stage})
        if where == 'test' and stage is searched:  # whose classes may be others
            load_splits(config)
            continue
        with pytest.raises(ValueError, match=f"'{where}' has the label {label}, but the 2 classes"):
            load_splits(config)
    if where == 'test':
        assert len(load_splits(Config(**options, test_split=None))[0]) == 2


@pytest.mark.parametrize('val_split', ['val', None])
def test_one_class_only(recipe, few, val_split):
    for split in ('train', 'val'):
        for colour in ('blue', 'green'):
            for path in (few / split / colour).iterdir():
                path.unlink()
    with pytest.raises(ValueError, match=r"few' are all of one class, \['red'\]"):
        recipe(data_dir=few, val_split=val_split, **NO_TEST)


def test_no_image_is_named_before_training(recipe, few):
    broken = few / 'val/red/broken.png'
    broken.write_text('no image')
    with pytest.raises(ValueError, match=f'1 files cannot be read as images.*\n.*{broken}'):
        recipe(data_dir=few, **NO_TEST)


def test_files_are_looked_at_once(few, tmp_path, monkeypatch):
    """Until one of them changes."""
    looked = []
    refuse = data._refuse_unreadable
    monkeypatch.setattr(data, '_refuse_unreadable', lambda paths: looked.append(len(paths)))
    config = Config(data_dir=str(few), test_split=None, cache_dir=str(tmp_path / 'cache'))
    for _ in range(2):
        load_splits(config)
        assert looked == [12, 6]
    monkeypatch.setattr(data, '_refuse_unreadable', refuse)
    next(iter((few / 'val').rglob('*.png'))).write_text('no image')
    for _ in range(2):
        with pytest.raises(ValueError, match='1 files cannot be read as images'):
            load_splits(config)


@pytest.mark.parametrize('kind', NO_IMAGES)
def test_files_that_hang_or_burst_are_named_before_training(recipe, few, kind):
    path = few / 'val/red/x.png'
    write, reason = NO_IMAGES[kind]
    write(path)
    with within(20), pytest.raises(ValueError, match=f'1 files cannot .*\n  {path} .*{reason}'):
        recipe(data_dir=few, **NO_TEST)


def test_files_of_torchvision_that_hang(few):
    os.mkfifo(few / 'train/red/x.png')
    config = parse_config(
        ['--dataset=torch/image_folder', f'--data_dir={few}', '--test_split=null']
    )
    with within(20), pytest.raises(ValueError, match=f'{few}/train/red/x.png .*not a regular file'):
        load_splits(config)
    (few / 'train/red/x.png').unlink()
    splits, _ = load_splits(config)
    images = Images(splits['train'], np.asarray, 'RGB')
    assert images.name(8) == f'{few}/train/red/000.png'
    Path(images.name(8)).write_bytes(b'no longer')
    with pytest.raises(ValueError, match=f"Image '{few}/train/red/000.png' cannot be decoded"):
        images[8]


def test_folder_is_no_image(few):
    (few / 'train/red/x.png').mkdir()
    splits, _ = load_splits(parse_config([f'--data_dir={few}', '--test_split=null']))
    assert len(splits['train'].indices) == 12


def test_pixels_that_are_nan_are_named(recipe, few):
    write_nan(few / 'val/red/x.png')
    with pytest.raises(ValueError, match=f"Image '{few}/val/red/x.png' cannot .*it has NaN or inf"):
        recipe(data_dir=few, **NO_TEST)


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('cache', [True, False])
def test_output_that_is_nan_names_the_image(recipe, few, monkeypatch, split, cache):
    """While features are cached; in training and validation by the loss."""
    make_black_nan(monkeypatch)
    path = few / split / 'green/002x.png'
    Image.new('RGB', (32, 32)).save(path)
    error, message = (
        ValueError,
        f"output is NaN or infinite for image '{path}'. If nothing is wrong",
    )
    if not cache:
        where = {'train': 'epoch 1, step 1', 'val': 'validation of epoch 1'}[split]
        error, message = (
            FloatingPointError,
            rf"nan in .* {where}\. With these weights '{path}' is the first such image",
        )
    with pytest.raises(error, match=message):
        recipe(data_dir=few, cache=cache, **NO_TEST)


# Collecting the worker of a failed run takes 10 s.
@pytest.mark.parametrize('workers', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_jpeg_cut_short_is_named_when_decoded(recipe, few, workers):
    cut = few / 'train/red/cut.jpg'
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    with Image.open(cut) as image:  # the header alone is fine
        assert image.size == (64, 64)
    with pytest.raises(ValueError, match=f"Image '{cut}' cannot be decoded") as error:
        recipe(data_dir=few, workers=workers, **NO_TEST)
    assert 'Remove it' in str(error.value)


def test_class_that_training_lacks(recipe, few):
    (few / 'val/red').rename(few / 'val/violet')
    with pytest.raises(
        ValueError, match=r"split 'val' has classes that are not those of training.*violet"
    ):
        recipe(data_dir=few, **NO_TEST)


def test_class_that_validation_lacks_keeps_the_labels(few):
    """Without 'blue', a split of its own would call 'green' class 0."""
    for path in (few / 'val/blue').iterdir():
        path.unlink()
    config = parse_config([f'--data_dir={few}', '--test_split=null'])
    splits, classes = load_splits(config)
    assert classes == ['blue', 'green', 'red']
    assert Counter(splits['val'].labels.tolist()) == {1: 2, 2: 2}


def test_splits_that_are_the_same(recipe, few):
    with pytest.raises(ValueError, match=r"'train' and 'val' hold the same images.*val_split null"):
        recipe(data_dir=few, val_split='train', test_split=None)


def carve(folder, **options):
    arguments = [f'--{key}={value}' for key, value in options.items()]
    config = parse_config(
        [f'--data_dir={folder}', '--val_split=null', '--test_split=null', *arguments]
    )
    return load_splits(config)[0]


def test_carved_validation_is_stratified_and_disjoint(tmp_path):
    folder = write_images(tmp_path / 'uneven', train=20)
    for path in sorted((folder / 'train/red').iterdir())[10:]:
        path.unlink()
    splits = carve(folder, val_fraction=0.2)
    assert Counter(splits['val'].labels.tolist()) == {0: 4, 1: 4, 2: 2}
    assert Counter(splits['train'].labels.tolist()) == {0: 16, 1: 16, 2: 8}
    both = np.concatenate([splits['train'].indices, splits['val'].indices])
    assert sorted(both) == list(range(50))
    samples = splits['val'].dataset.reader.samples
    labels = [samples[i][1] for i in splits['val'].indices]
    assert labels == splits['val'].labels.tolist()


def test_carved_validation_depends_on_the_seed_alone(images):
    first, again, other = (carve(images, seed=seed)['val'] for seed in (0, 0, 1))
    assert np.array_equal(first.indices, again.indices)
    assert not np.array_equal(first.indices, other.indices)


def test_too_few_images_to_carve_from(few):
    with pytest.raises(ValueError, match='No validation set of 10% can be carved from 12 images'):
        carve(few, val_fraction=0.1)


def test_fingerprint_of_images_in_memory():
    """Of a data set that tells neither files nor one array, such as some of torchvision's."""

    class Pictures(list):
        def __repr__(self):
            return 'Pictures'

    def fingerprint(change, count=10):
        pixels = np.zeros((600, 4, 4), np.uint8)
        pixels[change] = 1
        pictures = Pictures((Image.fromarray(x), 0) for x in pixels)
        return Split(pictures, np.arange(count), np.zeros(count, int)).fingerprint

    first = fingerprint(slice(0))
    assert fingerprint(slice(0)) == first
    assert fingerprint(9) != first
    assert fingerprint(599) == first  # of another split
    assert fingerprint(slice(300, 303), 600) != fingerprint(slice(0), 600)


def test_fingerprint_of_files_of_torchvision(few):
    """Its folders of images list them as timm's do."""
    files = sorted(few.rglob('*.png'))
    folder = SimpleNamespace(samples=[(str(path), 0) for path in files])

    def fingerprint():
        return Split(folder, np.arange(5), np.zeros(5, int)).fingerprint

    first = fingerprint()
    os.utime(files[5], ns=(1, 1))
    assert fingerprint() == first
    os.utime(files[4], ns=(1, 1))
    assert fingerprint() != first


def test_classes_that_training_lacks(tmp_path):
    """Without a classifier they follow the others, in the order of names."""
    for split, names in (('train', 'bd'), ('val', 'bd'), ('test', 'acd')):
        for name in names:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.new('RGB', (8, 8), (ord(name), len(split), 0)).save(folder / '0.png')
    search = Stage(train='head', loss={'name': 'ProxyAnchorLoss'})
    splits, classes = load_splits(Config(data_dir=str(tmp_path), stages={'search': search}))
    assert classes == ['b', 'd']
    assert splits['train'].labels.tolist() == [0, 1]
    assert sorted(splits['test'].labels) == [1, 2, 3]
    with pytest.raises(
        ValueError, match=r"'test' has classes that are not those of training: \['a', 'c'\]"
    ):
        load_splits(Config(data_dir=str(tmp_path)))
