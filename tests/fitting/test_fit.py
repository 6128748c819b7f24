"""`fit`: what heads start from, alone and several in one model."""

from __future__ import annotations

import copy

import distributed_checks
import pytest
import torch
from streams import Named, Shards
from test_compose import HEADS, create, images, single
from torch.utils.data import DataLoader, TensorDataset

import timm_fisher


def loader(number=40, batch_size=8):
    return DataLoader(TensorDataset(images(number, 32)), batch_size=batch_size)


def test_fit_is_that_of_each_head_alone(monkeypatch):
    """Whatever a head wants to see: a sample of some images, of all, or pass after pass."""
    monkeypatch.setattr('timm_fisher.heads.sparse_fisher.FIT_SAMPLE', 15)
    model = create()
    alone = [single(model, i) for i in range(len(HEADS))]
    before = copy.deepcopy(model.head.state_dict())
    timm_fisher.fit(model, loader())
    for i, other in enumerate(alone):
        timm_fisher.fit(other, loader())
        torch.testing.assert_close(model.head[i].state_dict(), other.head.state_dict())
    after = model.head.state_dict()
    changed = {key.partition('.')[0] for key in after if not torch.equal(after[key], before[key])}
    assert changed == {'1', '2'}  # avg and gem have nothing to fit


@pytest.mark.parametrize('name', distributed_checks.FITTED)
def test_fit_to_a_stream(name):
    """Of shards: to the bit that to the data set whose images they hold, in their order; in another
    order, and other batches, all but rounding."""
    x, _ = distributed_checks.create_images(29)
    order = torch.randperm(29, generator=torch.Generator().manual_seed(0)).tolist()
    states = []
    for loader in (
        DataLoader(Named(x), 8),
        DataLoader(Shards(x, [range(11), range(11, 29)], named=True), 8),
        DataLoader(Shards(x, [order], named=True), 5),
    ):
        model = distributed_checks.create(name)
        start = copy.deepcopy(model.head.state_dict())
        assert timm_fisher.fit(model, loader) == 29
        states.append(model.head.state_dict())
        assert any(not torch.equal(start[key], value) for key, value in states[-1].items())
    of_set, of_shards, shuffled = states
    torch.testing.assert_close(of_shards, of_set, atol=0, rtol=0)
    torch.testing.assert_close(shuffled, of_set, atol=1e-4, rtol=1e-4)


def test_fit_says_how_many_images_it_saw():
    model = create(head='sparse_fisher', head_kwargs={'reduce_dim': 8, 'code_dim': 4})
    assert timm_fisher.fit(model, loader(), max_images=12) == 12
    for wrong in (0, -3, 2.5):
        with pytest.raises(ValueError, match=f'max_images={wrong} is not a whole number from 1'):
            timm_fisher.fit(model, loader(), max_images=wrong)


def test_fit_in_half_precision():
    """Of images in float32, as loaders give them."""
    model = create(head='sparse_fisher', head_kwargs={'reduce_dim': 8, 'code_dim': 4})
    model.bfloat16()
    before = model.head.dictionary.clone()
    assert timm_fisher.fit(model, loader()) == 40
    assert not torch.equal(model.head.dictionary, before)
    assert timm_fisher.fit(create(head='avg'), loader()) == 0


@pytest.mark.parametrize('head', ['sparse_fisher', HEADS], ids=['one head', 'several'])
def test_fit_from_features(head):
    """Tensors or lists of them, as `forward_features` gives them."""
    arguments = {'head_kwargs': {'reduce_dim': 8, 'code_dim': 4}} if isinstance(head, str) else {}
    model = create(head=head, **arguments)
    other = copy.deepcopy(model)
    with torch.no_grad():
        features = model.forward_features(images(12, 32))
    items = features if isinstance(features, torch.Tensor) else zip(*features, strict=True)
    data = [(item if isinstance(item, torch.Tensor) else list(item), 0) for item in items]
    timm_fisher.fit(model, DataLoader(data, batch_size=4), from_features=True)
    timm_fisher.fit(other, loader(12, 4))
    torch.testing.assert_close(model.head.state_dict(), other.head.state_dict())


def test_a_fit_may_leave_its_loop_early(monkeypatch):
    seen = []

    def look_twice(self, stream):
        for _ in range(2):
            seen.append(next(iter(stream)).shape)

    model = create().train()
    monkeypatch.setattr(type(model.head[0]), 'fit', look_twice)
    timm_fisher.fit(model, loader())
    assert seen == [(8, 96)] * 2
    assert model.backbone.training


def test_each_head_sees_its_own_stage(monkeypatch):
    seen = {}

    def look(self, stream):
        seen[type(self).__name__] = (stream.num_features, next(stream.batches()).shape)

    model = create()
    for head, _ in model.heads:
        monkeypatch.setattr(type(head), 'fit', look)
    timm_fisher.fit(model, loader())
    assert seen == {
        'Average': (96, (8, 1, 96)),
        'SparseFisher': (192, (8, 4, 192)),
        'GMMFisher': (192, (8, 4, 192)),
        'GeM': (48, (8, 16, 48)),
    }
