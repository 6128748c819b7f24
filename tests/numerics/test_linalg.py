"""The differentiable pieces that heads share."""

from __future__ import annotations

import pytest
import torch

from timm_fisher.numerics.linalg import at_least_float32, power_l2, without_autocast


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
