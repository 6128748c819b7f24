"""Exact search, against sorting."""

from __future__ import annotations

import pytest
import torch

from timm_fisher.retrieval import nearest_neighbours, search


def vectors(n, seed):
    """Of unit length, exact in binary, with many equal ones among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, (n, 4), generator=generator) - 0.5


@pytest.mark.parametrize('held', [1, 100, search.HELD])
@pytest.mark.parametrize('k', [1, 7, 30, 99])
def test_neighbours(k, held, monkeypatch):
    """The most similar first, of equal ones the lower place; a gallery that is smaller than k, and
    few similarities at a time."""
    monkeypatch.setattr(search, 'HELD', held)
    queries, gallery = vectors(13, 0), vectors(30, 1)
    values, places = nearest_neighbours(queries, gallery, k)
    assert values.shape == places.shape == (13, min(k, 30))
    for query, of_query, where in zip(queries, values.tolist(), places.tolist(), strict=True):
        pairs = sorted((-float(query @ x), i) for i, x in enumerate(gallery))[:k]
        assert where == [i for _, i in pairs]
        assert of_query == [-s for s, _ in pairs]


def test_mistakes():
    x = vectors(3, 0)
    with pytest.raises(ValueError, match='k is 0'):
        nearest_neighbours(x, x, 0)
    with pytest.raises(ValueError, match=r'got \(\(3, 4\), \(3, 2\)\)'):
        nearest_neighbours(x, x[:, :2], 1)
    with pytest.raises(ValueError, match='nothing to search'):
        nearest_neighbours(x, x[:0], 1)
