"""What a fit reads: samples that do not depend on batches, and data that cannot be read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import timm_fisher
from timm_fisher import ListStream
from timm_fisher.fitting.stream import ModelStream


def descriptors(images: int = 12, number: int = 5) -> Tensor:
    return torch.randn(images, number, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('n', [1, 7, 30, 60, 100])
def test_sample_does_not_depend_on_batches(n):
    x = descriptors()
    sample = ListStream([x]).sample(n)
    assert torch.equal(ListStream(list(x.split(5))).sample(n), sample)
    assert sample.shape == (min(n, 60), 3)
    rows = {tuple(row) for row in x.flatten(0, 1).tolist()}
    chosen = [tuple(row) for row in sample.tolist()]
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= rows
    assert torch.equal(ListStream([x]).sample(n), sample)


@pytest.mark.parametrize('n', [1, 7, 12, 100])
def test_sample_of_images(n):
    x = descriptors()
    sample = ListStream([x]).sample_images(n, lambda x: x.mean(1))
    assert torch.equal(ListStream(list(x.split(5))).sample_images(n, lambda x: x.mean(1)), sample)
    assert sample.shape == (min(n, 12), 3)
    nearest = torch.cdist(sample, x.mean(1))
    assert (nearest.amin(1) < 1e-6).all()
    assert (nearest.argmin(1).diff() > 0).all()  # in the order of the images, none of them twice


def test_images_of_one_descriptor():
    x = descriptors()[:, 0]
    assert torch.equal(next(iter(ListStream([x]))), x)


@pytest.mark.parametrize('batches', [[], [torch.zeros(0, 3)], [torch.zeros(3)]], ids=str)
def test_list_stream_needs_descriptors(batches):
    with pytest.raises(ValueError, match='at least one; got'):
        ListStream(batches)


class Endless(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ('loader', 'error', 'message'),
    [
        ([torch.zeros(1, 3, 8, 8)], TypeError, 'got list over NoneType'),
        (DataLoader(Endless()), TypeError, 'got DataLoader over Endless'),
        (DataLoader(TensorDataset(torch.zeros(0, 3))), ValueError, 'at least one image'),
    ],
    ids=['list', 'iterable', 'empty'],
)
def test_a_model_stream_needs_a_data_set(loader, error, message):
    model = timm_fisher.create_model('test_resnet', num_classes=0)
    with pytest.raises(error, match=message):
        ModelStream(model, loader)


def test_a_model_stream_is_in_the_order_of_the_data_set():
    """Whatever the loader's sampler and batch size."""
    model = timm_fisher.create_model('test_resnet', num_classes=0)
    images = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(images), batch_size=3, shuffle=True)
    stream = ModelStream(model.train(), loader)
    x = torch.cat(list(stream.batches()))
    assert model.training
    with torch.no_grad():
        expected = model.eval().forward_features(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(x, expected)
    ((positions, part),) = stream.read([2, 9])
    assert list(positions) == [0, 1]
    torch.testing.assert_close(part, expected[[2, 9]])
    assert len(stream) == 10
