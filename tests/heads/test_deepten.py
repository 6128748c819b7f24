"""deepten against the slow reference, its limits, and its start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clustered import data
from references import deepten as reference

from timm_fisher import ListStream
from timm_fisher.heads.deepten import DeepTEN


def head(x: torch.Tensor, **arguments: object) -> DeepTEN:
    torch.manual_seed(0)
    made = DeepTEN(x.shape[-1], **{'reduce_dim': 7, 'codes': 5, **arguments})
    made.fit(ListStream([x]))
    return made.double()


@pytest.mark.parametrize('codes', [1, 5])
def test_equals_reference_and_its_gradient(codes):
    """Away from the start, where all smoothing factors are the same."""
    x = data()
    made = head(x, codes=codes)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, dtype=torch.float64)
    state = {key: value.detach().numpy().copy() for key, value in made.state_dict().items()}
    z = made(x[:4])
    np.testing.assert_allclose(z.detach(), reference.pool(state, x[:4].numpy(), {}), rtol=1e-9)
    z[0, -1].backward()
    for key, parameter in made.named_parameters():
        step = np.zeros_like(state[key])
        step.flat[0] = 1e-6
        ends = [
            reference.pool({**state, key: state[key] + sign * step}, x[:1].numpy(), {})[0, -1]
            for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / 2e-6
        assert parameter.grad.flatten()[0].item() == pytest.approx(slope, rel=1e-4, abs=1e-8), key


def test_sharp_assignment_is_the_nearest_code():
    x = data()
    made = head(x)
    with torch.no_grad():
        made.log_smoothing.fill_(12.0)
    y = made.reduce(x)
    nearest = torch.cdist(y, made.codes.expand(20, -1, -1)).argmin(-1)
    assert torch.equal(made._assign(y, made.codes).argmax(-1), nearest)
    e = torch.stack(
        [((y - c) * (nearest == k)[..., None]).mean(1) for k, c in enumerate(made.codes)], 1
    )
    torch.testing.assert_close(
        made(x), torch.nn.functional.normalize(e.flatten(1)), atol=1e-6, rtol=0
    )


def test_fit_finds_the_clusters_at_any_scale():
    x = data()
    expected = head(x)(x)
    for scale in (1e-6, 1e4):
        made = head(x * scale, codes=6)
        y = made.reduce(x * scale).flatten(0, 1)
        assert y.square().sum(1).mean().item() == pytest.approx(1, rel=1e-4)
        assert torch.cdist(y, made.codes).amin(1).square().mean() < 0.2
        torch.testing.assert_close(head(x * scale)(x * scale), expected, rtol=1e-3, atol=1e-4)


def test_never_builds_every_residual():
    """[B, N, K, d] would hold 32 times as many values as anything that is kept for backward."""
    made = DeepTEN(64, reduce_dim=None, codes=32)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        made(torch.randn(2, 50, 64, requires_grad=True))
    assert max(sizes) <= 2 * 50 * 64
