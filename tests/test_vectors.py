"""`embed`: vectors of images however they are given."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import timm_fisher


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    options = {'num_classes': 3, 'img_size': 32, 'pre_norm': True}
    return timm_fisher.create_model('resnet10t', head='avg', **options)


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('photographs')
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 255, (40, 50, 3), np.uint8)) for _ in range(5)]
    for i, image in enumerate(images):
        image.save(folder / f'{i}.png')
    return images, sorted(folder.iterdir())


def test_vectors(model, photographs):
    """The pooled vector of each image, of unit length, whatever the images come as."""
    images, paths = photographs
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    x = torch.stack([transform(image) for image in images])
    model.train()
    vectors = timm_fisher.embed(model, x, batch_size=2)
    assert model.training
    with torch.no_grad():
        expected = model.eval().pool(model.forward_features(x))
    expected /= expected.norm(dim=1, keepdim=True)
    assert torch.allclose(vectors, expected, atol=1e-6)
    assert not vectors.requires_grad
    torch.nn.Linear(vectors.shape[1], 2)(vectors).sum().backward()  # something may be trained on it
    labels = torch.arange(5)
    for given in (
        images, paths, [str(path) for path in paths], DataLoader(x, 3),
        DataLoader(TensorDataset(x, labels), 3),
    ):  # fmt: skip
        again = timm_fisher.embed(model, given, batch_size=3, workers=0)
        assert torch.allclose(again, vectors, atol=1e-6)


def test_half_precision(photographs):
    """Of files and of images in float32."""
    torch.manual_seed(0)
    options = {'num_classes': 0, 'img_size': 32}
    model = timm_fisher.create_model('resnet10t', head='avg', **options).eval()
    expected = timm_fisher.embed(model, photographs[1], workers=0)
    vectors = timm_fisher.embed(model.bfloat16(), photographs[1], workers=0)
    assert vectors.dtype == torch.float32
    assert torch.allclose(vectors, expected, atol=2e-2)


def test_mistakes(model, photographs, tmp_path):
    """Named."""
    paths = photographs[1]
    text = tmp_path / 'text.png'
    text.write_text('no image')
    with pytest.raises(ValueError, match=r'text.png.* cannot be read as an image'):
        timm_fisher.embed(model, [paths[0], text], workers=0)
    with pytest.raises(ValueError, match='no images'):
        timm_fisher.embed(model, [])
    with pytest.raises(ValueError, match='no images'):
        timm_fisher.embed(model, torch.empty(0, 3, 32, 32))
    for one in (str(paths[0]), paths[0], photographs[0][0]):
        with pytest.raises(TypeError, match='give a list of files'):
            timm_fisher.embed(model, one)
    with pytest.raises(TypeError, match=r'no batch of a loader. Of files give a list, as in'):
        timm_fisher.embed(model, paths[0].parent.glob('*.png'))
    with pytest.raises(RuntimeError):  # as the model itself says it
        timm_fisher.embed(model, torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    x = torch.zeros(5, 3, 32, 32)
    x[3, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match='vector of image 3 is NaN'):
        timm_fisher.embed(model, x, batch_size=2)
