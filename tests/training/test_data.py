"""What the recipe does with bad input: it stops early and says what to do."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from conftest import write_images
from PIL import Image

ONE_EPOCH = {'only': {'train': 'head', 'epochs': 1}}
NO_TEST = {'test_split': None, 'stages': ONE_EPOCH}


@pytest.fixture
def few(tmp_path):
    """A folder that a test may damage: 12 training and 6 validation images."""
    return write_images(tmp_path / 'few', train=4, val=2)


# Images


def test_missing_data_folder(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere/train' is no folder; --data-dir must hold"):
        recipe(data_dir=tmp_path / 'nowhere')


def test_no_data_folder_given(recipe):
    with pytest.raises(ValueError, match='--data-dir must hold'):
        recipe()


def test_missing_split_names_the_option(recipe, few):
    with pytest.raises(ValueError, match=r"few/test' is no folder.*--test_split null"):
        recipe(data_dir=few)


def test_folder_without_images(recipe, tmp_path):
    (tmp_path / 'empty/train/red').mkdir(parents=True)
    with pytest.raises(ValueError, match=r"split 'train' of '.*empty'"):
        recipe(data_dir=tmp_path / 'empty', val_split=None, test_split=None)


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
    with pytest.raises(ValueError, match=r"split 'val' has classes that training lacks.*violet"):
        recipe(data_dir=few, **NO_TEST)


def test_class_that_validation_lacks_keeps_the_labels(recipes, few):
    """Without 'blue', a split of its own would call 'green' class 0."""
    for path in (few / 'val/blue').iterdir():
        path.unlink()
    config = recipes.config.parse_config([f'--data_dir={few}', '--test_split=null'])
    splits, classes = recipes.data.load_splits(config)
    assert classes == ['blue', 'green', 'red']
    assert Counter(splits['val'].labels.tolist()) == {1: 2, 2: 2}


def test_splits_that_are_the_same(recipe, few):
    with pytest.raises(ValueError, match=r"'train' and 'val' hold the same images.*val_split null"):
        recipe(data_dir=few, val_split='train', test_split=None)


# A validation set carved from the training set


def carve(recipes, folder, **options):
    arguments = [f'--{key}={value}' for key, value in options.items()]
    config = recipes.config.parse_config(
        [f'--data_dir={folder}', '--val_split=null', '--test_split=null', *arguments]
    )
    return recipes.data.load_splits(config)[0]


def test_carved_validation_is_stratified_and_disjoint(recipes, tmp_path):
    folder = write_images(tmp_path / 'uneven', train=20)
    for path in sorted((folder / 'train/red').iterdir())[10:]:
        path.unlink()
    splits = carve(recipes, folder, val_fraction=0.2)
    assert Counter(splits['val'].labels.tolist()) == {0: 4, 1: 4, 2: 2}
    assert Counter(splits['train'].labels.tolist()) == {0: 16, 1: 16, 2: 8}
    both = np.concatenate([splits['train'].indices, splits['val'].indices])
    assert sorted(both) == list(range(50))
    samples = splits['val'].dataset.reader.samples
    labels = [samples[i][1] for i in splits['val'].indices]
    assert labels == splits['val'].labels.tolist()


def test_carved_validation_depends_on_the_seed_alone(recipes, images):
    first, again, other = (carve(recipes, images, seed=seed)['val'] for seed in (0, 0, 1))
    assert np.array_equal(first.indices, again.indices)
    assert not np.array_equal(first.indices, other.indices)


def test_too_few_images_to_carve_from(recipes, few):
    with pytest.raises(ValueError, match='No validation set of 10% can be carved from the 12'):
        carve(recipes, few, val_fraction=0.1)


# Arrays in a file


def load_npz(recipes, path, **options):
    arguments = [f'--{key}={json.dumps(value)}' for key, value in options.items()]
    config = recipes.config.parse_config(['--dataset=npz', f'--data_dir={path}', *arguments])
    return recipes.data.load_splits(config)


def digits(count, *shape, seed=0):
    """Noise, and the labels 3, 5, 8 by turns."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (count, *(shape or (6, 5))), dtype=np.uint8)
    return pixels, np.array([3, 5, 8])[np.arange(count) % 3]


@pytest.fixture
def npz(tmp_path):
    """`npz(x=..., y=...)` writes a file; without arguments one of 60 and 30 images."""

    def write(**arrays):
        if not arrays:
            (x, y), (u, v) = digits(60), digits(30, seed=1)
            arrays = {'x_train': x, 'y_train': y, 'x_test': u, 'y_test': v}
        np.savez(tmp_path / 'arrays.npz', **arrays)
        return tmp_path / 'arrays.npz'

    return write


def test_npz_with_a_test_split(recipes, npz):
    path = npz()
    arrays = np.load(path)
    splits, classes = load_npz(recipes, path, val_fraction=0.2)
    assert classes == ['3', '5', '8']
    counts = {name: Counter(split.labels.tolist()) for name, split in splits.items()}
    assert counts == {
        'train': {0: 16, 1: 16, 2: 16}, 'val': {0: 4, 1: 4, 2: 4}, 'test': {0: 10, 1: 10, 2: 10},
    }  # fmt: skip
    carved = np.concatenate([splits['train'].indices, splits['val'].indices])
    assert sorted(carved) == list(range(60))
    for name, key in (('train', 'train'), ('val', 'train'), ('test', 'test')):
        split = splits[name]
        for index, label in zip(split.indices, split.labels, strict=True):
            image, same_label = split.dataset[index]
            assert np.array_equal(np.asarray(image), arrays[f'x_{key}'][index])
            assert label == same_label == [3, 5, 8].index(arrays[f'y_{key}'][index])
    assert set(load_npz(recipes, path, test_split=None)[0]) == {'train', 'val'}


def test_npz_without_a_test_split(recipes, npz):
    path = npz(**dict(zip('xy', digits(120), strict=True)))
    splits, _ = load_npz(recipes, path)
    assert Counter(splits['test'].labels.tolist()) == {0: 10, 1: 10, 2: 10}
    parts = [splits[name].indices for name in ('train', 'val', 'test')]
    assert sorted(np.concatenate(parts)) == list(range(120))
    other_seed = load_npz(recipes, path, seed=1)[0]
    assert np.array_equal(splits['test'].indices, other_seed['test'].indices)
    assert len(load_npz(recipes, path, test_fraction=0.1)[0]['test'].indices) == 12
    assert set(load_npz(recipes, path, test_split=None)[0]) == {'train', 'val'}
    with pytest.raises(ValueError, match='No test split of 1% can be taken from the 120'):
        load_npz(recipes, path, test_fraction=0.01)


@pytest.mark.parametrize('folds', [4, 7, 40])
def test_folds_are_a_partition(recipes, npz, folds):
    """30 images a class: 40 folds are more than that, as in the experiments on Alphadigits."""
    x, y = digits(90)
    path = npz(x=x, y=y)
    tests = [
        load_npz(recipes, path, folds=folds, fold=fold)[0]['test'].indices for fold in range(folds)
    ]
    assert sorted(np.concatenate(tests)) == list(range(90))
    assert {len(test) for test in tests} <= {90 // folds, 90 // folds + 1}
    for label in (3, 5, 8):
        counts = [np.sum(y[test] == label) for test in tests]
        assert max(counts) - min(counts) <= 1
    splits, _ = load_npz(recipes, path, folds=folds, fold=1, val_fraction=0.1)
    assert np.array_equal(splits['test'].indices, tests[1])
    assert len(np.unique(np.concatenate([each.indices for each in splits.values()]))) == 90


@pytest.mark.parametrize(
    ('shape', 'mode'), [((6, 5), 'L'), ((6, 5, 1), 'L'), ((6, 5, 3), 'RGB'), ((6, 5, 4), 'RGBA')]
)
def test_shapes_of_arrays(recipes, npz, shape, mode):
    splits, _ = load_npz(recipes, npz(**dict(zip('xy', digits(60, *shape), strict=True))))
    image, _ = splits['train'].dataset[0]
    assert (image.mode, image.size) == (mode, (5, 6))


def test_scale_of_arrays(recipes, npz):
    """Binary and floating-point images become 0..255; a dark half of a file is left dark."""
    x, y = digits(60)

    def read(**arrays):
        splits, _ = load_npz(recipes, npz(**arrays))
        return [splits[name].dataset.pixels for name in ('train', 'test')]

    assert np.array_equal(read(x=(x > 99).astype(np.uint8), y=y)[0], np.where(x > 99, 255, 0))
    assert np.array_equal(read(x=(x / 255).astype(np.float32), y=y)[0], x)
    dark = (x > 99).astype(np.uint8)
    train, test = read(x_train=x, y_train=y, x_test=dark, y_test=y)
    assert np.array_equal(train, x)
    assert np.array_equal(test, dark)


def test_labels_that_are_words(recipes, npz):
    x, _ = digits(60)
    splits, classes = load_npz(recipes, npz(x=x, y=np.array(['red', 'blue'] * 30)))
    assert classes == ['blue', 'red']
    assert splits['test'].dataset[0][1] == 1


def bad_arrays():
    x, y = digits(60)
    u, v = digits(30)
    return {
        "has no array 'y', only": {'x': x},
        "has no array 'y_test'": {'x_train': x, 'y_train': y, 'x_test': u},
        "has no array 'x', only": {'images': x, 'labels': y},
        r"'x' in '.*npz' has shape \[60, 30\]": {'x': x.reshape(60, 30), 'y': y},
        r'shape \[60, 3, 6, 5\]': {'x': digits(60, 3, 6, 5)[0], 'y': y},
        r'shape \[0, 6, 5\]': {'x': x[:0], 'y': y[:0]},
        r"'x_test' in .*npz' is int64 from 0 to 25\d": {
            'x_train': x, 'y_train': y, 'x_test': u.astype(np.int64), 'y_test': v,
        },
        'is float64 from 0 to 25': {'x': x * 1.0, 'y': y},
        'is float64 from -0.5 to 0.5': {'x': x / 255 - 0.5, 'y': y},
        'is float64 from nan': {'x': np.where(x > 99, np.nan, 0.5), 'y': y},
        'is bool;': {'x': x > 99, 'y': y},
        'is <U1;': {'x': np.full((60, 6, 5), 'x'), 'y': y},
        r"'y' in .*shape \[60\].*int64 of shape \[59\]": {'x': x, 'y': y[1:]},
        r"'y' in .*is float64 of shape \[60\]": {'x': x, 'y': y / 2},
        r"'y_test' in .*classes that training lacks: \[9\]": {
            'x_train': x, 'y_train': y, 'x_test': u, 'y_test': np.where(v == 8, 9, v),
        },
        'cannot be read as an .npz file.*allow_pickle': {'x': x.astype(object), 'y': y},
    }  # fmt: skip


@pytest.mark.parametrize('message', bad_arrays())
def test_arrays_that_are_no_images(recipes, npz, message):
    with pytest.raises(ValueError, match=message):
        load_npz(recipes, npz(**bad_arrays()[message]))


def test_npz_fingerprints(recipes, npz):
    """They depend on the pixels, the choice and the labels."""

    def prints(x, y, **options):
        splits, _ = load_npz(recipes, npz(x=x, y=y), **options)
        return {name: split.fingerprint() for name, split in splits.items()}

    x, y = digits(60)
    first = prints(x, y)
    assert first == prints(x, y)
    assert len(set(first.values())) == 3
    other = x.copy()
    other[0, 0, 0] ^= 1
    for changed in (prints(other, y), prints(x, np.roll(y, 1)), prints(x.swapaxes(1, 2), y)):
        assert not set(changed.values()) & set(first.values())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'folds': 3}, 'has a test split of its own'),
        ({'data_dir': 'nothing.npz'}, 'is no file; --dataset npz needs --data-dir FILE.npz'),
        ({'data_dir': ''}, 'is no file'),
    ],
    ids=str,
)
def test_npz_options_that_do_not_fit(recipes, npz, options, message):
    path = npz()
    with pytest.raises(ValueError, match=message):
        load_npz(recipes, options.pop('data_dir', path), **options)


@pytest.mark.parametrize('options', [{'folds': 3, 'fold': 3}, {'folds': 1}, {'folds': 61}], ids=str)
def test_folds_that_do_not_exist(recipes, npz, options):
    path = npz(**dict(zip('xy', digits(60), strict=True)))
    with pytest.raises(ValueError, match=f'of {options["folds"]} folds does not exist for 60'):
        load_npz(recipes, path, **options)


@pytest.mark.parametrize('content', [b'', b'no archive', b'PK\x03\x04 cut short'])
def test_file_that_is_no_npz(recipes, tmp_path, content):
    path = tmp_path / 'arrays.npz'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"'{path}' cannot be read as an .npz file"):
        load_npz(recipes, path)


def test_npz_of_one_class(recipes, npz):
    x, y = digits(60)
    with pytest.raises(ValueError, match=r"npz' are all of one class, \['3'\]"):
        load_npz(recipes, npz(x=x, y=np.full_like(y, 3)))


def test_no_more_images_than_wanted(recipes, npz):
    """Always the same ones; validation images are carved from what is taken."""
    path = npz()
    splits, _ = load_npz(recipes, path, max_train=40, max_test=12, val_fraction=0.25)
    assert {n: len(s.indices) for n, s in splits.items()} == {'train': 30, 'val': 10, 'test': 12}
    other, _ = load_npz(recipes, path, max_train=40, max_test=12, val_fraction=0.25, seed=1)
    both, carved = (
        set(np.concatenate([each['train'].indices, each['val'].indices]))
        for each in (splits, other)
    )
    assert both == carved
    assert np.array_equal(splits['test'].indices, other['test'].indices)
    assert len(load_npz(recipes, path, max_test=99)[0]['test'].indices) == 30


# Names and types


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
    ({'folds': 3}, 'only a data set of arrays'),
]


@pytest.mark.parametrize(('settings', 'named'), BAD_SETTINGS, ids=lambda value: str(value))
@pytest.mark.parametrize('source', ['argument', 'file'])
def test_unknown_key_and_wrong_type(recipes, tmp_path, capsys, source, settings, named):
    file = tmp_path / 'config.yaml'
    file.write_text(yaml.safe_dump(settings))
    arguments = [f'--{key}={json.dumps(value)}' for key, value in settings.items()]
    with pytest.raises(SystemExit) as stopped:
        recipes.config.parse_config(arguments if source == 'argument' else [f'--config={file}'])
    assert stopped.value.code not in (0, None)
    assert named in capsys.readouterr().err


@pytest.mark.parametrize('key', ['stages.only.epoch', 'stages.only.head-lr-scal'])
def test_unknown_nested_argument(recipes, tmp_path, capsys, key):
    file = tmp_path / 'config.yaml'
    file.write_text('stages: {only: {epochs: 1}}')
    with pytest.raises(SystemExit) as stopped:
        recipes.config.parse_config([f'--config={file}', f'--{key}=3'])
    assert stopped.value.code not in (0, None)
    assert {'stages.only.epoch': "'epochs'", 'stages.only.head-lr-scal': "'head_lr_scale'"}[
        key
    ] in capsys.readouterr().err


def test_arguments_override_the_file(recipes, tmp_path):
    """The twin of the errors above: what is right is taken."""
    file = tmp_path / 'config.yaml'
    file.write_text('{head: avg, batch_size: 3, stages: {only: {epochs: 1, lr: 0.5}}}')
    config = recipes.config.parse_config(
        [f'--config={file}', '--batch-size=4', '--stages.only.epochs', '2', '--augment={}']
    )
    assert (config.head, config.batch_size, config.augment) == ('avg', 4, {})
    assert config.stages == {'only': recipes.config.Stage(epochs=2, lr=0.5)}
    file.write_text(config.to_yaml())
    assert recipes.config.parse_config([f'--config={file}']) == config


@pytest.mark.slow
def test_launcher_passes_the_failure_on(launch, images, tmp_path):
    process = launch(output=tmp_path / 'run', data_dir=images, head='sparse_fishr')
    text, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Unknown head 'sparse_fishr'. Did you mean 'sparse_fisher'?" in text


# The folder of a run


def test_resume_without_a_run(recipe, images, tmp_path):
    with pytest.raises(ValueError, match=r"run' holds no run"):
        recipe(data_dir=images, resume=True)
    assert not (tmp_path / 'run').exists()


def test_run_is_neither_overwritten_nor_resumed_with_other_settings(recipe, few):
    run = recipe(data_dir=few, **NO_TEST)
    before = {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}
    with pytest.raises(ValueError, match=r"run' holds a run already.*--resume true"):
        recipe(data_dir=few, **NO_TEST)
    with pytest.raises(ValueError, match=r'must keep the settings.*batch_size was 16, is 8'):
        recipe(data_dir=few, resume=True, **{**NO_TEST, 'batch_size': 8})
    assert before == {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}


def test_failure_before_training_leaves_the_output_free(recipe, few):
    """A misspelt name must not make the corrected command fail."""
    with pytest.raises(ValueError, match='Unknown head'):
        recipe(data_dir=few, head='avgg', **NO_TEST)
    assert (recipe(data_dir=few, head='avg', **NO_TEST) / 'metrics.json').exists()


# Failures in the middle of a run


def finite(folder: Path) -> bool:
    weights = safetensors.torch.load_file(folder / 'model.safetensors')
    return all(tensor.isfinite().all() for tensor in weights.values())


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
    assert finite(checkpoint / 'model')
    assert not (tmp_path / 'run/metrics.json').exists()


@pytest.mark.parametrize('epochs', [1, 2])
def test_weights_that_the_last_step_of_an_epoch_ruins(recipe, few, tmp_path, epochs):
    """One step per epoch: its own loss is fine, what it leaves is not."""
    stages = {
        'burn': {'train': 'all', 'epochs': epochs, 'opt': 'sgd', 'lr': 1e38, 'sched': 'constant'}
    }
    with pytest.raises(FloatingPointError, match='Last good checkpoint: none'):
        recipe(data_dir=few, stages=stages, test_split=None)
    assert not list((tmp_path / 'run').glob('checkpoint-*'))


STAGES = {'warm': {'train': 'head', 'epochs': 3, 'lr': 0.01}}


def test_disk_full_keeps_the_earlier_checkpoint(recipe, recipes, few, tmp_path, monkeypatch):
    """The second checkpoint meets a limit on file sizes that the first one did not."""
    options = {'data_dir': few, 'test_split': None, 'stages': STAGES, 'head': 'sparse_fisher'}
    expected = recipe(output=tmp_path / 'expected', **options)
    train_epoch = recipes.train.Run._train_epoch

    def fill_disk(self, name, epoch, *arguments):
        if epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        return train_epoch(self, name, epoch, *arguments)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(recipes.train.Run, '_train_epoch', fill_disk)
            with pytest.raises(Exception, match='File too large'):
                recipe(**options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    run = tmp_path / 'run'
    assert [path.name for path in run.glob('checkpoint-????')] == ['checkpoint-0001']
    assert finite(run / 'model')
    recipe(resume=True, **options)
    for folder in ('model', 'last'):
        file = f'{folder}/model.safetensors'
        assert (run / file).read_bytes() == (expected / file).read_bytes()
    assert [path.name for path in run.glob('checkpoint-*')] == ['checkpoint-0003']


def test_rename_that_fails_keeps_the_earlier_checkpoint(
    recipe, recipes, few, tmp_path, monkeypatch
):
    replace = os.replace

    def fail(source, target):
        if Path(target).name == 'checkpoint-0002':
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='No space left'):
        recipe(data_dir=few, test_split=None, stages=STAGES)
    checkpoint = tmp_path / 'run/checkpoint-0001'
    assert finite(checkpoint / 'model')
    assert len(json.loads((checkpoint / 'progress.json').read_text())['history']) == 1


def test_cache_that_does_not_fit(recipe, recipes, few, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'posix_fallocate', full)
    with pytest.raises(OSError, match=r'No space left.*--cache false'):
        recipe(data_dir=few, **NO_TEST)
    assert not list((tmp_path / 'cache').iterdir())


# Cached features


def test_two_runs_that_fill_one_cache_at_the_same_time(recipes, recipe, few, tmp_path):
    """The second run starts, and ends, while the first is half through the images."""
    from accelerate import Accelerator

    config = recipes.config.parse_config(
        [f'--data_dir={few}', '--test_split=null', f'--cache_dir={tmp_path}/cache', '--workers=0']
    )
    splits, _ = recipes.data.load_splits(config)
    torch.manual_seed(0)
    model = recipes.train.timm_fisher.create_model('test_resnet', num_classes=3)
    accelerator = Accelerator(cpu=True)
    transform = recipes.train.timm.data.create_transform(32)
    plain = recipes.data.Images(splits['train'], transform, 'RGB')

    class Interrupted(recipes.data.Images):
        done = False

        def __getitem__(self, i):
            if i == 6 and not self.done:
                self.done = True
                recipes.data.cache_features(model, plain, config, accelerator)
            return super().__getitem__(i)

    interrupted = Interrupted(splits['train'], transform, 'RGB')
    cached = recipes.data.cache_features(model, interrupted, config, accelerator)
    expected = torch.stack([plain[i][0] for i in range(len(plain))])
    with torch.no_grad():
        expected = model.eval().forward_features(expected)
    torch.testing.assert_close(torch.from_numpy(np.array(cached.arrays[0])), expected)
