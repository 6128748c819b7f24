"""What a fit reads: samples that do not depend on batches, and data that cannot be read."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_checks import FITTED
from streams import Named, Shards
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
    parts = ListStream(list(x.split(5)))
    torch.testing.assert_close(parts.sample_images(n, lambda x: x.mean(1)), sample)
    assert sample.shape == (min(n, 12), 3)
    nearest = torch.cdist(sample, x.mean(1))
    assert (nearest.amin(1) < 1e-6).all()
    assert len(nearest.argmin(1).unique()) == len(sample)


def test_sample_is_uniform():
    """Each descriptor of each image is as likely as the others: in 117 or so of 1 000 samples of 7
    of 60."""
    x = torch.arange(60.0).reshape(12, 5, 1)
    counts = torch.zeros(60)
    for start in range(0, 12_000, 12):
        stream = ListStream([x])
        stream.images = lambda n, start=start: iter([(torch.arange(start, start + 12), x)])
        counts[stream.sample(7).flatten().long()] += 1
    assert counts.sum() == 7000
    assert (counts - 7000 / 60).square().sum() / (7000 / 60) < 100  # chi square, 59 freedoms


def test_images_of_one_descriptor():
    x = descriptors()[:, 0]
    assert torch.equal(next(iter(ListStream([x]))), x)


@pytest.mark.parametrize('batches', [[], [torch.zeros(0, 3)], [torch.zeros(3)]], ids=str)
def test_list_stream_needs_descriptors(batches):
    with pytest.raises(ValueError, match='at least one; got'):
        ListStream(batches)


@pytest.mark.parametrize('named', [True, False])
@pytest.mark.parametrize('n', [1, 7, 10, 25, 1000])
def test_sample_of_a_stream(named, n):
    """Nothing but the images matters, or, where they have names, these: not their order, the shards
    and batches, or whether they can be read by index."""
    images = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = timm_fisher.create_model('test_resnet', num_classes=0, stage=-2)
    orders = [[range(10)], [[7, 3], [9, 8, 0], [1, 6, 2, 5, 4]]]
    streams = [
        ModelStream(model, DataLoader(Shards(images, shards, named), batch_size))
        for shards, batch_size in zip(orders, (4, 3), strict=True)
    ]
    if named:
        streams.append(ModelStream(model, DataLoader(Named(images), 3, shuffle=True)))
    sample, *others = [stream.sample(n) for stream in streams]
    assert sample.shape == (min(n, 40), 192)
    for other in others:
        torch.testing.assert_close(other, sample)
    sample, *others = [stream.sample_images(n, lambda x: x.mean(1)) for stream in streams]
    assert sample.shape == (min(n, 10), 192)
    for other in others:
        torch.testing.assert_close(other, sample)
    stream = torch.cat(list(streams[1].batches()))
    torch.testing.assert_close(
        stream, torch.cat(list(streams[0].batches()))[[*itertools.chain(*orders[1])]]
    )


def test_most_images():
    """Of a data set those that a sample would take; of a stream the first."""
    images = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = timm_fisher.create_model('test_resnet', num_classes=0, stage=-2)
    loader = DataLoader(Shards(images, [range(10)], True), 3)
    stream = ModelStream(model, loader, max_images=5)
    assert [len(x) for x in stream.batches()] == [3, 2]
    assert stream.seen == 5
    whole = ModelStream(model, DataLoader(Named(images), 4))
    some = ModelStream(model, DataLoader(Named(images), 4), max_images=5)
    vectors = whole.sample_images(10, lambda x: x.mean(1))
    torch.testing.assert_close(some.sample_images(10, lambda x: x.mean(1)), vectors[:5])
    means = torch.cat([x.mean(1) for x in some.batches()])
    assert (torch.cdist(means, vectors[:5]).amin(1) < 1e-5).all()
    assert (whole.seen, some.seen) == (10, 5)


def test_a_data_set_is_read_where_it_must():
    read = []

    class Counting(Named):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    model = timm_fisher.create_model('test_resnet', num_classes=0, stage=-2)
    ModelStream(model, DataLoader(Counting(torch.randn(50, 3, 32, 32)))).sample(4)
    assert len(read) == 4


@pytest.mark.parametrize(
    ('loader', 'error', 'message'),
    [
        (3, TypeError, 'each time it is iterated over, not int'),
        (iter([torch.zeros(1, 3, 8, 8)]), TypeError, 'not list_iterator'),
        (DataLoader(TensorDataset(torch.zeros(0, 3))), ValueError, 'at least one image'),
        ([], ValueError, 'gave 0 images, .* at least one'),
    ],
    ids=['number', 'once', 'empty', 'nothing'],
)
def test_a_model_stream_needs_images(loader, error, message):
    model = timm_fisher.create_model('test_resnet', num_classes=0)
    with pytest.raises(error, match=message):
        ModelStream(model, loader).sample(3)


@pytest.mark.parametrize('head', ['gmm_fisher', 'smso'])
def test_a_loader_that_gives_its_images_once(head):
    class Once(IterableDataset):
        def __init__(self):
            self.images = iter(torch.randn(40, 3, 32, 32))

        def __iter__(self):
            return self.images

    model = timm_fisher.create_model('test_resnet', head, num_classes=0, stage=-2)
    loader = DataLoader(Once(), 8)

    def fit_twice():
        for _ in range(2):
            timm_fisher.fit(model, loader)

    with pytest.raises(ValueError, match='The loader gave 0 images, and '):
        fit_twice()


def test_a_data_set_is_in_its_order():
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


FIT = """
import resource, sys, torch
from torch.utils.data import DataLoader, IterableDataset
import distributed_checks, timm_fisher

class Generated(IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(NUMBER // 100):
            for image in torch.randn(100, 3, 32, 32, generator=generator):
                yield image, 0

torch.set_num_threads(1)
assert timm_fisher.fit(distributed_checks.create(HEAD), DataLoader(Generated(), 100)) == NUMBER
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ('head', 'number'),
    [*((head, 20_000) for head in FITTED), ('sparse_fisher', 100_000), ('smso', 100_000)],
)
def test_memory_does_not_grow_with_the_stream(head, number):
    """Descriptors of 20 000 images would take 655 MB, of 100 000 five times as much."""
    megabytes = []
    for count in (1_000, number):
        script = f'HEAD, NUMBER = {head!r}, {count}\n{FIT}'
        environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1])}
        done = subprocess.run(
            [sys.executable, '-c', script], env=environment, check=True, stdout=subprocess.PIPE
        )
        megabytes.append(int(done.stdout))
    print(head, number, megabytes)
    assert megabytes[1] - megabytes[0] < 150
