"""gmm_fisher against scikit-image, scikit-learn, autograd, the appendix and a slow reference."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from references import gmm_fisher as reference
from skimage.feature import fisher_vector
from sklearn.mixture import GaussianMixture
from torch import Tensor

from timm_fisher import ListStream
from timm_fisher.heads.gmm_fisher import (
    VARIANCE_FLOOR,
    GMMFisher,
    expectation_maximisation,
    start_mixture,
)


def data(images: int = 40, number: int = 30, channels: int = 12, seed: int = 0) -> Tensor:
    """Descriptors around seven centres, of different spread."""
    fixed = torch.Generator().manual_seed(7)
    centres = 0.5 * torch.randn(7, channels, generator=fixed)
    spread = 0.3 + torch.rand(7, channels, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(7, (images, number), generator=generator)
    noise = torch.randn(images, number, channels, generator=generator)
    return (centres[which] + spread[which] * noise + 3).double()


def head(x: Tensor, **arguments: object) -> GMMFisher:
    torch.manual_seed(0)
    arguments = {'reduce_dim': 6, 'components': 5, 'l2_descriptors': False, **arguments}
    made = GMMFisher(x.shape[-1], **arguments)
    made.fit(ListStream([x]))
    return made.double()


def numpy_state(made: GMMFisher) -> dict:
    return {key: value.detach().numpy() for key, value in made.state_dict().items()}


@pytest.mark.parametrize('l2_descriptors', [False, True])
@pytest.mark.parametrize('normalize', [False, True])
def test_equals_reference(l2_descriptors, normalize):
    x = data()
    made = head(x, l2_descriptors=l2_descriptors, normalize=normalize)
    arguments = dict(l2_descriptors=l2_descriptors, normalize=normalize)
    expected = reference.pool(numpy_state(made), x[:4].numpy(), arguments)
    tolerance = 1e-3 if normalize else 1e-9  # the floor of the square root
    np.testing.assert_allclose(made(x[:4]).detach(), expected, atol=tolerance, rtol=1e-9)


def test_equals_scikit_image():
    """Whose vector begins with K weights that the paper leaves out, and has the sigma block with
    the opposite sign."""
    x = data()
    made = head(x, normalize=False)
    k, d = made.means.shape
    mixture = GaussianMixture(k, covariance_type='diag')
    mixture.weights_, mixture.means_, stds = reference.parameters(numpy_state(made))
    mixture.covariances_ = stds**2
    mixture.precisions_cholesky_ = 1 / stds
    for image in x[:4]:
        y = made.reduce(image).detach().numpy()
        expected = fisher_vector(y, mixture, improved=False)[k:]
        expected[k * d :] *= -1
        actual = made(image[None])[0].detach().numpy()
        np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())
        assert np.abs(expected).max() > 0.01


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_em_is_that_of_scikit_learn(seed):
    """From the same start it ends at the same likelihood, and never lowers it."""
    y = data(seed=seed).flatten(0, 1)
    floor = VARIANCE_FLOOR * y.var(0)
    start = start_mixture(y, 7, floor)
    mixture, history = expectation_maximisation(start, lambda: [y], floor, rounds=100)
    theirs = GaussianMixture(
        7,
        covariance_type='diag',
        tol=1e-5,
        max_iter=100,
        weights_init=start.log_weights.exp().numpy(),
        means_init=start.means.numpy(),
        precisions_init=torch.exp(-2 * start.log_stds).numpy(),
    )
    expected = theirs.fit(y.numpy()).score(y.numpy())
    _, (likelihood,) = expectation_maximisation(mixture, lambda: [y], floor, rounds=1)
    assert likelihood >= expected - 0.001 * abs(expected)
    assert likelihood >= history[0]
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(history))
    # The figure itself is right.
    theirs.weights_, theirs.means_ = mixture.log_weights.exp().numpy(), mixture.means.numpy()
    theirs.precisions_cholesky_ = torch.exp(-mixture.log_stds).numpy()
    assert likelihood == pytest.approx(theirs.score(y.numpy()), rel=1e-9)


def test_start_is_as_good_as_scikit_learns():
    """Both start from k-means of their own, and EM ends where luck will have it: the mean over
    data sets counts."""
    ours, theirs = [], []
    for seed in range(8):
        y = data(seed=seed).flatten(0, 1)
        floor = VARIANCE_FLOOR * y.var(0)
        start = start_mixture(y, 7, floor)
        _, history = expectation_maximisation(start, lambda y=y: [y], floor, rounds=100)
        ours.append(history[-1])
        mixture = GaussianMixture(7, covariance_type='diag', tol=1e-5, random_state=seed)
        theirs.append(mixture.fit(y.numpy()).score(y.numpy()))
    assert np.mean(ours) >= np.mean(theirs) - 0.001 * abs(np.mean(theirs))


def test_streamed_em_is_that_of_all_at_once():
    y = data().flatten(0, 1)
    floor = VARIANCE_FLOOR * y.var(0)
    start = start_mixture(y, 5, floor)
    whole, _ = expectation_maximisation(start, lambda: [y], floor, rounds=20)
    parts, _ = expectation_maximisation(start, lambda: y.split(77), floor, rounds=20)
    torch.testing.assert_close(parts, whole)


def test_fit_sees_all_descriptors(monkeypatch):
    """The stream's rounds mend what a poor sample began."""
    x = data(images=30)
    monkeypatch.setattr('timm_fisher.heads.gmm_fisher.FIT_SAMPLE', 100)
    monkeypatch.setattr('timm_fisher.heads.gmm_fisher.STREAM_ROUNDS', 100)
    made = head(x)
    assert reference_likelihood(made, x) > -4.7
    monkeypatch.setattr('timm_fisher.heads.gmm_fisher.STREAM_ROUNDS', 0)
    assert reference_likelihood(head(x), x) < reference_likelihood(made, x)


def reference_likelihood(made: GMMFisher, x: Tensor) -> float:
    state = numpy_state(made)
    rows = made.reduce(x).detach().flatten(0, 1).numpy()
    return float(np.mean([np.logaddexp.reduce(reference.densities(state, y)) for y in rows]))


def plain_formula(pi: Tensor, mu: Tensor, sigma: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """F and G `[K, D]` of one descriptor `[D]`, as printed; pi need not sum to 1."""
    density = pi / sigma.prod(1) * torch.exp(-0.5 * ((y - mu) / sigma).square().sum(1))
    gamma = (density / density.sum())[:, None]
    alpha = (y - mu) / sigma
    weight = pi / pi.sum()
    first = gamma * alpha / weight.sqrt()[:, None]
    return first, gamma * (alpha.square() - 1) / (2 * weight).sqrt()[:, None]


def test_gradient_is_that_of_the_plain_formula():
    x = data(images=2, number=5)
    made = head(data(), normalize=False)
    weight = torch.randn(made.out_features, dtype=torch.float64)
    (made(x)[0] @ weight).backward()
    state = {k: v.detach().clone().requires_grad_() for k, v in made.named_parameters()}
    total = torch.zeros(made.out_features, dtype=torch.float64)
    for descriptor in x[0]:
        y = state['reduce.weight'] @ descriptor + state['reduce.bias']
        pi = state['log_weights'].exp()
        parts = plain_formula(pi, state['means'], state['log_stds'].exp(), y)
        total = total + torch.cat([part.flatten() for part in parts]) / len(x[0])
    (total @ weight).backward()
    for key, parameter in made.named_parameters():
        torch.testing.assert_close(parameter.grad, state[key].grad, msg=key)


def test_the_appendix():
    """Eqs. 7, 8, 10 and 12 hold as printed, 7 and 10 for weights that are normalised. In eq. 9 the
    last delta belongs inside the bracket and carries alpha; in eq. 11 the factor alpha before the
    bracket is the parameter's, and belongs to its first term."""
    torch.manual_seed(0)
    k, d = 3, 2
    pi = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    mu = torch.randn(k, d, dtype=torch.float64)
    sigma = torch.rand(k, d, dtype=torch.float64) + 0.5
    y = torch.randn(d, dtype=torch.float64)
    (f_pi, f_mu, f_sigma), (g_pi, g_mu, g_sigma) = torch.autograd.functional.jacobian(
        lambda *parameters: plain_formula(*parameters, y), (pi, mu, sigma)
    )
    density = pi / sigma.prod(1) * torch.exp(-0.5 * ((y - mu) / sigma).square().sum(1))
    # Axes: component and dimension of the output (primed), then of the parameter.
    gamma_, pi_ = (density / density.sum())[:, None, None, None], pi[:, None, None, None]
    gamma, pi = (density / density.sum())[None, None, :, None], pi[None, None, :, None]
    alpha_, alpha = ((y - mu) / sigma)[:, :, None, None], ((y - mu) / sigma)[None, None]
    sigma = sigma[None, None]
    same = torch.eye(k)[:, None, :, None]
    both = same * torch.eye(d)[None, :, None, :]

    weight = (pi + same - 2 * gamma) / (2 * pi)
    f, g = gamma_ / (sigma * pi_.sqrt()), gamma_ / (sigma * (2 * pi_).sqrt())
    eq7 = gamma_ * alpha_ / pi_.sqrt() * weight
    eq8 = f * (alpha_ * alpha * (same - gamma) - both)
    eq9 = f * alpha_ * (alpha**2 - 1) * (same - gamma) - both
    eq9_mended = f * (alpha_ * (alpha**2 - 1) * (same - gamma) - both * alpha)
    eq10 = gamma_ * (alpha_**2 - 1) / (2 * pi_).sqrt() * weight
    eq11 = g * ((alpha_**2 - 1) * alpha * (same - gamma) - 2 * both * alpha_)
    eq11_printed = g * alpha_ * ((alpha_**2 - 1) * (same - gamma) - 2 * both)
    eq12 = g * ((alpha_**2 - 1) * (alpha**2 - 1) * (same - gamma) - 2 * both * alpha**2)
    torch.testing.assert_close(eq7[..., 0], f_pi)
    torch.testing.assert_close(eq8, f_mu)
    torch.testing.assert_close(eq9_mended, f_sigma)
    assert not torch.allclose(eq9, f_sigma)
    torch.testing.assert_close(eq10[..., 0], g_pi)
    torch.testing.assert_close(eq11, g_mu)
    assert not torch.allclose(eq11_printed, g_mu)
    torch.testing.assert_close(eq12, g_sigma)


@pytest.mark.parametrize('weight', [-50.0, -1e4])
def test_dead_component_stays_finite(weight):
    x = data()[:3].float().requires_grad_()
    made = head(data()).float()
    with torch.no_grad():
        made.log_weights[2] = weight
    out = made(x)
    out.square().sum().add(out.sum()).backward()
    k, d = made.means.shape
    assert out.view(3, 2, k, d)[:, :, 2].abs().max() < 0.05
    for tensor in (out, x.grad, *(parameter.grad for parameter in made.parameters())):
        assert torch.isfinite(tensor).all()


def test_em_survives_a_component_without_descriptors():
    y = data().flatten(0, 1)
    floor = VARIANCE_FLOOR * y.var(0)
    start = start_mixture(y, 5, floor)
    start.means[2] = 1e4
    mixture, _ = expectation_maximisation(start, lambda: [y], floor, rounds=20)
    assert all(torch.isfinite(part).all() for part in mixture)
    assert mixture.log_weights[2] < -20
    assert torch.equal(mixture.means[2], start.means[2])


def test_fit_to_fewer_descriptors_than_components():
    made = head(data(images=1, number=3), components=8)
    assert torch.isfinite(made(data())).all()


def test_output_does_not_depend_on_the_scale_of_the_backbone():
    x = data()
    expected = head(x)(x)
    for scale in (1e-4, 1e4):
        torch.testing.assert_close(head(scale * x)(scale * x), expected, rtol=1e-3, atol=1e-3)


def test_fit_separates_the_centres():
    made = head(data(), components=7)
    weights = made.mixture(torch.float64).log_weights.exp()
    torch.testing.assert_close(weights.sum().item(), 1.0)
    assert weights.min() > 0.02
    variances = (2 * made.log_stds).exp()
    assert (variances > made.log_std_floor.mul(2).exp()).all()


def test_project_keeps_variances_above_the_floor():
    made = head(data())
    with torch.no_grad():
        made.log_stds[0] = -100.0
    made.project_()
    assert torch.equal(made.log_stds[0], made.log_std_floor)
