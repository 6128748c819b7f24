"""K-means against scikit-learn, and where there is little to cluster."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from timm_fisher.numerics.clustering import kmeans


def blobs(count: int = 1500, channels: int = 6, centres: int = 10, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centre = 3 * torch.randn(centres, channels, generator=generator, dtype=torch.float64)
    chosen = torch.randint(centres, (count,), generator=generator)
    noise = torch.randn(count, channels, generator=generator, dtype=torch.float64)
    return centre[chosen] + noise


def inertia(rows: torch.Tensor, centroids: torch.Tensor) -> float:
    return torch.cdist(rows, centroids).min(1).values.square().sum().item()


@pytest.mark.parametrize('offset', [0, 1e4])
def test_as_good_as_scikit_learn(offset):
    rows = blobs() + offset
    ours = [inertia(rows, kmeans(rows, 12, seed=seed)) for seed in range(8)]
    theirs = [KMeans(12, n_init=1, random_state=seed).fit(rows).inertia_ for seed in range(8)]
    assert np.mean(ours) < 1.02 * np.mean(theirs)


def test_a_fixed_point_of_lloyd():
    rows = blobs()
    centroids = kmeans(rows, 7)
    nearest = torch.cdist(rows, centroids).argmin(1)
    means = torch.stack([rows[nearest == k].mean(0) for k in range(7)])
    torch.testing.assert_close(centroids, means, rtol=1e-12, atol=1e-12)


def test_repeatable_and_of_any_scale():
    rows = blobs(400)
    assert torch.equal(kmeans(rows, 9), kmeans(rows, 9))
    assert not torch.equal(kmeans(rows, 9), kmeans(rows, 9, seed=1))
    for scale in (2.0**-40, 2.0**40):
        torch.testing.assert_close(kmeans(rows * scale, 9) / scale, kmeans(rows, 9))
    assert kmeans(rows.float(), 9).dtype == torch.float64


def test_chunks_make_no_difference(monkeypatch):
    rows = blobs(300)
    expected = kmeans(rows, 9)
    monkeypatch.setattr('timm_fisher.numerics.clustering.DISTANCES', 9 * 7)
    torch.testing.assert_close(kmeans(rows, 9), expected, rtol=1e-12, atol=1e-12)


def test_a_cluster_that_empties_takes_the_worst_row(monkeypatch):
    rows = torch.tensor([[0.0], [1.0], [10.0], [30.0]], dtype=torch.float64)
    far = torch.tensor([[0.0], [1000.0], [2000.0]], dtype=torch.float64)
    monkeypatch.setattr('timm_fisher.numerics.clustering._kmeans_seeds', lambda *_: far)
    assert kmeans(rows, 3).flatten().sort().values.tolist() == [0.5, 10, 30]


@pytest.mark.parametrize('count', [1, 3, 50])
def test_fewer_different_rows_than_clusters(count):
    distinct = blobs(3)[:count]
    rows = distinct[torch.arange(count) % len(distinct)]
    centroids = kmeans(rows, 8)
    assert centroids.shape == (8, 6)
    # Each row is a centroid, each centroid lies at a row, and no two coincide unless all do.
    assert torch.cdist(rows, centroids).min(1).values.max() < 1e-6
    assert torch.cdist(centroids, rows).min(1).values.max() < 0.1
    if len(distinct) > 1:
        assert torch.pdist(centroids).min() > 0


@pytest.mark.parametrize('value', [0.0, 0.1, 1e30])
def test_rows_all_alike(value):
    rows = torch.full((20, 4), value, dtype=torch.float64)
    torch.testing.assert_close(kmeans(rows, 5), rows[:5], rtol=1e-12, atol=0)


def test_one_cluster_is_the_mean():
    rows = blobs()
    torch.testing.assert_close(kmeans(rows, 1), rows.mean(0, keepdim=True))


def test_refuses_what_is_not_finite():
    rows = blobs()
    rows[3, 2] = torch.inf
    with pytest.raises(ValueError, match='NaN or infinite'):
        kmeans(rows, 3)
