"""dropcov in training against the slow reference; its random numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from references import dropcov as reference
from torch.func import functional_call

from timm_fisher.heads import dropcov
from timm_fisher.heads.dropcov import MOST_DROPPED, DropCov, drop_probability


def descriptors(batch: int = 4) -> torch.Tensor:
    """Six channels against four, so that neither all nor no channels are dropped."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 12, 10, dtype=torch.float64, generator=generator)
    shared = torch.randn(batch, 12, 1, dtype=torch.float64, generator=generator)
    return x + 3 * shared * torch.tensor([1] * 6 + [-1] * 4)


def head() -> DropCov:
    torch.manual_seed(0)
    return DropCov(10, reduce_dim=None).double().train()


def test_training_equals_reference():
    x, made = descriptors(), head()
    torch.manual_seed(3)
    ours = made(x)
    torch.manual_seed(3)
    random = torch.rand(4, 1, 10, dtype=torch.float64)[:, 0]
    expected, p = reference.training(made.filter.detach().numpy(), x.numpy(), random.numpy())
    assert 0.05 < p < MOST_DROPPED
    np.testing.assert_allclose(ours.detach(), expected, rtol=1e-9, atol=1e-12)
    assert drop_probability(
        x * (1 + made._importance(x)[:, None]), made._importance(x)
    ).item() == pytest.approx(p)


def test_a_dropped_channel_is_zero_and_the_mean_is_kept():
    """Entries beside the diagonal keep their mean; that of the diagonal is 1 / (1 - p) as large."""
    x, made = descriptors(), head()
    a = made._importance(x)[:, None]
    p = drop_probability(x * (1 + a), a[:, 0])
    rows, columns = torch.triu_indices(10, 10)
    with torch.no_grad():
        samples = torch.stack([made(x) for _ in range(4000)])
        weighted = made.eval()(x * (1 + a))
    dropped = (samples[..., rows == columns] == 0).double().mean()
    assert dropped.item() == pytest.approx(p.item(), abs=0.02)
    factor = torch.where(rows == columns, 1 / (1 - p), 1.0)
    error = (samples.mean(0) - factor * weighted).abs() / samples.std(0) * 4000**0.5
    assert error.max() < 5


def test_random_numbers_are_pytorchs():
    """As resuming needs it: the state of the global generator is all that there is."""
    x, made = descriptors(), head()
    first = made(x)
    state = torch.get_rng_state()
    second, third = made(x), made(x)
    torch.set_rng_state(state)
    assert torch.equal(made(x), second)
    assert torch.equal(made(x), third)
    assert not torch.equal(first, second)
    made.eval()
    state = torch.get_rng_state()
    assert torch.equal(made(x), made(x))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('scale', [0.0, 1e-20, 1e4])
@pytest.mark.parametrize('channels', [1, 10])
def test_probability_is_a_number(scale, channels):
    x = scale * descriptors()[..., :channels].float()
    importance = torch.full((4, channels), 1 / channels)
    assert 0 <= drop_probability(x, importance) <= MOST_DROPPED


def test_the_filter_learns():
    made = head()
    made(descriptors()).square().sum().backward()
    assert made.filter.grad.abs().min() > 0


def test_gradient_in_training(monkeypatch):
    """Of descriptors and filter, through the importances: by differences, with the channels that
    are dropped held fixed."""
    monkeypatch.setattr(dropcov, 'drop_probability', lambda y, _: torch.tensor(0.3).to(y))
    made, x = head().double().train(), descriptors(2)[:, :5].contiguous().requires_grad_()
    names = [name for name, _ in made.named_parameters()]

    def call(x, *values):
        torch.manual_seed(0)
        return functional_call(made, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *made.parameters()), eps=1e-6, atol=1e-5, rtol=1e-4)
