"""dbm_idfk against enumeration, dense linear algebra and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from largest_tensor import LargestTensor
from references import dbm_idfk as reference
from sklearn.neural_network import BernoulliRBM
from torch import Tensor

from timm_fisher import ListStream
from timm_fisher.heads.dbm_idfk import DBMFisher, mean_descriptor
from timm_fisher.numerics.boltzmann import train_machine
from timm_fisher.numerics.clustering import leading_axes


def bars(count: int = 400, side: int = 3, seed: int = 0) -> Tensor:
    """Binary images `[count, side^2]` of a few horizontal or vertical bars, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(count, side, generator=generator) < 0.4
    images = on[:, :, None].expand(-1, -1, side)
    turned = torch.rand(count, generator=generator) < 0.5
    images = torch.where(turned[:, None, None], images.transpose(1, 2), images)
    noise = torch.rand(count, side, side, generator=generator) < 0.05
    return (images ^ noise).flatten(1).float()


def machine(hidden: list[int], channels: int = 4, seed: int = 0) -> DBMFisher:
    """Random weights and biases, and the exact expectations of its model."""
    generator = torch.Generator().manual_seed(seed)
    head = DBMFisher(channels, hidden=hidden, squash=False, mean_field_steps=300).double()
    with torch.no_grad():
        for parameter in (*head.parameters(), head.visible_bias):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return exact(head)


def exact(head: DBMFisher) -> DBMFisher:
    head.model_moments.copy_(torch.from_numpy(reference.model_moments(*parts(head))))
    return head


def parts(head: DBMFisher) -> tuple[list[np.ndarray], list[np.ndarray]]:
    weights = [weight.detach().numpy() for weight in head.weights]
    return weights, [head.visible_bias.numpy(), *(bias.detach().numpy() for bias in head.biases)]


def fitted(v: Tensor, **options: object) -> DBMFisher:
    torch.manual_seed(0)
    head = DBMFisher(v.shape[1], **{'hidden': [5, 3], 'squash': False, 'epochs': 3, **options})
    head.fit(ListStream([v]))
    return head.double()


def test_score_of_an_rbm_is_the_gradient_of_the_log_likelihood():
    head = machine([3])
    v = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0]]).double()
    expected = reference.score(v.numpy(), *parts(head))
    np.testing.assert_allclose(head.score(v[:, None]).detach(), expected, atol=1e-8)


def test_score_of_a_dbm_is_the_gradient_of_the_bound():
    """The bound: expected negative energy plus entropy of the mean field, minus log Z."""
    head = machine([3, 2])
    v = torch.tensor([0.0, 1.0, 1.0, 0.0]).double()
    weights = [weight.detach().clone().requires_grad_() for weight in head.weights]
    mu = [layer.detach()[0] for layer in head.posteriors(v[None, None])]
    layers, biases = [v, *mu], [torch.from_numpy(b) for b in parts(head)[1]]
    expected_energy = sum(a @ w @ b for a, w, b in zip(layers, weights, layers[1:], strict=False))
    every = [torch.from_numpy(s) for s in reference.states([len(bias) for bias in biases])]
    log_z = reference.negative_energy(every, weights, biases).logsumexp(0)
    gradient = torch.autograd.grad(expected_energy - log_z, weights)
    expected = torch.cat([part.flatten() for part in gradient])
    torch.testing.assert_close(head.score(v[None, None])[0], expected, atol=1e-10, rtol=1e-8)
    # and mean field is where the bound is stationary
    mu1, mu2 = mu
    stationary = torch.sigmoid(v @ head.weights[0] + mu2 @ head.weights[1].T + head.biases[0])
    torch.testing.assert_close(mu1, stationary.detach(), atol=1e-10, rtol=0)


def test_score_of_a_dbm_nears_the_log_likelihoods_as_layers_decouple():
    """Mean field is exact without coupling between the hidden layers. Its error is of second order
    in the coupling for S, of first order for Q."""
    v = torch.tensor([[1.0, 0.0, 1.0, 1.0]]).double()
    errors = []
    for coupling in (0.4, 0.2, 0.1, 0.0):
        head = machine([3, 2])
        with torch.no_grad():
            head.weights[1].mul_(coupling)
        score = exact(head).score(v[:, None])[0].detach().numpy()
        error = np.abs(score - reference.score(v.numpy(), *parts(head))[0])
        errors.append((error[:12].max(), error[12:].max()))
    (s0, q0), (s1, q1), (s2, q2), none = errors
    assert max(none) < 1e-8
    assert max(s0, q0) < 0.05
    assert s1 < 0.35 * s0
    assert s2 < 0.35 * s1
    assert q1 < 0.6 * q0
    assert q2 < 0.6 * q1


@pytest.mark.parametrize('hidden', [[4], pytest.param([4, 3], marks=pytest.mark.slow)])
def test_training_ends_near_the_best_that_is_known(hidden):
    """Exact log-likelihood: above scikit-learn's RBM, and far above independent pixels."""
    v = bars(200)

    def mean(weights: list[np.ndarray], biases: list[np.ndarray]) -> float:
        return float(reference.log_likelihood(v.double().numpy(), weights, biases).mean())

    head = fitted(v, hidden=hidden, epochs=40)
    other = BernoulliRBM(4, learning_rate=0.05, batch_size=10, n_iter=100, random_state=0)
    other.fit(v.numpy())
    rbm = mean(
        [other.components_.T.astype(float)],
        [other.intercept_visible_.astype(float), other.intercept_hidden_.astype(float)],
    )
    share = v.double().mean(0).numpy()
    independent = mean([np.zeros((9, 1))], [np.log(share / (1 - share)), np.zeros(1)])
    own = mean(*parts(head))
    assert own > rbm
    assert own > independent + 0.5


@pytest.mark.parametrize('hidden', [[4], [4, 3]])
def test_model_moments_are_those_of_the_model(hidden):
    head = fitted(bars(200), hidden=hidden, epochs=20)
    expected = reference.model_moments(*parts(head))
    np.testing.assert_allclose(head.model_moments, expected, atol=0.04)


def test_another_seed_is_another_machine():
    v = bars(200)
    weights = [fitted(v, seed=seed, epochs=2).weights[0] for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2], atol=1e-3)


def test_phi_spans_zero_to_one_before_it_gets_its_length():
    v = bars().double()
    v = v[v.any(1)]  # a black image has no moments at all
    head = fitted(v.float(), hidden=[5], whiten=False)
    phi = head(v[:, None])
    torch.testing.assert_close(phi.norm(dim=1), torch.ones(len(v)).double())
    stretched = (head._moments(v) - head.low) / (head.high - head.low)
    torch.testing.assert_close(stretched.amin(0), torch.zeros(45).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(stretched.amax(0), torch.ones(45).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        phi, stretched / stretched.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5
    )


def test_what_training_never_saw_stays_bounded():
    """A pixel that is on in one training image, beside a unit that is off there, and then on."""
    v = torch.zeros(40, 3)
    v[::2, 0] = 1
    v[1, 1] = 1
    head = DBMFisher(3, hidden=[2], whiten=False, squash=False, epochs=1)
    with torch.no_grad():
        head.weights[0].copy_(torch.tensor([[60.0, -60.0], [0.0, 0.0], [0.0, 0.0]]))
        head.biases[0].copy_(torch.tensor([-30.0, 30.0]))
        moments = head._moments(v)
        head.low.copy_(moments.amin(0))
        head.high.copy_(moments.amax(0))
    assert 0 < head.high[2] < 1e-12  # pixel 1, unit 0
    phi = head(torch.tensor([[[1.0, 1.0, 0.0]]]))[0]
    torch.testing.assert_close(phi[[0, 2]], torch.full((2,), 2**-0.5))


def test_model_moments_cancel():
    head = fitted(bars())
    before = head(bars()[:, None])
    head.model_moments.add_(1.0)
    assert torch.equal(head(bars()[:, None]), before)


def test_full_rank_kernel_is_that_of_the_fisher_information():
    v = bars(2000).double()
    head = fitted(v.float(), hidden=[2], epochs=2, rank=None, ridge=0.0)
    phi = head._normalize(head._moments(v))
    information = np.cov(phi.detach().numpy().T, bias=True)
    expected = phi.detach().numpy() @ np.linalg.solve(information, phi.detach().numpy().T)
    z = head(v[:, None]).detach()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(z @ z.T, expected, atol=1e-3 * scale)
    # whitened training vectors have unit covariance
    np.testing.assert_allclose(np.cov(z.numpy().T, bias=True), np.eye(18), atol=1e-3)


def test_rank_and_ridge():
    v = bars(200)
    full = fitted(v, rank=None, ridge=0.0)
    some = fitted(v, rank=7, ridge=0.0)
    x = v[:, None].double()
    torch.testing.assert_close(some(x).abs(), full(x)[:, :7].abs(), rtol=1e-3, atol=1e-3)
    ridge = fitted(v, rank=7, ridge=0.5)
    shrunk = (some.variances / (some.variances + 0.5 * some.variances[0])).sqrt()
    torch.testing.assert_close(ridge(x), some(x) * shrunk)


def rows(count: int, d: int, seed: int = 0) -> Tensor:
    """Rows of a falling spectrum, off the origin."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, d + 1).double() ** -1.0
    mixing = torch.linalg.qr(torch.randn(d, d, generator=generator).double()).Q
    return torch.randn(count, d, generator=generator).double() * scales @ mixing + 2.0


@pytest.mark.parametrize('offset', [0.0, 2.0, 30.0])
def test_leading_axes_of_float32_rows_off_the_origin(offset):
    x = rows(300, 200) - 2 + offset
    _, variances = leading_axes(lambda: x.float().split(64), 60, iterations=6)
    expected = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)[:60]
    torch.testing.assert_close(variances, expected, rtol=0.01, atol=0)


@pytest.mark.parametrize(('count', 'd'), [(300, 200), (60, 200), (300, 40)])
def test_leading_axes_are_those_of_the_covariance(count, d):
    x = rows(count, d)
    axes, variances = leading_axes(lambda: x.split(64), 15)
    centred = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / count)
    torch.testing.assert_close(variances, values.flip(0)[:15], rtol=1e-3, atol=0)
    torch.testing.assert_close(axes.T @ axes, torch.eye(15).double())
    overlap = (axes * vectors.flip(1)[:, :15]).sum(0).abs()
    assert overlap[:10].min() > 0.99
    assert overlap[0] > 1 - 1e-6


def test_chunks_do_not_matter():
    x = rows(300, 200)
    one, other = leading_axes(lambda: [x], 15), leading_axes(lambda: x.split(7), 15)
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_kernel_does_not_change_under_a_linear_map_of_the_scores():
    x = rows(500, 12)
    mixing = torch.randn(12, 12, generator=torch.Generator().manual_seed(3)).double()

    def kernel(x: Tensor) -> Tensor:
        axes, variances = leading_axes(lambda: [x], 12)
        z = x @ axes * variances.rsqrt()
        return z @ z.T

    torch.testing.assert_close(kernel(x @ mixing), kernel(x), rtol=1e-6, atol=1e-6)


def test_fisher_information_is_never_formed():
    """d = 4 900 of 40 images: no tensor of the fit comes near d x d."""
    v = (torch.rand(40, 70, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    head = DBMFisher(70, hidden=[60, 11], rank=10, squash=False, epochs=1)
    with LargestTensor() as largest:
        head.fit(ListStream([v]))
    assert head.score_features == 4860
    assert largest.elements <= 40 * 4860


def test_squash_standardises():
    x = torch.randn(50, 6, 5, generator=torch.Generator().manual_seed(0)) * 1e3 + 7
    head = DBMFisher(5, hidden=[3], epochs=1)
    head.fit(ListStream([x]))
    mean = mean_descriptor(x)
    expected = torch.sigmoid((mean - mean.mean(0)) / mean.std(0, correction=0))
    torch.testing.assert_close(head._visible(x), expected)


def test_values_outside_the_unit_interval_are_refused():
    with pytest.raises(ValueError, match=r'lie in \[-2, 0.5\]. Leave squash at True'):
        DBMFisher(2, squash=False).fit(ListStream([torch.tensor([[-2.0, 0.5]])]))


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match='NaN or infinite'):
        DBMFisher(2).fit(ListStream([torch.tensor([[torch.nan, 0.5]])]))


def test_an_rbm_is_a_machine_of_one_layer():
    v = bars(200)
    trained = train_machine(v, [4], 3, 0.05, seed=0)
    assert [tuple(weight.shape) for weight in trained.weights] == [(9, 4)]
    head = fitted(v, hidden=[4], whiten=False)
    assert head.out_features == 36
    assert sorted(dict(head.named_parameters())) == ['biases.0', 'weights.0']


@pytest.mark.parametrize('hidden', [[], [3, 3, 3], 40, None, '40', {40: 80}])
def test_hidden_layers_are_a_list_of_one_or_two(hidden):
    with pytest.raises(ValueError, match='hidden as a list of one or two sizes, got'):
        DBMFisher(4, hidden=hidden)


@pytest.mark.parametrize('units', [0, 65_537, True, 2.0, '3', None])
def test_units_of_a_hidden_layer(units):
    with pytest.raises(ValueError, match=f'hidden from 1 to 65536.*got {units!r}'):
        DBMFisher(4, hidden=[3, units])
