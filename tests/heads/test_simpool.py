"""simpool against timm's SimPool1d, whose weights it holds, and its exponent's gradient."""

from __future__ import annotations

import pytest
import torch
from timm.layers import SimPool1d
from timm_pool import check_equals_timm

import timm_fisher
from timm_fisher.heads.simpool import SimPool

CASES = [
    {},
    {'num_heads': 4, 'qkv_bias': True},
    {'num_heads': 3, 'qk_norm': True},
    {'gamma': 1.25},
    {'gamma': 2.0, 'num_heads': 2, 'qk_norm': True},
]


def made(**arguments) -> SimPool:
    torch.manual_seed(0)
    return SimPool(24, **arguments)


@pytest.mark.parametrize('arguments', CASES, ids=str)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_equals_timm(arguments, dtype):
    """Output and gradients, of timm's own module with the same weights."""
    head = made(**arguments).to(dtype)
    assert type(head.pool) is SimPool1d
    check_equals_timm(head, dtype)


def test_defaults_are_those_of_timm():
    assert str(made().pool) == str(SimPool1d(24))


@pytest.mark.parametrize('arguments', CASES[:3], ids=str)
def test_attention_is_what_timm_multiplies_the_descriptors_with(arguments):
    head = made(**arguments).double()
    x = torch.randn(3, 7, 24, dtype=torch.float64)
    a, heads = head.attention(x), head.pool.num_heads
    assert a.shape == (3, heads, 7)
    torch.testing.assert_close(a.sum(2), torch.ones(3, heads).double())
    means = a @ head.pool.norm(x)
    expected = torch.cat([part[:, h] for h, part in enumerate(means.split(24 // heads, 2))], 1)
    torch.testing.assert_close(head.pool(x), expected)
    assert head.half().attention(x.half()).dtype == torch.float16


@pytest.mark.parametrize('gamma', [0.1, 0.5, 1.25, 2.0, 5.0])
@pytest.mark.parametrize('scale', [0.0, 1e-6, 1.0, 1e4])
@pytest.mark.parametrize('attention', [0.0, 1.0, 1e3])
def test_gradients_of_the_root(gamma, scale, attention):
    """Also where all descriptors are alike, or one has all of the weight."""
    head = made(gamma=gamma)
    with torch.no_grad():
        head.pool.q.weight.mul_(attention)
    for x in (torch.randn(2, 5, 24) * scale, torch.ones(2, 5, 24) * scale, torch.rand(2, 1, 24)):
        head.zero_grad()
        leaf = x.requires_grad_()
        out = head(leaf)
        out.square().sum().backward()
        assert out.isfinite().all()
        for tensor in (leaf, *head.parameters()):
            assert tensor.grad.isfinite().all()


def test_heads_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match='num_heads=5 does not divide 24'):
        timm_fisher.create_head('simpool', 24, num_heads=5)
