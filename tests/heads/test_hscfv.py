"""hscfv against the slow reference, autograd, and sparse_fisher."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from references import hscfv as reference
from torch.nn import functional as F

from timm_fisher import ListStream
from timm_fisher.heads.hscfv import HybridFisher
from timm_fisher.heads.sparse_fisher import SparseFisher


def data(images: int = 30, number: int = 20, channels: int = 24) -> torch.Tensor:
    """Descriptors that really are sparse over some atoms, plus noise and an offset."""
    generator = torch.Generator().manual_seed(0)
    atoms = F.normalize(torch.randn(channels, 40, generator=generator), dim=0)
    codes = torch.randn(images, number, 40, generator=generator)
    codes *= torch.rand(images, number, 40, generator=generator) < 0.1
    x = codes @ atoms.T + 0.05 * torch.randn(images, number, channels, generator=generator)
    return (x + 3).double()


def head(x: torch.Tensor, **arguments: object) -> HybridFisher:
    torch.manual_seed(0)
    sizes = {'reduce_dim': 12, 'code_dim': 16, 'residual_code_dim': 9}
    made = HybridFisher(x.shape[-1], **{**sizes, **arguments})
    made.fit(ListStream([x]))
    return made.double()


@pytest.mark.parametrize('iterations', [1, 4])
def test_equals_reference(iterations):
    x = data()
    made = head(x, iterations=iterations)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, dtype=torch.float64)
    arguments = {'iterations': iterations, 'sparsity': made.sparsity}
    state = {key: value.numpy() for key, value in made.state_dict().items()}
    pooled, loss = made.forward_with_loss(x[:4])
    expected = reference.pool(state, x[:4].numpy(), arguments)
    np.testing.assert_allclose(pooled.detach(), expected, rtol=1e-2, atol=1e-4)
    assert loss.item() == pytest.approx(reference.loss(state, x[:4].numpy(), arguments), rel=1e-12)


def test_codes_are_gradients_of_the_log_likelihood():
    """-1/2 d |y - B u - B' v|^2 / d B and d B', for given codes."""
    x = data(images=1)
    made = head(x)
    y = made.reduce(x).detach()
    u, v, error = (tensor.detach() for tensor in made.encode(y))
    dictionaries = [made.common.dictionary, made.residual.dictionary]
    left = y - u @ dictionaries[0].T - v @ dictionaries[1].T
    torch.testing.assert_close(left, error)
    gradients = torch.autograd.grad(left.square().sum(-1).mean(), dictionaries)
    expected = torch.cat([-gradient.flatten() / 2 for gradient in gradients])
    expected = expected.sign() * expected.abs().sqrt()
    torch.testing.assert_close(made(x)[0], expected / expected.norm(), rtol=1e-2, atol=1e-4)


def test_a_silent_residual_part_is_sparse_fisher():
    x = data()
    made = head(x)
    plain = SparseFisher(24, reduce_dim=12, code_dim=16).double()
    plain.load_state_dict(
        {key.removeprefix('common.'): value for key, value in made.state_dict().items()
         if not key.startswith('residual.')}
    )  # fmt: skip
    with torch.no_grad():
        made.residual.log_threshold.fill_(50.0)
    z = made(x)
    torch.testing.assert_close(z[:, : 12 * 16], plain(x))
    assert z[:, 12 * 16 :].abs().max() == 0


def test_both_codes_are_sparse_and_the_second_lowers_the_error():
    x = data()
    made = head(x)
    y = made.reduce(x)
    u, v, error = made.encode(y)
    for code in (u, v):
        assert 0.02 < (code != 0).double().mean() < 0.95
    left = made.common(y)[1]
    assert error.square().mean() < 0.9 * left.square().mean()


def test_unsupervised_loss_does_not_shrink_the_reduction():
    x = data()[:8]
    made = head(x)
    made.forward_with_loss(x)[1].backward()
    assert made.reduce.weight.grad is None
    for coder in (made.common, made.residual):
        assert all(parameter.grad.abs().max() > 0 for parameter in coder.parameters())


def test_project_cuts_long_atoms_only():
    made = HybridFisher(24, code_dim=3, residual_code_dim=2)
    with torch.no_grad():
        made.common.dictionary.mul_(torch.tensor([0.5, 1.0, 3.0]))
        made.residual.dictionary.mul_(torch.tensor([2.0, 0.1]))
    made.project_()
    for coder, lengths in ((made.common, [0.5, 1, 1]), (made.residual, [1, 0.1])):
        torch.testing.assert_close(coder.dictionary.norm(dim=0), torch.tensor(lengths))
