"""Algorithm 1 of "Deep Fisher Kernels": the SVM, the gradient, and an objective that falls."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from limits import within
from sklearn.metrics import average_precision_score

import timm_fisher
from timm_fisher import ListStream
from timm_fisher.heads.gmm_fisher import GMMFisher, Mixture
from timm_fisher.numerics.linalg import power_l2, unit_length
from timm_fisher.training import deep_fisher_svm as module
from timm_fisher.training.deep_fisher_svm import (
    FisherKernel,
    LabelledDescriptors,
    choose_costs,
    learn,
    line_search,
    one_vs_rest,
    solve_svms,
    to_classifier,
)


def synthetic(images: int, seed: int, number: int = 20, d: int = 5):
    """Descriptors `[images, number, d]` of three classes that differ in spread; signs."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % 3
    spread = 1 + 0.25 * torch.nn.functional.one_hot(labels, d)[:, None]
    y = spread * torch.randn(images, number, d, generator=generator)
    return y, torch.where(labels[:, None] == torch.arange(3), 1.0, -1.0).double()


@pytest.fixture
def problem():
    """A kernel after EM, and data."""

    def make(dtype=torch.float32, bias=False):
        torch.manual_seed(0)  # of the head's start
        splits = {name: synthetic(90, i) for i, name in enumerate(('train', 'val', 'test'))}
        head = GMMFisher(5, reduce_dim=None, components=4, l2_descriptors=False)
        head.fit(ListStream([splits['train'][0]]))
        y = {name: head.reduce(x).detach().to(dtype) for name, (x, _) in splits.items()}
        signs = {name: part for name, (_, part) in splits.items()}
        return FisherKernel(head.to(dtype), bias=bias), LabelledDescriptors(y, signs, list('abc'))

    return make


def random_svms(kernel, data, bias=False):
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(kernel.head.out_features + bias, 3, generator=generator).double()


# The SVM


def equation_4(w, phi, signs, costs):
    hinge = (1 - signs * (phi @ w)).clamp_min(0).square()
    return 0.5 * w.square().sum(0) + torch.tensor(costs) / len(phi) * hinge.sum(0)


@pytest.mark.parametrize('images', [30, 200])  # fewer and more than features
def test_svm_minimises_equation_4(images):
    generator = torch.Generator().manual_seed(0)
    phi = torch.nn.functional.normalize(torch.randn(images, 60, generator=generator).double())
    signs = torch.where(torch.rand(images, 2, generator=generator) < 0.3, 1.0, -1.0).double()
    costs = [7.0, 300.0]
    w = solve_svms(phi, signs, costs)
    other = torch.zeros(60, 2, dtype=torch.float64, requires_grad=True)
    lbfgs = torch.optim.LBFGS([other], max_iter=500, tolerance_grad=1e-10, tolerance_change=0,
                              line_search_fn='strong_wolfe')  # fmt: skip

    def closure():
        lbfgs.zero_grad()
        equation_4(other, phi, signs, costs).sum().backward()
        return equation_4(other, phi, signs, costs).sum()

    lbfgs.step(closure)
    torch.testing.assert_close(w, other, rtol=0, atol=1e-5 * w.abs().max().item())
    start = torch.randn(60, 2, generator=generator).double()
    torch.testing.assert_close(solve_svms(phi, signs, costs, start), w, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match='not finite'):
        solve_svms(phi, signs, costs, start * torch.nan)


def test_svm_from_its_solution_takes_one_system(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    phi = torch.nn.functional.normalize(torch.randn(30, 60, generator=generator))
    signs = torch.where(torch.rand(30, 1, generator=generator) < 0.3, 1.0, -1.0)
    systems, cholesky = [], torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, 'cholesky', lambda a: systems.append(a) or cholesky(a))
    w = solve_svms(phi, signs, [300.0])
    before = len(systems)
    torch.testing.assert_close(solve_svms(phi, signs, [300.0], w), w)
    assert len(systems) - before == 1 < before


@pytest.mark.parametrize('seed', [6, 12, 35, 43, 45])
def test_svm_where_full_newton_steps_never_end(seed):
    generator = torch.Generator().manual_seed(seed)
    phi = torch.nn.functional.normalize(torch.randn(12, 8, generator=generator).double())
    signs = torch.where(torch.rand(12, 1, generator=generator) < 0.5, 1.0, -1.0).double()
    with within(30):
        w = solve_svms(phi, signs, [30_000.0]).requires_grad_()
    (gradient,) = torch.autograd.grad(equation_4(w, phi, signs, [30_000.0]).sum(), w)
    assert gradient.norm() < 1e-9 * w.norm()


def test_costs_are_chosen_on_validation(problem):
    grid = (1.0, 100.0, 1000.0)
    kernel, data = problem()
    data.signs['test'] = data.y['test'] = None
    costs = choose_costs(kernel, data, shared=False, grid=grid)
    train, val = kernel.phi(data.y['train']), kernel.phi(data.y['val'])
    for c, chosen in enumerate(costs):
        precision = {}
        for cost in grid:
            w = solve_svms(train, data.signs['train'][:, [c]], [cost])
            decided = (val.double() @ w)[:, 0]
            precision[cost] = average_precision_score(data.signs['val'][:, c] > 0, decided)
        assert precision[chosen] == max(precision.values())
    assert len(set(choose_costs(kernel, data, shared=True, grid=grid))) == 1


def test_every_class_needs_an_image():
    signs = one_vs_rest(np.array([1, 0, 1]), ['a', 'b'], 'val')
    assert signs.tolist() == [[-1, 1], [1, -1], [-1, 1]]
    assert signs.dtype == torch.float64
    with pytest.raises(ValueError, match=r"split 'val' has no images of \['a', 'c'\]"):
        one_vs_rest(np.array([1, 1]), ['a', 'b', 'c'], 'val')


# The gradient


def loss_of(kernel, y, w, signs, mixture):
    """Written out with the head's own parameters, float64."""
    phi = power_l2(torch.func.functional_call(kernel.head, mixture._asdict(), y))
    if kernel.bias:
        phi = torch.cat([phi, torch.ones(len(phi), 1).to(phi)], 1)
    return (1 - signs * (phi @ w)).clamp_min(0).square().sum()


@pytest.mark.parametrize('bias', [False, True])
def test_gradient_equals_autograd_and_finite_differences(problem, monkeypatch, bias):
    monkeypatch.setattr(module, 'BATCH', 32)  # several batches, the last one smaller
    kernel, data = problem(torch.float64, bias)
    y, signs, w = data.y['train'], data.signs['train'], random_svms(kernel, data, bias)
    gradient = kernel.gradient(y, kernel.psi(y), w, signs)
    at = Mixture(*(part.requires_grad_() for part in kernel.get()))
    expected = torch.autograd.grad(loss_of(kernel, y, w, signs, at), at)
    for name, a, b in zip(Mixture._fields, gradient, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)
    assert not any(parameter.requires_grad for parameter in kernel.head.parameters())

    for i, name in enumerate(Mixture._fields):
        direction = gradient[i] / gradient[i].norm()  # another slope could be next to nothing
        values = []
        for eta in (1e-8, -1e-8):  # the square root is steep at zero
            moved = at._replace(**{name: at[i].detach() + eta * direction})
            values.append(loss_of(kernel, y, w, signs, moved).item())
        slope = (values[0] - values[1]) / 2e-8
        assert slope == pytest.approx((gradient[i] * direction).sum().item(), rel=1e-4)


def test_gradient_of_a_sample_is_right_on_average(problem):
    """Over four samples that share out the descriptors it is exact."""
    kernel, data = problem(torch.float64)
    y, signs, w = data.y['train'], data.signs['train'], random_svms(kernel, data)
    whole = kernel.gradient(y, kernel.psi(y), w, signs)
    samples = torch.rand(y.shape[:2]).argsort(1).chunk(4, 1)
    parts = [kernel.gradient(y, kernel.psi(y), w, signs, sample) for sample in samples]
    for i, expected in enumerate(whole):
        torch.testing.assert_close(sum(part[i] for part in parts) / 4, expected)


def test_gradient_of_all_tasks_is_the_sum(problem):
    kernel, data = problem(torch.float64)
    y, signs, w = data.y['train'], data.signs['train'], random_svms(kernel, data)
    together = kernel.gradient(y, kernel.psi(y), w, signs)
    alone = [kernel.gradient(y, kernel.psi(y), w[:, [c]], signs[:, [c]]) for c in range(3)]
    for i, expected in enumerate(together):
        torch.testing.assert_close(sum(gradient[i] for gradient in alone), expected)


# Algorithm 1


@pytest.mark.parametrize(
    ('task', 'bias', 'fraction'),
    [([0], False, 0.5), ([1], True, 1.0), ([0, 1, 2], False, 1.0), ([0, 1, 2], True, 0.5)],
)
def test_objective_falls(problem, task, bias, fraction):
    kernel, data = problem(bias=bias)
    options = dict(iterations=5, descriptor_fraction=fraction, tolerance=0.0)
    before = kernel.get()
    rows, mixtures = zip(*learn(kernel, data, task, 100.0, **options), strict=True)

    assert [row['iteration'] for row in rows] == list(range(6))
    trace = [value for row in rows for value in (row['objective'], row.get('objective_after_step'))]
    assert all(later < earlier for earlier, later in pairwise(trace[:-1]))
    assert trace[-2] < 0.95 * trace[0]

    # It is eq. 6, and the mixtures are those of the rows.
    torch.testing.assert_close(mixtures[0], before, rtol=0, atol=0)
    torch.testing.assert_close(mixtures[-1], kernel.get(), rtol=0, atol=0)
    for mixture, row in zip(mixtures, rows, strict=True):
        kernel.set(mixture)
        phi = kernel.phi(data.y['train']).double()
        w = solve_svms(phi, data.signs['train'][:, task], [100.0] * len(task))
        hinge = (1 - data.signs['train'][:, task] * (phi @ w)).clamp_min(0)
        value = 0.5 * w.square().sum() + 100 / 90 * hinge.square().sum()
        assert row['objective'] == pytest.approx(value.item(), rel=1e-6)
    assert mixtures[-1].log_weights.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_learning_stops_when_little_changes(problem):
    kernel, data = problem()
    learned = learn(kernel, data, [0, 1, 2], 100.0, iterations=50, tolerance=0.02)
    rows = [row for row, _ in learned]
    assert 1 < len(rows) < 51
    falls = [1 - later['objective'] / earlier['objective'] for earlier, later in pairwise(rows)]
    assert falls[-1] < 0.025
    assert min(falls[:-1]) > 0.015


def test_line_search_refuses_to_climb(problem):
    """But for a step that rounding hides."""
    kernel, data = problem()
    y, signs = data.y['train'], data.signs['train']
    psi, old = kernel.psi(y), kernel.get()
    w = solve_svms(kernel.finish(psi), signs, [100.0] * 3)

    def loss():
        return kernel.loss(kernel.psi(y), w, signs).item()

    before = loss()
    uphill = Mixture(*(-part for part in kernel.gradient(y, psi, w, signs)))
    step, after = line_search(kernel, uphill, loss, before, 10.0)
    assert step < 1e-8
    assert after == pytest.approx(before, rel=1e-7)
    torch.testing.assert_close(kernel.get(), old)
    step, after = line_search(kernel, kernel.gradient(y, psi, w, signs), loss, before, 1e-9)
    assert step > 1e-9
    assert after == loss() < before


def test_a_rise_is_an_error(problem, monkeypatch):
    kernel, data = problem()
    scales = iter([1.0, 2.0])
    monkeypatch.setattr(module, 'solve_svms', lambda *a: next(scales) * solve_svms(*a))
    with pytest.raises(FloatingPointError, match=r"of \['a'\] rose from .* in iteration 1"):
        list(learn(kernel, data, [0], 100.0))


# The model that comes of it


@pytest.mark.parametrize('l2_descriptors', [False, True])
def test_saved_model_gives_the_decision_values(tmp_path, l2_descriptors):
    arguments = dict(reduce_dim=5, components=3, l2_descriptors=l2_descriptors)
    model = timm_fisher.create_model(
        'test_resnet', 'gmm_fisher', num_classes=7, stage=-2, img_size=32, **arguments
    ).eval()
    images = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        (x,) = model.descriptors([model.forward_features(images)])
        model.head.fit(ListStream([x]))
        y = model.head.reduce(unit_length(x) if l2_descriptors else x)
    kernel = FisherKernel(model.head, bias=True)
    with torch.no_grad():
        torch.testing.assert_close(kernel.phi(y)[:, :-1], model.head(x), atol=1e-4, rtol=1e-4)
    kernel.set(Mixture(*(part + 0.1 * torch.rand_like(part) for part in kernel.get())))
    svms = torch.randn(31, 2).double()
    data_config = timm.data.resolve_input_data_config(model, {})
    to_classifier(model, kernel.get(), svms)
    timm_fisher.save_model(model, tmp_path, label_names=['one', 'two'], data_config=data_config)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    expected = kernel.phi(y).double() @ svms
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).double(), expected, atol=1e-3, rtol=1e-3)
