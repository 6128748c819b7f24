"""Exact search: as all pairs in whole numbers have it, by both backends."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from timm_fisher.retrieval import search
from timm_fisher.retrieval.search import Search


def by_hand(queries, gallery, k):
    """Python's whole numbers, one pair after the other; ties by index."""
    q, g = ([[round(float(v) * 2**25) for v in row] for row in x] for x in (queries, gallery))
    rows = []
    for query in q:
        similar = [sum(a * b for a, b in zip(query, row, strict=True)) for row in g]
        best = sorted(range(len(g)), key=lambda i: (-similar[i], i))[:k]
        rows.append([(i, similar[i] / 2**50) for i in best])
    indices = torch.tensor([[i for i, _ in row] for row in rows])
    return torch.tensor([[s for _, s in row] for row in rows], dtype=torch.float64), indices


def tied(n, dim, seed=0):
    """Random vectors, a third of them twice; some a rounding error apart."""
    torch.manual_seed(seed)
    x = F.normalize(torch.randn(n, dim), dim=1)
    x[torch.randperm(n)[: n // 3]] = x[torch.randperm(n)[: n // 3]]
    x[1], x[2] = x[0], F.normalize(x[0] * (1 + 1e-7 * torch.randn(dim)), dim=0)
    return x


@pytest.mark.parametrize('backend', ['torch', 'faiss'])
@pytest.mark.parametrize('k', [1, 7, 200])
def test_nearest(backend, k, monkeypatch):
    if backend == 'faiss':
        pytest.importorskip('faiss')
    gallery = tied(90, 24)
    queries = torch.cat([gallery[:3], tied(8, 24, seed=1)])
    expected = by_hand(queries, gallery, k)
    for block in (2**24, 100):  # in one go, and in the smallest parts
        monkeypatch.setattr(search, 'BLOCK', block)
        similarities, indices = Search(gallery, backend=backend)(queries, k)
        assert torch.equal(indices, expected[1])
        assert torch.equal(similarities, expected[0])


@pytest.mark.parametrize('backend', ['torch', 'faiss'])
def test_all_the_same(backend):
    if backend == 'faiss':
        pytest.importorskip('faiss')
    gallery = F.normalize(torch.ones(500, 30), dim=1)
    _, indices = Search(gallery, backend=backend)(gallery[:2], 5)
    assert indices.tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize('backend', ['torch', 'faiss'])
def test_errors_of_float32_are_repaired(backend):
    """Candidates whose order float32 does not tell."""
    if backend == 'faiss':
        pytest.importorskip('faiss')
    torch.manual_seed(0)
    near = F.normalize(torch.ones(1, 512) + 1e-6 * torch.randn(200, 512), dim=1)
    query = F.normalize(torch.randn(1, 512) + 1, dim=1)
    assert torch.equal(Search(near, backend=backend)(query, 10)[1], by_hand(query, near, 10)[1])
    assert not torch.equal((query @ near.T).topk(10).indices, by_hand(query, near, 10)[1])


def test_autocast():
    """Candidates are found in float32 where a caller asks for half precision."""
    torch.manual_seed(0)
    gallery = F.normalize(torch.randn(2000, 16), dim=1)
    queries = F.normalize(torch.randn(500, 16), dim=1)
    expected = Search(gallery)(queries, 10)[1]
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(Search(gallery)(queries, 10)[1], expected)


def test_half_precision():
    gallery = tied(40, 16).half()
    _, indices = Search(gallery)(gallery.float()[5:6], 3)
    assert torch.equal(indices, by_hand(gallery[5:6].float(), gallery.float(), 3)[1])


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend='fiass' is neither 'torch' nor 'faiss'"):
        Search(torch.eye(3), backend='fiass')


def test_mistakes(monkeypatch):
    gallery = tied(9, 4)
    with pytest.raises(ValueError, match=r'vector 3 is 2, not 1'):
        Search(torch.cat([gallery[:3], 2 * gallery[3:]]))
    with pytest.raises(ValueError, match='vector 0 is nan'):
        Search(gallery)(gallery * np.nan, 1)
    with pytest.raises(ValueError, match=r'The vectors to search are .* of shape \(0, 4\)'):
        Search(gallery[:0])
    with pytest.raises(ValueError, match='2 dimensions, the vectors to search 4'):
        Search(gallery)(F.normalize(gallery[:, :2], dim=1), 1)
    with pytest.raises(ValueError, match='k is 0'):
        Search(gallery)(gallery, 0)
    monkeypatch.setitem(sys.modules, 'faiss', None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "timm_fisher\[retrieval\]"'):
        Search(gallery, backend='faiss')
