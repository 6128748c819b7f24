"""gem between the average and the maximum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from references import gem as reference

from timm_fisher.heads.gem import GeM


def data(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 20, 8, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize('p', [0.5, 1.0, 3.0, 7.5])
def test_equals_reference(p):
    made = GeM(8, p=p).double()
    state = {key: value.numpy() for key, value in made.state_dict().items()}
    # The floor is 1e-6 of the maximum; under the square root it is 1e-3.
    rtol = 2e-2 if p < 1 else 2e-5
    expected = reference.pool(state, data().numpy(), {'p': p})
    np.testing.assert_allclose(made(data()).detach(), expected, rtol=rtol)
    positive = data().abs() + 1e-3  # nothing meets the floor
    expected = reference.pool(state, positive.numpy(), {'p': p})
    np.testing.assert_allclose(made(positive).detach(), expected, rtol=1e-12)


def test_one_is_the_average():
    x = data()
    torch.testing.assert_close(GeM(8, p=1.0)(x), x.relu().mean(1), rtol=2e-5, atol=0)


def test_large_is_the_maximum():
    x = data()
    torch.testing.assert_close(GeM(8, p=1e4)(x), x.amax(1), rtol=1e-3, atol=0)
    assert (GeM(8, p=10.0)(x) < x.amax(1)).all()
    assert (GeM(8, p=10.0)(x) > GeM(8, p=3.0)(x)).all()


@pytest.mark.parametrize('p', [1.0, 3.0, 10.0, 100.0])
@pytest.mark.parametrize('scale', [1e-6, 1e4, 1e30])
def test_scale_goes_through(p, scale):
    x = data().float()
    expected = GeM(8, p=p)(x)
    made, x = GeM(8, p=p), (x * scale).requires_grad_()
    z = made(x)
    torch.testing.assert_close(z / scale, expected, rtol=1e-5, atol=0)
    (z / scale).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(made.log_p.grad).all()


@pytest.mark.parametrize('p', [0.5, 1.0, 3.0, 10.0])
@pytest.mark.parametrize('value', [0.0, -1.0])
def test_a_dead_channel_gives_zero(p, value):
    x = data().float()
    x[..., 3] = value
    x.requires_grad_()
    made = GeM(8, p=p)
    z = made(x)
    z.sum().backward()
    assert z[:, 3].abs().max() == 0
    assert z[:, 2].min() > 0
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(made.log_p.grad).all()
    assert x.grad[..., 3].abs().max() == 0


def test_gradient_of_the_exponent():
    x = data().abs() + 1e-2
    made = GeM(8, p=3.0).double()
    made(x).sum().backward()
    p = made.log_p.exp().item()
    higher, lower = (
        x.pow(q).mean(1).pow(1 / q).sum().item() for q in (p * np.exp(1e-5), p * np.exp(-1e-5))
    )
    assert made.log_p.grad.item() == pytest.approx((higher - lower) / 2e-5, rel=1e-6)


def test_no_step_makes_the_exponent_negative():
    made = GeM(8, p=1.0)
    optimizer = torch.optim.SGD(made.parameters(), lr=5.0)
    for _ in range(5):
        optimizer.zero_grad()
        made(data().float()).sum().backward()  # lower with a smaller p
        optimizer.step()
        assert made.log_p.exp().item() > 0
        made.project_()
    assert made.log_p.exp().item() == pytest.approx(0.01)
    assert torch.isfinite(made(data())).all()


@pytest.mark.parametrize('p', [0.01, 1e4])
def test_gradients_are_finite_at_the_ends(p):
    x = data().float().requires_grad_()
    made = GeM(8, p=p)
    made(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(made.log_p.grad).all()
    before = made.log_p.clone()
    made.project_()
    assert torch.equal(made.log_p, before)
