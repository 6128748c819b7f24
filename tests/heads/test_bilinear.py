"""bilinear against the full second-moment matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from references import bilinear as reference

from timm_fisher import ListStream
from timm_fisher.heads.bilinear import Bilinear
from timm_fisher.numerics.linalg import power_l2


def data(images: int = 6, number: int = 15, channels: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=torch.Generator().manual_seed(7))
    return (torch.randn(images, number, channels, generator=generator) @ mixing + 2).double()


def head(x: torch.Tensor, **arguments: object) -> Bilinear:
    torch.manual_seed(0)
    made = Bilinear(x.shape[-1], **{'reduce_dim': 5, **arguments})
    made.fit(ListStream([x]))
    return made.double()


def numpy_state(made: Bilinear) -> dict:
    return {key: value.numpy() for key, value in made.state_dict().items()}


@pytest.mark.parametrize('reduce_dim', [None, 5])
def test_equals_reference(reduce_dim):
    x = data()
    made = head(x, reduce_dim=reduce_dim, normalize=False)
    expected = reference.pool(numpy_state(made), x.numpy(), dict(normalize=False))
    np.testing.assert_allclose(made(x).detach(), expected, rtol=1e-12, atol=1e-12)
    made.normalize = True
    # The square root has a floor; it shows in entries near zero.
    expected = reference.pool(numpy_state(made), x.numpy(), dict(normalize=True))
    np.testing.assert_allclose(made(x).detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('normalize', [False, True])
def test_inner_products_are_those_of_full_matrices(normalize):
    x = data()
    made = head(x, normalize=normalize)
    z = made(x).detach()
    full = reference.full(numpy_state(made), x.numpy(), dict(normalize=False))
    full = torch.from_numpy(full).flatten(1)
    full = power_l2(full) if normalize else full
    torch.testing.assert_close(z @ z.T, full @ full.T, rtol=1e-12, atol=1e-12)


def test_normalised_to_length_one():
    for scale in (1e-6, 1.0, 1e4):
        length = head(data())(data() * scale).norm(dim=1)
        torch.testing.assert_close(length, torch.ones_like(length), rtol=1e-12, atol=0)


def test_fit_rotates_and_scales_but_keeps_the_mean():
    x = data()
    made = head(x)
    weight = made.reduce.weight.detach()
    gram = weight @ weight.T
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(5).double(), rtol=1e-6, atol=1e-7)
    y = made.reduce(x).flatten(0, 1)
    assert y.square().sum(1).mean().item() == pytest.approx(1, rel=1e-6)
    # The rows are the leading directions of the covariance, not of the second moment.
    rows = x.flatten(0, 1)
    _, vectors = np.linalg.eigh(np.cov(rows.T.numpy()))
    cosines = np.abs(vectors[:, ::-1][:, :5].T @ weight.numpy().T) / np.sqrt(gram[0, 0].item())
    np.testing.assert_allclose(cosines, np.eye(5), atol=1e-6)
    assert y.mean(0).norm() > 0.1


@pytest.mark.parametrize('normalize', [False, True])
def test_a_fit_does_not_depend_on_the_backbones_scale(normalize):
    x = data()
    expected = head(x, normalize=normalize)(x)
    for scale in (1e-4, 1e4):
        z = head(x * scale, normalize=normalize)(x * scale)
        torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-6)


def test_zero_has_a_moderate_gradient():
    made = head(data()).float()
    x = torch.zeros(2, 4, 12, requires_grad=True)
    made(x).sum().backward()
    assert made(x).abs().max() == 0
    assert x.grad.abs().max() == 0


def test_without_reduction_nothing_is_fitted():
    made = head(data(), reduce_dim=None)
    assert made.state_dict() == {}
    assert made.out_features == 12 * 13 // 2
    assert Bilinear(12, reduce_dim=128).out_features == 12 * 13 // 2
    assert Bilinear(12, reduce_dim=5).out_features == 15


def test_on_meta():
    with torch.device('meta'):
        made = Bilinear(12, reduce_dim=5)
        assert made(torch.empty(2, 7, 12)).shape == (2, 15)
    assert made.half().triangle.index.dtype == torch.int64


def test_fit_refuses_what_is_not_finite():
    x = data()
    x[3, 2, 1] = torch.nan
    with pytest.raises(ValueError, match='NaN or infinite'):
        head(x)
