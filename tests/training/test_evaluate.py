"""timm_fisher.training.evaluate: the accuracy by hand, and what is refused."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from conftest import write_images

import timm_fisher
from timm_fisher.training.evaluate import evaluate


def create(**arguments):
    torch.manual_seed(0)
    arguments = {'num_classes': 3, 'img_size': 32, **arguments}
    return timm_fisher.create_model('test_resnet', 'avg', **arguments)


def test_arrays(tmp_path):
    """Of a file of arrays: the accuracy by hand, of any split; other classes are refused."""
    random = np.random.default_rng(0)
    x, y = random.random((60, 9, 9)), np.arange(60) % 3
    path = tmp_path / 'digits.npz'
    np.savez(path, x_train=x[:40], y_train=y[:40], x_test=x[40:], y_test=y[40:])
    torch.manual_seed(0)
    model = timm_fisher.create_model(
        'pixels', 'avg', num_classes=3, backbone_kwargs={'img_size': 9}
    ).eval()
    with torch.no_grad():
        pixels = torch.from_numpy(np.rint(x[40:] * 255) / 255).float()[:, None]
        right = model(pixels).argmax(1) == torch.from_numpy(y[40:])
    metrics = evaluate(model, str(path), 'test', workers=0)
    assert metrics['accuracy'] == right.float().mean().item()
    assert metrics['samples'] == 20
    assert evaluate(model, str(path), 'val', workers=0)['samples'] == 6
    model.pretrained_cfg['label_names'] = ['0', '1', 'two']
    with pytest.raises(ValueError, match=r"are \['0', '1', '2'\], those of the model"):
        evaluate(model, str(path), 'test', workers=0)


def test_needs_one_split_alone(tmp_path):
    """Its labels are the model's names, in whatever order, and one of them may be missing."""
    folder = write_images(tmp_path / 'images', test=3)
    shutil.rmtree(folder / 'test' / 'green')
    (folder / 'test' / 'blue' / '000.png').unlink()
    model = create()
    model.pretrained_cfg['label_names'] = ['red', 'green', 'blue']
    model.forward = lambda x: x.mean((2, 3))  # the strongest colour
    metrics = evaluate(model, str(folder), 'test', workers=0)
    assert metrics == {'accuracy': 1, 'balanced_accuracy': 1, 'samples': 5}


def test_measures_in_evaluation_mode(images):
    """A model that comes from training: no dropout, and the batch norms learn nothing."""
    model = create(drop_rate=0.9)
    expected = evaluate(model.eval(), str(images), 'test', batch_size=51, workers=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    metrics = evaluate(model.train(), str(images), 'test', batch_size=7, workers=0)
    assert metrics == expected
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ('model', 'data', 'error'),
    [
        ({'num_classes': 0}, 'images', 'num_classes=0: it gives embeddings'),
        ({'num_classes': 2}, 'images', r'3 classes .*; the model has 2, without names'),
        ({'num_classes': 1000}, 'images', r'3 classes .*; the model has 1000, without names'),
        ({'names': ['blue', 'red']}, 'images', 'has 3 classes, but 2 names'),
        ({'names': ['blue', 'red', 'x']}, 'images', r"training lacks: \['green'\].*'x'\]"),
        ({}, 'images/test', r"test/test' is no folder; --data-dir must hold test/CLASS/IMAGE\.$"),
        ({}, 'images/x.npz', r"x\.npz' is no file"),
    ],
)  # fmt: skip
def test_refuses(tmp_path, model, data, error):
    write_images(tmp_path / 'images', test=1)
    tiny = create(**{key: value for key, value in model.items() if key != 'names'})
    tiny.pretrained_cfg['label_names'] = model.get('names')
    with pytest.raises(ValueError, match=error):
        evaluate(tiny, str(tmp_path / data), 'test', workers=0)
