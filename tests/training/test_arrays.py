"""Images in a file of arrays."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from run_checks import (
    parse_config,
)

from timm_fisher.training.data import load_splits


def load_npz(path, **options):
    arguments = [f'--{key}={json.dumps(value)}' for key, value in options.items()]
    config = parse_config(['--dataset=npz', f'--data_dir={path}', *arguments])
    return load_splits(config)


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


def test_npz_with_a_test_split(npz):
    path = npz()
    arrays = np.load(path)
    splits, classes = load_npz(path, val_fraction=0.2)
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
    assert set(load_npz(path, test_split=None)[0]) == {'train', 'val'}


def test_npz_without_a_test_split(npz):
    path = npz(**dict(zip('xy', digits(120), strict=True)))
    splits, _ = load_npz(path)
    assert Counter(splits['test'].labels.tolist()) == {0: 10, 1: 10, 2: 10}
    parts = [splits[name].indices for name in ('train', 'val', 'test')]
    assert sorted(np.concatenate(parts)) == list(range(120))
    other_seed = load_npz(path, seed=1)[0]
    assert np.array_equal(splits['test'].indices, other_seed['test'].indices)
    assert len(load_npz(path, test_fraction=0.1)[0]['test'].indices) == 12
    assert set(load_npz(path, test_split=None)[0]) == {'train', 'val'}
    with pytest.raises(ValueError, match='No test set of 1% can be carved from 120 images'):
        load_npz(path, test_fraction=0.01)


@pytest.mark.parametrize('folds', [4, 7, 40])
def test_folds_are_a_partition(npz, folds):
    """30 images a class: 40 folds are more than that, as in the experiments on Alphadigits."""
    x, y = digits(90)
    path = npz(x=x, y=y)
    tests = [load_npz(path, folds=folds, fold=fold)[0]['test'].indices for fold in range(folds)]
    assert sorted(np.concatenate(tests)) == list(range(90))
    assert {len(test) for test in tests} <= {90 // folds, 90 // folds + 1}
    for label in (3, 5, 8):
        counts = [np.sum(y[test] == label) for test in tests]
        assert max(counts) - min(counts) <= 1
    splits, _ = load_npz(path, folds=folds, fold=1, val_fraction=0.1)
    assert np.array_equal(splits['test'].indices, tests[1])
    assert len(np.unique(np.concatenate([split.indices for split in splits.values()]))) == 90


@pytest.mark.parametrize(
    ('shape', 'mode'), [((6, 5), 'L'), ((6, 5, 1), 'L'), ((6, 5, 3), 'RGB'), ((6, 5, 4), 'RGBA')]
)
def test_shapes_of_arrays(npz, shape, mode):
    splits, _ = load_npz(npz(**dict(zip('xy', digits(60, *shape), strict=True))))
    image, _ = splits['train'].dataset[0]
    assert (image.mode, image.size) == (mode, (5, 6))


def test_scale_of_arrays(npz):
    """Binary and floating-point images become 0..255; a dark half of a file is left dark."""
    x, y = digits(60)

    def read(**arrays):
        splits, _ = load_npz(npz(**arrays))
        return [splits[name].dataset.pixels for name in ('train', 'test')]

    assert np.array_equal(read(x=(x > 99).astype(np.uint8), y=y)[0], np.where(x > 99, 255, 0))
    assert np.array_equal(read(x=(x / 255).astype(np.float32), y=y)[0], x)
    dark = (x > 99).astype(np.uint8)
    train, test = read(x_train=x, y_train=y, x_test=dark, y_test=y)
    assert np.array_equal(train, x)
    assert np.array_equal(test, dark)


def test_labels_that_are_words(npz):
    x, _ = digits(60)
    splits, classes = load_npz(npz(x=x, y=np.array(['red', 'blue'] * 30)))
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
        "'x' in .* has NaN .* in 2 of 60 images, the first of them number 7": {
            'x': np.where(np.isin(np.arange(60), (7, 9))[:, None, None], np.nan, x / 255), 'y': y,
        },
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
def test_arrays_that_are_no_images(npz, message):
    with pytest.raises(ValueError, match=message):
        load_npz(npz(**bad_arrays()[message]))


def test_npz_fingerprints(npz):
    """They depend on the pixels, the choice and the labels of the split."""

    def prints(x, y, **options):
        splits, _ = load_npz(npz(x=x, y=y), **options)
        return {name: split.fingerprint for name, split in splits.items()}

    x, y = digits(60)
    first = prints(x, y)
    assert first == prints(x, y)
    assert len(set(first.values())) == 3
    other = x.copy()
    other[0, 0, 0] ^= 1
    for changed, count in (
        (prints(other, y), 1),
        (prints(x, np.roll(y, 1)), 3),
        (prints(x.swapaxes(1, 2), y), 3),
    ):
        assert len(set(changed.values()) - set(first.values())) == count


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'folds': 3}, 'has a test split of its own'),
        ({'data_dir': 'nothing.npz'}, 'is not a file; give --data-dir FILE.npz'),
        ({'data_dir': ''}, 'is not a file'),
    ],
    ids=str,
)
def test_npz_options_that_do_not_fit(npz, options, message):
    path = npz()
    with pytest.raises(ValueError, match=message):
        load_npz(options.pop('data_dir', path), **options)


@pytest.mark.parametrize('options', [{'folds': 3, 'fold': 3}, {'folds': 1}, {'folds': 61}], ids=str)
def test_folds_that_do_not_exist(npz, options):
    path = npz(**dict(zip('xy', digits(60), strict=True)))
    with pytest.raises(ValueError, match=f'of {options["folds"]} folds does not exist for 60'):
        load_npz(path, **options)


@pytest.mark.parametrize('content', [b'', b'no archive', b'PK\x03\x04 cut short'])
def test_file_that_is_no_npz(tmp_path, content):
    path = tmp_path / 'arrays.npz'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"'{path}' cannot be read as an .npz file"):
        load_npz(path)


def test_npz_of_one_class(npz):
    x, y = digits(60)
    with pytest.raises(ValueError, match=r"npz' are all of one class, \['3'\]"):
        load_npz(npz(x=x, y=np.full_like(y, 3)))


def test_no_more_images_than_wanted(npz):
    """Always the same ones; validation images are carved from what is taken."""
    path = npz()
    splits, _ = load_npz(path, max_train=40, max_test=12, val_fraction=0.25)
    assert {n: len(s.indices) for n, s in splits.items()} == {'train': 30, 'val': 10, 'test': 12}
    other, _ = load_npz(path, max_train=40, max_test=12, val_fraction=0.25, seed=1)
    both, carved = (
        set(np.concatenate([parts['train'].indices, parts['val'].indices]))
        for parts in (splits, other)
    )
    assert both == carved
    assert np.array_equal(splits['test'].indices, other['test'].indices)
    assert len(load_npz(path, max_test=99)[0]['test'].indices) == 30
