"""compact_bilinear against the explicit count sketch of x x^T, by both ways to compute it."""

from __future__ import annotations

import pytest
import torch
from references import compact_bilinear as reference
from torch import Tensor

from timm_fisher.heads import compact_bilinear
from timm_fisher.heads.compact_bilinear import CompactBilinear


def sketches(head: CompactBilinear, x: Tensor) -> Tensor:
    """What the head normalises."""
    compute = head._moments if head.dense else head._spectra
    return compute(x, head.signs.to(x.dtype))


@pytest.fixture(params=['dense', 'fft'])
def way(request, monkeypatch):
    monkeypatch.setattr(compact_bilinear, 'DENSE', 10**6 if request.param == 'dense' else 0)


@pytest.mark.usefixtures('way')
@pytest.mark.parametrize(('sketch_dim', 'seed'), [(64, 0), (63, 5), (1, 0), (2, 1), (1000, 65_536)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_is_the_count_sketch_of_the_outer_product(sketch_dim, seed, dtype):
    x = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours = sketches(CompactBilinear(12, sketch_dim=sketch_dim, seed=seed), x)
    for row, z in zip(x, ours, strict=True):
        arguments = {'sketch_dim': sketch_dim, 'seed': seed}
        expected = torch.from_numpy(reference.sketch(row.double().numpy(), arguments))
        tolerance = 1e-5 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(z.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('sketch_dim', [40, 8192])
def test_both_ways_have_the_same_gradient(sketch_dim, monkeypatch):
    x = torch.randn(2, 9, 20, dtype=torch.float64, requires_grad=True)
    results = []
    for dense in (0, 10**6):
        monkeypatch.setattr(compact_bilinear, 'DENSE', dense)
        z = CompactBilinear(20, sketch_dim=sketch_dim)(x)
        weights = torch.linspace(-1, 1, sketch_dim, dtype=z.dtype)
        results.append((z.detach(), *torch.autograd.grad((z * weights).sum(), x)))
    for fft, direct in zip(*results, strict=True):
        torch.testing.assert_close(fft, direct, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures('way')
def test_inner_products_approach_the_squared_ones():
    """With an error that falls as the root of D, and no bias over seeds."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.nn.functional.normalize(torch.randn(2, 50, 1, 30, generator=generator), dim=-1)
    expected = (x * y).sum((1, 2)).square()
    errors = []
    for sketch_dim in (100, 1000, 10_000):
        heads = [CompactBilinear(30, sketch_dim=sketch_dim, seed=seed) for seed in range(8)]
        products = torch.stack([(sketches(h, x) * sketches(h, y)).sum(1) for h in heads])
        errors.append((products - expected).square().mean().sqrt().item())
        assert (products - expected).mean().abs() < 0.5 * errors[-1]  # of 8 seeds
    for error, sketch_dim in zip(errors, (100, 1000, 10_000), strict=True):
        assert 0.3 < error * sketch_dim**0.5 < 3


def test_seeds_differ_and_hashes_are_fixed():
    first, second = CompactBilinear(1400, seed=0), CompactBilinear(1400, seed=1)
    assert not first.dense  # two hashes of 1400 channels
    assert (first.index == second.index).float().mean() < 0.01
    assert 0.4 < (first.signs == second.signs).float().mean() < 0.6
    assert first.index[:4].tolist() == [reference.hashed(0, c) % 8192 for c in range(4)]
    counts = (first.index[:1400] * 16 // 8192).bincount(minlength=16)
    assert counts.min() > 50  # of 87.5
