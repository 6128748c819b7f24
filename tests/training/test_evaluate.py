"""Accuracy of a model on a split of a data set."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import write_images
from limits import within
from sklearn.metrics import accuracy_score, balanced_accuracy_score

import timm_fisher
from timm_fisher.training.evaluate import accuracies, evaluate


def create_tiny(**arguments):
    torch.manual_seed(0)
    arguments = {'num_classes': 3, 'img_size': 32, **arguments}
    return timm_fisher.create_model('test_resnet', 'avg', **arguments)


def test_accuracies():
    """Classes that the labels lack do not count in the balanced one."""
    labels, predicted = [0, 0, 0, 2, 2], [0, 0, 1, 3, 2]
    assert accuracies(labels, predicted) == {
        'accuracy': 0.6, 'balanced_accuracy': pytest.approx((2 / 3 + 1 / 2) / 2), 'samples': 5,
    }  # fmt: skip
    random = np.random.default_rng(0)
    labels, predicted = random.integers(0, 4, (2, 100)).tolist()
    assert accuracies(labels, predicted) == {
        'accuracy': accuracy_score(labels, predicted),
        'balanced_accuracy': balanced_accuracy_score(labels, predicted),
        'samples': 100,
    }


def test_arrays(tmp_path):
    """The accuracy by hand; other classes are refused, and what need not be a test image."""
    random = np.random.default_rng(0)
    x, y = random.random((60, 9, 9)), np.arange(60) % 3
    path = str(tmp_path / 'digits.npz')
    np.savez(path, x_train=x[:40], y_train=y[:40], x_test=x[40:], y_test=y[40:])
    torch.manual_seed(0)
    pixels = {'backbone_kwargs': {'img_size': 9}}
    model = timm_fisher.create_model('pixels', 'avg', num_classes=3, **pixels).eval()
    with torch.no_grad():
        images = torch.from_numpy(np.rint(x[40:] * 255) / 255).float()[:, None]
        right = model(images).argmax(1) == torch.from_numpy(y[40:])
    result = evaluate(model, path, 'test', workers=0)
    assert result['accuracy'] == right.float().mean().item()
    assert result['samples'] == 20
    with pytest.raises(ValueError, match='which others were val images depended on the run'):
        evaluate(model, path, 'val', workers=0)
    np.savez(tmp_path / 'whole.npz', x=x, y=y)
    with pytest.raises(ValueError, match=r"Of '\S+whole.npz' only test images in arrays of"):
        evaluate(model, str(tmp_path / 'whole.npz'), 'test', workers=0)
    model.pretrained_cfg['label_names'] = ['0', '1', 'two']
    with pytest.raises(
        ValueError, match=r"\['0', '1', '2'\]; the model has 3, \['0', '1', 'two'\]"
    ):
        evaluate(model, path, 'test', workers=0)


def test_one_split_is_enough(tmp_path):
    """Its labels are the model's names, in whatever order, and one of them may be missing."""
    folder = write_images(tmp_path / 'images', test=3)
    shutil.rmtree(folder / 'test' / 'green')
    (folder / 'test' / 'blue' / '000.png').unlink()
    model = create_tiny()
    model.pretrained_cfg['label_names'] = ['red', 'green', 'blue']
    model.forward = lambda x: x.mean((2, 3))  # the strongest colour
    result = evaluate(model, str(folder), 'test', workers=0)
    assert result == {'accuracy': 1, 'balanced_accuracy': 1, 'samples': 5}


def test_in_evaluation_mode(images):
    """A model that comes from training: no dropout, and the batch norms learn nothing."""
    model = create_tiny(drop_rate=0.9)
    expected = evaluate(model.eval(), str(images), 'test', batch_size=51, workers=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert evaluate(model.train(), str(images), 'test', batch_size=7, workers=0) == expected
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert model.training


def test_output_that_is_nan_names_the_image(tmp_path):
    """An accuracy would count it as some class."""
    folder = write_images(tmp_path / 'images', test=2)
    model = create_tiny()
    forward, batches = model.forward, iter([0, 1, 0])
    # The second image of the second batch.
    model.forward = lambda x: forward(x) / torch.tensor([1.0, 1 - next(batches)])[:, None]
    bad = folder / 'test/green/001.png'
    with pytest.raises(ValueError, match=f"NaN or infinite for image '{bad}'. If nothing is wrong"):
        evaluate(model, str(folder), 'test', batch_size=2, workers=0)
    model.forward = lambda x: forward(x) * torch.nan
    with pytest.raises(ValueError, match=r"for image '\S+/blue/000.png' and 5 more of 6\."):
        evaluate(model, str(folder), 'test', workers=0)


def test_fifo_among_the_images(tmp_path):
    folder = write_images(tmp_path / 'images', test=2)
    os.mkfifo(folder / 'test/red/x.png')
    with within(5), pytest.raises(ValueError, match=r'test/red/x.png .*not a regular file'):
        evaluate(create_tiny(), str(folder), 'test', workers=0)


@pytest.mark.parametrize(
    ('model', 'data', 'error'),
    [
        ({'num_classes': 0}, 'images', 'num_classes=0: it gives embeddings'),
        ({'num_classes': 2}, 'images', r'3 classes .*; the model has 2, without names'),
        ({'num_classes': 1000}, 'images', r'3 classes .*; the model has 1000, without names'),
        ({'names': ['blue', 'red']}, 'images', 'has 3 classes, but 2 names'),
        ({'names': ['blue', 'red', 'x']}, 'images', r"not those of training: \['green'\].*'x'\]"),
        ({}, 'images/test', r"test/test' is not a folder; .* must hold test/CLASS/IMAGE\.$"),
        ({}, 'images/x.npz', r"x\.npz' is not a file"),
    ],
)  # fmt: skip
def test_refuses(tmp_path, model, data, error):
    write_images(tmp_path / 'images', test=1)
    tiny = create_tiny(**{key: value for key, value in model.items() if key != 'names'})
    tiny.pretrained_cfg['label_names'] = model.get('names')
    with pytest.raises(ValueError, match=error):
        evaluate(tiny, str(tmp_path / data), 'test', workers=0)


def test_an_evaluated_model_can_be_trained(images):
    model = timm_fisher.create_model('test_resnet', num_classes=3, img_size=32)
    evaluate(model, str(images), 'test', workers=0)
    model(torch.zeros(2, 3, 32, 32)).sum().backward()
    assert model.backbone.conv1[0].weight.grad is not None
