"""The differentiable pieces that heads share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from references import isqrt_cov
from torch import Tensor

from timm_fisher.head import MOST_STEPS
from timm_fisher.numerics.linalg import (
    at_least_float32,
    covariance_root,
    gram_root,
    matrix_root,
    newton_schulz,
    power_l2,
    without_autocast,
)


def test_power_l2_is_the_signed_root_of_unit_length():
    z = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = z.sign() * z.abs().sqrt()
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(power_l2(z), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(power_l2(z).norm(dim=1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize('scale', [1e-12, 1.0, 1e12])
def test_power_l2_does_not_depend_on_scale(scale):
    z = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(power_l2(z * scale), power_l2(z))


def test_power_l2_gradient():
    z = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(power_l2, z.requires_grad_())


@pytest.mark.parametrize('zeros', [1, 7])
def test_power_l2_gradient_is_bounded_at_zero(zeros):
    z = torch.ones(1, 7)
    z[:, :zeros] = 0
    z.requires_grad_()
    out = power_l2(z)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert z.grad.abs().max() < 1e4


def test_dtypes():
    assert at_least_float32(torch.bfloat16) == torch.float32
    assert at_least_float32(torch.float16) == torch.float32
    assert at_least_float32(torch.float64) == torch.float64
    x = torch.randn(4, 4)
    with torch.autocast('cpu', torch.bfloat16), without_autocast(x):
        assert (x @ x).dtype == torch.float32
    with without_autocast(torch.empty(1, device='meta')):
        pass


# Roots of covariances

TRACES = [10.0, 1.0, 1e-2, 1e-4, 0.0]


def points(number: int, dim: int, trace: float) -> Tensor:
    """Descriptors `[2, number, dim]` off the origin, whose covariance has a given trace."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, number, dim, dtype=torch.float64, generator=generator)
    x = x - x.mean(1, keepdim=True)
    return (trace * number / x.square().sum((1, 2), keepdim=True)).sqrt() * x + 0.1


def root_and_gradient(root, x: Tensor, *arguments: float) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = root(x, *arguments)
    cotangent = torch.randn(
        out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    return out.detach(), torch.autograd.grad(out, x, cotangent.to(out.dtype))[0]


def assert_near(actual: Tensor, expected: Tensor, relative: float) -> None:
    assert (actual - expected).abs().max() <= relative * expected.abs().max()


@pytest.mark.parametrize('trace', TRACES)
@pytest.mark.parametrize('eps', [1e-7, 1e-3, 0.1])
@pytest.mark.parametrize('iterations', [1, 2, 5])
def test_smaller_side_is_exact(trace, eps, iterations):
    """Value and gradient, with an eps that is next to nothing or outweighs the descriptors."""
    x = points(12, 40, trace)
    for row, root in zip(x, covariance_root(x, iterations, eps), strict=True):
        matrix = isqrt_cov.covariance(row.numpy()) + eps * np.eye(40)
        assert_near(root, torch.from_numpy(isqrt_cov.root(matrix, iterations)), 1e-12)
    x = x - x.mean(1, keepdim=True)
    expected = root_and_gradient(matrix_root, x, iterations, eps)
    for ours, theirs in zip(
        root_and_gradient(gram_root, x, iterations, eps), expected, strict=True
    ):
        assert_near(ours, theirs, 1e-12)
    for ours, theirs in zip(
        root_and_gradient(gram_root, x.float(), iterations, eps), expected, strict=True
    ):
        assert_near(ours, theirs, 1e-5)


@pytest.mark.parametrize('trace', [10.0, 1e-4, 0.0])
def test_smaller_side_without_eps(trace):
    x = points(12, 40, trace)
    x = x - x.mean(1, keepdim=True)
    actual, gradient = root_and_gradient(gram_root, x, 5, 0.0)
    expected, expected_gradient = root_and_gradient(matrix_root, x, 5, 0.0)
    assert_near(actual, expected, 1e-12)
    assert_near(gradient, expected_gradient, 1e-12)


def test_the_smaller_side_is_taken(monkeypatch):
    """Of 7 descriptors and 20 channels, and of 20 and 7."""
    sides = []

    def record(a, iterations):
        sides.append(a.shape[1])
        return newton_schulz(a, iterations)

    monkeypatch.setattr('timm_fisher.numerics.linalg.newton_schulz', record)
    covariance_root(torch.randn(2, 7, 20), 5)
    covariance_root(torch.randn(2, 20, 7), 5)
    assert sides == [7, 7]


@pytest.mark.parametrize('number', [1, 5, 60])
@pytest.mark.parametrize('eps', [0.0, 1e-7])
def test_a_map_of_zeros(number, eps):
    """Exactly zero, without any rounding errors: a trace that nothing can be divided by."""
    x = torch.zeros(2, number, 20, requires_grad=True)
    root = covariance_root(x, 5, eps)
    (gradient,) = torch.autograd.grad(root.sum(), x)
    assert root.isfinite().all()
    assert gradient.isfinite().all()
    assert root.abs().max() <= eps**0.5


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('number', [12, 60])
def test_root_of_any_scale(number, dtype):
    """Without eps it is as large as the map, and its gradient does not depend on that."""
    x = points(number, 40, 1.0).to(dtype)
    expected, gradient = root_and_gradient(covariance_root, x, 5)
    for scale in (2.0**-40, 2.0**40):
        root, scaled_gradient = root_and_gradient(covariance_root, scale * x, 5)
        torch.testing.assert_close(root / scale, expected)
        torch.testing.assert_close(scaled_gradient, gradient)


@pytest.mark.parametrize('shape', [(12, 40), (6, 40), (60, 20)])
@pytest.mark.parametrize('eps', [0.0, 1e-7])
def test_most_iterations_are_finite_in_float32(shape, eps):
    for seed in range(5):
        x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
        assert covariance_root(x, MOST_STEPS, eps).isfinite().all()


def test_many_iterations_are_the_square_root():
    x = torch.randn(2, 30, 6, dtype=torch.float64)
    x = x - x.mean(1, keepdim=True)
    root = matrix_root(x, 30, 0.0)
    torch.testing.assert_close(root @ root, x.transpose(1, 2) @ x)
    identity = torch.eye(6, dtype=torch.float64)[None]
    torch.testing.assert_close(newton_schulz(identity / 4, 30), 2 * identity)
    x = x[:, :4]
    root = gram_root(x, 30, 1e-3)
    expected = x.transpose(1, 2) @ x + 1e-3 * identity
    torch.testing.assert_close(root @ root, expected)
