"""smso against the second moment that it does not form, and against the chi-square distribution."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from timm_fisher import ListStream
from timm_fisher.heads.smso import SMSO


def normal(images: int, number: int = 49) -> torch.Tensor:
    """Normal descriptors whose channels have deviations from 0.1 to 10."""
    generator = torch.Generator().manual_seed(images)
    x = torch.randn(images, number, 8, generator=generator, dtype=torch.float64)
    return x * torch.logspace(-1, 1, 8, dtype=torch.float64)


def fitted(x: torch.Tensor, features: int = 8) -> SMSO:
    torch.manual_seed(0)
    head = SMSO(x.shape[2], features=features).double()
    head.fit(ListStream(x.split(7)))
    return head


@pytest.mark.parametrize('number', [5, 49])  # fewer and more than the 8 channels
def test_is_a_quadratic_form_of_the_second_moment(number):
    x = normal(5, number)
    head = fitted(x)
    w = head.directions.weight
    moment = x.transpose(1, 2) @ x / number
    v = torch.einsum('jc,bcd,jd->bj', w, moment, w)
    torch.testing.assert_close(head(x), head.scale * v.sqrt() + head.offset, rtol=1e-4, atol=1e-3)


def test_root_stabilises_the_variance():
    """Of single channels: the deviation of v is 100 times 100 as large for the last as for the
    first, that of the root, as fitted, near `1 / sqrt(2 N)` of its mean for all."""
    x = normal(2000)
    torch.manual_seed(0)
    head = SMSO(8, features=8).double()
    with torch.no_grad():
        head.directions.weight.copy_(torch.eye(8))
    v = x.square().mean(1)
    assert v.std(0)[-1] > 5000 * v.std(0)[0]
    head.fit(ListStream([x]))
    z = head(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(8).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(z.std(0), torch.ones(8).double(), rtol=1e-3, atol=0)
    assert (z**3).mean() < 0.5 * (((v - v.mean(0)) / v.std(0)) ** 3).mean()  # skewness
    # The offset of a chi-square variable with N degrees of freedom is the root of 2 N - 1, but for
    # the floor of the root in channels of a 1000th of the others' variance.
    expected = torch.full((8,), -((2 * 49 - 1) ** 0.5), dtype=torch.float64)
    torch.testing.assert_close(head.offset.detach(), expected, rtol=0.1, atol=0)


def test_fit_does_not_depend_on_batches_or_scale():
    x = normal(50)
    expected = fitted(x, features=20)(x)
    for scale in (1e-6, 1e4):
        head = fitted(x * scale, features=20)
        torch.testing.assert_close(head(x * scale), expected)
        v = head.directions(x * scale).square().mean(1)
        assert v.mean().item() == pytest.approx(1, rel=1e-4)
    with pytest.raises(ValueError, match='NaN or infinite'):
        fitted(x * torch.nan)


def test_gradient_at_directions_without_variance():
    """A root would have an infinite one."""
    x = normal(2) * (torch.arange(8) != 3)
    head = fitted(x)
    with torch.no_grad():
        head.directions.weight[2] = torch.eye(8)[3]
    keys, values = zip(*head.named_parameters(), strict=True)

    def call(x, *values):
        return functional_call(head, dict(zip(keys, values, strict=True)), (x,))

    inputs = (x.requires_grad_(), *values)
    call(*inputs).square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in inputs)
