"""salad against the authors' published code, its marginals, and too few descriptors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from references import salad as reference
from safetensors.torch import load_file

from timm_fisher.heads.salad import SALAD, convert_state_dict, sinkhorn

# float64 inputs, weights, outputs and gradients of the authors' code; N = 4 x 6.
GOLDEN = load_file(Path(__file__).parent.parent / 'golden' / 'attention_parity.safetensors')
STATE = {
    key.removeprefix('salad.state.'): value
    for key, value in GOLDEN.items()
    if key.startswith('salad.state.')
}


def golden_head() -> SALAD:
    head = SALAD(48, clusters=5, cluster_dim=7, token_dim=9).double()
    head.load_state_dict(convert_state_dict(STATE))
    return head.eval()


def small(**arguments) -> SALAD:
    torch.manual_seed(0)
    sizes = {'clusters': 4, 'cluster_dim': 3, 'token_dim': 5, 'hidden': 16}
    return SALAD(8, **{**sizes, **arguments}).double().eval()


def data(number: int = 12) -> torch.Tensor:
    return torch.randn(3, number, 8, generator=torch.Generator().manual_seed(0)).double()


def test_equals_the_authors_code():
    x = GOLDEN['salad.input'].clone().requires_grad_()
    token = GOLDEN['salad.class_token'].clone().requires_grad_()
    out = golden_head()(x.flatten(2).transpose(1, 2), class_token=token)
    torch.testing.assert_close(out, GOLDEN['salad.output'], rtol=0, atol=1e-10)
    out.backward(GOLDEN['salad.grad_output'])
    torch.testing.assert_close(x.grad, GOLDEN['salad.grad_input'], rtol=0, atol=1e-10)
    torch.testing.assert_close(token.grad, GOLDEN['salad.grad_class_token'], rtol=0, atol=1e-10)


def test_the_authors_dustbin_has_no_gradient():
    """Which is why this head has no parameter for it."""
    assert GOLDEN['salad.grad_dust_bin'].abs() < 1e-15


def test_a_number_added_to_a_cluster_changes_nothing():
    scores = torch.randn(2, 9, 5, dtype=torch.float64)
    shifted = scores + torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(shifted, 1), sinkhorn(scores, 1))
    # The dustbin's is the one that is not shifted, if all others are.
    torch.testing.assert_close(sinkhorn(scores - 3, 1), sinkhorn(scores, 1))


def test_marginals():
    """After many iterations each cluster has the mass 1, and no descriptor gives more."""
    p = small(iterations=1000).attention(data())
    assert p.shape == (3, 4, 12)
    torch.testing.assert_close(p.sum(2), torch.ones(3, 4).double())
    assert (p.sum(1) <= 1).all()
    torch.testing.assert_close(1 - p.sum(1).mean(1), torch.full((3,), 8 / 12).double())


def test_attention_is_the_assignment():
    head = small()
    scores = head.score(data()).detach()
    for p, s in zip(head.attention(data()), scores.numpy(), strict=True):
        torch.testing.assert_close(p, torch.from_numpy(reference.transport(s, 3)).T)


def test_without_a_class_token():
    """The mean descriptor takes its place."""
    head, x = small(), data()
    assert torch.equal(head(x), head(x, class_token=x.mean(1)))
    assert not torch.allclose(head(x), head(x, class_token=x[:, 0]))
    state = {key: value.numpy() for key, value in head.state_dict().items()}
    expected = reference.pool(state, x.numpy(), {'clusters': 4, 'iterations': 3})
    np.testing.assert_allclose(head(x).detach(), expected, atol=1e-12)


@pytest.mark.parametrize('number', [1, 3, 4])
def test_too_few_descriptors_are_an_error(number):
    head = small()
    assert head.least_descriptors == 5
    said = f'more descriptors than clusters, got {number} descriptors of an image for 4 clusters'
    for method in (head, head.forward_with_loss, head.attention):
        with pytest.raises(ValueError, match=said):
            method(data(number))
    assert head(data(5)).isfinite().all()


def test_scores_far_apart():
    """exp of them is beyond float32, and a cluster that nobody likes still gets its share."""
    scores = torch.randn(2, 9, 5) * 1000
    scores[..., 1] -= 1e5
    scores.requires_grad_()
    p = sinkhorn(scores, 3)
    p.square().sum().backward()
    assert p.isfinite().all()
    assert scores.grad.isfinite().all()
    assert p[..., 1].sum() > 0.1


def test_dropout_is_of_training_alone():
    head, x = small(dropout=0.5), data()
    assert torch.equal(head(x), head(x))
    head.train()
    assert not torch.equal(head(x), head(x))


def test_another_number_of_descriptors_in_a_graph():
    """N is in the dustbin's mass; traced and exported graphs take it from their input."""
    head = small()
    example, x = torch.zeros(2, 7, 8).double(), data(20)
    traced = torch.jit.trace(head, example)
    torch.testing.assert_close(traced(x), head(x))
    shapes = {
        'x': {0: torch.export.Dim('batch'), 1: torch.export.Dim('number', min=5)},
        'class_token': {0: torch.export.Dim('batch')},
    }
    exported = torch.export.export(
        head, (example,), {'class_token': example[:, 0]}, dynamic_shapes=shapes
    )
    expected = head(x, class_token=x[:, 1])
    torch.testing.assert_close(exported.module()(x, class_token=x[:, 1]), expected)
