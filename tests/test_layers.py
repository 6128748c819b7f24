"""Projections of pooled vectors: their fit, in models, saved and loaded."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from sklearn.decomposition import PCA
from small_models import create, images
from torch.utils.data import DataLoader

import timm_fisher
from timm_fisher.layers import Projection


def vectors(n, dimensions):
    """Of falling variances."""
    random = np.random.default_rng(0)
    x = random.normal(size=(n, dimensions)) * 0.9 ** np.arange(dimensions) + 0.3
    return torch.from_numpy(x)


@pytest.mark.parametrize('n', [20, 200], ids=['fewer', 'more'])
def test_pca(n):
    """Equal to scikit-learn's up to signs, without and with whitening, and in between; more and
    fewer vectors than dimensions."""
    x, kept = vectors(n, 50), 7
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    for whiten in (0.0, 0.5, 1.0):
        projection = Projection(50, kept).double()
        projection.fit(x, whiten)
        given = projection(3 * x).detach().numpy()
        pca = PCA(kept, svd_solver='full').fit(unit)
        expected = pca.transform(unit) / pca.explained_variance_ ** (whiten / 2)
        signs = np.sign((given * expected).sum(0))
        np.testing.assert_allclose(given, signs * expected, rtol=0, atol=1e-9)
        if whiten == 1.0:
            whitened = PCA(kept, svd_solver='full', whiten=True).fit_transform(unit)
            np.testing.assert_allclose(abs(given), abs(whitened), rtol=0, atol=1e-9)


def test_vectors_that_do_not_differ():
    """Along some axes, or at all: finite, and only rounding is left along these axes."""
    for x in (torch.ones(30, 9), vectors(30, 9) * (torch.arange(9) < 2)):
        projection = Projection(9, 4).double()
        projection.fit(x, 1.0)
        given = projection(x.double())
        assert given.isfinite().all()
        assert given.abs().max() < 10


def test_mistakes():
    with pytest.raises(ValueError, match='projection is 9, but the pooled vectors have 9'):
        Projection(9, 9)
    projection = Projection(9, 4)
    with pytest.raises(ValueError, match=r'to 4 dimensions is fitted to more .* here are 4'):
        projection.fit(torch.rand(4, 9), 0.0)
    with pytest.raises(ValueError, match=r'whiten is 1\.5'):
        projection.fit(torch.rand(9, 9), 1.5)


@pytest.mark.parametrize('head', ['avg', 'avg + sparse_fisher@-2'])
def test_of_a_model(head, tmp_path):
    """Fitted to what its heads give, images or features alike, and saved with it."""
    model = create(head=head, projection=6)
    assert model.head_hidden_size == model.classifier.in_features == 6
    x = torch.randn(24, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    timm_fisher.fit(model, DataLoader(x, 5), whiten=1.0)
    with torch.no_grad():
        pooled = model.pool_unprojected(model.forward_features(x)).numpy()
        projected = model.pool(model.forward_features(x))
        features = model.forward_features(x)
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    expected = PCA(6, whiten=True, svd_solver='full').fit_transform(pooled.astype(np.float64))
    np.testing.assert_allclose(abs(projected.numpy()), abs(expected), atol=2e-3)

    several = isinstance(features, list)
    every = map(list, zip(*features, strict=True)) if several else features
    rows = [(each, 0) for each in every]
    again = create(head=head, projection=6)
    torch.manual_seed(0)
    timm_fisher.fit(again, DataLoader(rows, 5), from_features=True, whiten=1.0)
    torch.testing.assert_close(again.pool(features), projected, atol=1e-3, rtol=0)

    timm_fisher.save_model(model, tmp_path / 'saved')
    loaded = timm.create_model(f'local-dir:{tmp_path}/saved', pretrained=True).eval()
    assert torch.equal(loaded(images()), model(images()))
    assert torch.equal(timm_fisher.embed(loaded, x), timm_fisher.embed(model, x))
    assert timm_fisher.embed(model, x).shape == (24, 6)
