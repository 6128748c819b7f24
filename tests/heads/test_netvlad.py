"""netvlad against a slow float64 reference and hard-assignment VLAD."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clustered import data
from references import netvlad as reference
from torch.nn import functional as F

from timm_fisher import ListStream
from timm_fisher.heads.netvlad import NetVLAD


def head(x: torch.Tensor, **arguments: object) -> NetVLAD:
    torch.manual_seed(0)
    made = NetVLAD(x.shape[-1], **{'reduce_dim': 7, 'clusters': 5, **arguments})
    made.fit(ListStream([x]))
    return made.double()


def numpy_state(made: NetVLAD) -> dict:
    return {key: value.numpy() for key, value in made.state_dict().items()}


def distances(made: NetVLAD, x: torch.Tensor) -> torch.Tensor:
    """Squared, of the descriptors `[M, K]` to the centroids, in rising order."""
    rows = x.flatten(0, 1)
    y = F.normalize(rows if made.reduce is None else made.reduce(rows), dim=1)
    return torch.cdist(y, made.centroids).square().sort(1).values.detach()


@pytest.mark.parametrize('clusters', [1, 2, 5])
@pytest.mark.parametrize('reduce_dim', [None, 7])
def test_equals_reference(reduce_dim, clusters):
    x = data()
    made = head(x, reduce_dim=reduce_dim, clusters=clusters)
    with torch.no_grad():  # away from the start, where the assignment follows the centroids
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, dtype=torch.float64)
    expected = reference.pool(numpy_state(made), x[:4].numpy(), {})
    np.testing.assert_allclose(made(x[:4]).detach(), expected, rtol=1e-9, atol=1e-11)


def test_large_alpha_is_hard_assignment():
    x = data()
    made = head(x)
    with torch.no_grad():
        made.assign.weight *= 1e5
        made.assign.bias *= 1e5
    expected = reference.pool(numpy_state(made), x[:4].numpy(), {}, assign=reference.hard)
    np.testing.assert_allclose(made(x[:4]).detach(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('reduce_dim', [None, 7])
def test_start_assigns_by_distance(reduce_dim):
    x = data()
    made = head(x, reduce_dim=reduce_dim)
    apart = distances(made, x)
    gap = (apart[:, 1] - apart[:, 0]).mean()
    alpha = np.log(100) / gap
    torch.testing.assert_close(made.assign.weight, 2 * alpha * made.centroids, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        made.assign.bias, -alpha * made.centroids.square().sum(1), rtol=1e-5, atol=1e-6
    )
    # At the mean gap the second nearest centroid weighs 1/100 of the nearest.
    assert torch.exp(-alpha * gap).item() == pytest.approx(0.01)


def test_fit_finds_the_clusters():
    x = data()
    made = head(x, reduce_dim=None, clusters=6)
    y = F.normalize(x.flatten(0, 1), dim=1)
    assert distances(made, x)[:, 0].mean() < 0.2 * (y - y.mean(0)).square().sum(1).mean()


def test_fit_reduces_by_pca():
    x = data()
    made = head(x)
    y = made.reduce(x).detach().flatten(0, 1)
    torch.testing.assert_close(y.mean(0), torch.zeros(7).double(), rtol=0, atol=1e-5)
    covariance = np.cov(y.numpy().T)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-5)
    assert (np.diff(np.diag(covariance)) < 0).all()


@pytest.mark.parametrize('reduce_dim', [None, 7])
def test_of_any_scale(reduce_dim):
    x = data()
    expected = head(x, reduce_dim=reduce_dim)(x)
    for scale in (1e-6, 1e4):
        z = head(x * scale, reduce_dim=reduce_dim)(x * scale)
        torch.testing.assert_close(z, expected, rtol=1e-3, atol=1e-4)


def test_normalised_by_cluster_and_over_all():
    z = head(data())(data()).detach()
    torch.testing.assert_close(z.norm(dim=1), torch.ones(20).double())
    lengths = z.unflatten(1, (5, 7)).norm(dim=2)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 5**-0.5))


def test_a_zero_descriptor_and_an_empty_cluster():
    made = head(data(), reduce_dim=None).float()
    with torch.no_grad():
        made.assign.bias[2] -= 1e4  # nothing is assigned to this cluster
    x = data().float()[:3]
    x[:, 4] = 0
    x.requires_grad_()
    z = made(x)
    z.square().mul(torch.arange(z.shape[1])).sum().backward()
    assert z.unflatten(1, (5, 12))[:, 2].abs().max() == 0
    # As near to zero as the floor, a descriptor's gradient is of the order of 1e4 of the longest's.
    assert 0 < x.grad[:, 4].abs().max() < 1e5 * x.grad[:, 0].abs().max()
    for parameter in (x, *made.parameters()):
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize('x', [torch.zeros(3, 4, 12), torch.ones(3, 4, 12)], ids=['zero', 'alike'])
@pytest.mark.parametrize('reduce_dim', [None, 7])
def test_descriptors_all_alike(x, reduce_dim):
    made = head(x, reduce_dim=reduce_dim)
    for model in (made, made.half()):
        z = model(data())
        assert torch.isfinite(z).all()
        assert z.norm(dim=1).min() > 0.9


def test_fewer_descriptors_than_clusters():
    made = head(data(1, 3), clusters=40)
    assert torch.isfinite(made(data())).all()
    assert made.assign.weight.abs().max() < 1e4


def test_never_builds_every_residual():
    """[B, N, K, d] would hold 32 times as many values as anything that is kept for backward."""
    made = NetVLAD(64, reduce_dim=None, clusters=32)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        made(torch.randn(2, 50, 64, requires_grad=True))
    assert max(sizes) <= 2 * 50 * 64


def test_reduction_never_exceeds_the_channels():
    assert NetVLAD(24, reduce_dim=None, clusters=5).out_features == 24 * 5
    assert NetVLAD(24, reduce_dim=128, clusters=5).out_features == 24 * 5
    assert NetVLAD(24, reduce_dim=8, clusters=5).out_features == 8 * 5


def test_fit_refuses_what_is_not_finite():
    x = data()
    x[3, 2, 1] = torch.nan
    for reduce_dim in (None, 7):
        with pytest.raises(ValueError, match='NaN or infinite'):
            head(x, reduce_dim=reduce_dim)
