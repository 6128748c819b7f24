"""gsnmf against scikit-learn's NMF and dictionary learning, autograd and a slow reference."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from references import gsnmf as reference
from sklearn.datasets import load_digits, load_sample_images
from sklearn.decomposition import NMF, DictionaryLearning, _nmf, non_negative_factorization
from torch import Tensor

from timm_fisher import ListStream
from timm_fisher.heads import gsnmf
from timm_fisher.heads.gsnmf import GSNMF, factorize, nndsvd

PENALTIES = [(0.0, 0.0), (0.02, 0.05), (0.0, 0.1), (0.5, 0.0)]
pytestmark = pytest.mark.filterwarnings('ignore::sklearn.exceptions.ConvergenceWarning')


@cache
def digits(number: int = 400) -> np.ndarray:
    """Images of handwritten digits, `[n, 64]`, of unit length: many zeros, no negative values."""
    rows = load_digits().data[:number].astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def descriptors(batch: int = 12, number: int = 5, channels: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, number, channels, generator=generator).double()


def head(x: Tensor, **arguments: object) -> GSNMF:
    torch.manual_seed(0)
    made = GSNMF(x.shape[-1], **{'components': 6, **arguments})
    made.fit(ListStream([x]))
    return made.double()


def options(made: GSNMF) -> dict:
    return {k: getattr(made, k) for k in ('updates', 'l2_penalty', 'l1_penalty', 'signed')}


def numpy_state(made: GSNMF) -> dict:
    return {key: value.double().numpy() for key, value in made.state_dict().items()}


def objective(x: np.ndarray, w: np.ndarray, h: np.ndarray, l2: float, l1: float) -> float:
    """Eq. 2, `x` `[n, C]`, `w` `[C, L]`, `h` `[L, n]`."""
    x, w, h = (np.asarray(matrix, dtype=np.float64) for matrix in (x, w, h))
    return 0.5 * np.sum((x.T - w @ h) ** 2) + 0.5 * l2 * np.sum(h**2) + l1 * np.sum(h)


def scikit_learn_codes(x: np.ndarray, w: np.ndarray, l2: float, l1: float) -> np.ndarray:
    """Codes `[L, n]` that minimise eq. 2 for a fixed basis, by coordinate descent.

    scikit-learn factorizes X instead of its transpose, so the codes are its W. It multiplies
    `alpha_W` by the number of features, and shares it out by `l1_ratio`.
    """
    total = l2 + l1
    basis = np.ascontiguousarray(w.T).astype(x.dtype)
    codes, _, _ = non_negative_factorization(
        x, H=basis, n_components=len(basis), init='custom', update_H=False, solver='cd', tol=1e-7,
        max_iter=1000, alpha_W=total / x.shape[1], alpha_H=0.0,
        l1_ratio=l1 / total if total else 0.0,
    )  # fmt: skip
    return codes.T


def scikit_learn_nmf(
    x: np.ndarray, components: int, solver: str, l2: float, l1: float
) -> tuple[np.ndarray, np.ndarray]:
    """W `[C, L]` and H `[L, n]` from the same start."""
    w, h = nndsvd(torch.from_numpy(x), components)
    total = l2 + l1
    model = NMF(
        components, init='custom', solver=solver, max_iter=300, alpha_W=total / x.shape[1],
        alpha_H=0.0, l1_ratio=l1 / total if total else 0.0,
    )  # fmt: skip
    start = np.ascontiguousarray(w.T.numpy()).astype(x.dtype)
    codes = model.fit_transform(x, W=np.ascontiguousarray(h.T.numpy()), H=start)
    return model.components_.T, codes.T


@pytest.mark.parametrize('signed', ['relu', 'softplus', 'split'])
@pytest.mark.parametrize('components', [5, 60])
def test_equals_reference(signed, components):
    x = descriptors()
    made = head(x, signed=signed, components=components, updates=30)
    pooled, loss = made.forward_with_loss(x)
    expected = reference.pool(numpy_state(made), x.numpy(), options(made))
    np.testing.assert_allclose(pooled.detach(), expected, rtol=1e-9, atol=1e-14)
    expected = reference.loss(numpy_state(made), x.numpy(), options(made))
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    assert made.basis.shape == (32 if signed == 'split' else 16, components)


@pytest.mark.parametrize('signed', ['relu', 'split'])
def test_partial_fit_is_one_round_of_the_paper(signed):
    x = descriptors(batch=40)
    made = head(x[:10], signed=signed)
    expected = reference.update(numpy_state(made), x.numpy(), options(made))
    made.partial_fit(ListStream([x]))
    np.testing.assert_allclose(made.basis.detach(), expected, rtol=1e-9, atol=1e-12)
    other = head(x[:10], signed=signed)
    other.partial_fit(ListStream([x[:7], x[7:]]))
    torch.testing.assert_close(other.basis, made.basis)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_partial_fit_ignores_autocast(dtype):
    """It is called inside the forward that accelerate has put under autocast."""
    x = descriptors(batch=40).float()
    plain, made = head(x[:10]).float(), head(x[:10]).float()
    plain.partial_fit(ListStream([x]))
    with torch.autocast('cpu', dtype):
        made.partial_fit(ListStream([x]))
    assert torch.equal(made.basis, plain.basis)


def test_partial_fit_lowers_the_error():
    x = descriptors(batch=40)
    torch.manual_seed(0)
    made = GSNMF(16, components=6, l2_penalty=0.0, l1_penalty=0.0, updates=200).double()
    losses = []
    for _ in range(20):
        losses.append(made.forward_with_loss(x)[1].item())
        made.partial_fit(ListStream([x]))
    assert all(np.diff(losses) < 1e-6)
    assert losses[-1] < 0.8 * losses[0]


def test_partial_fit_leaves_alone_what_no_code_uses():
    x = descriptors()
    made = head(x)
    before = made.basis.detach().clone()
    made.partial_fit(ListStream([0 * x]))
    torch.testing.assert_close(made.basis.detach(), before)
    with torch.no_grad():
        made.basis[:, 2] = 0
        made.basis[:, 3] = torch.arange(16) == 5
    made.partial_fit(ListStream([x * (torch.arange(16) != 5)]))
    torch.testing.assert_close(
        made.basis[:, 2:4], torch.eye(16).double()[:, [5, 5]] * torch.tensor([0, 1])
    )
    assert torch.isfinite(made.basis).all()


def test_unsupervised_loss_has_the_gradient_of_the_minimum():
    """The code is held fixed; where it minimises eq. 2, going through it changes nothing."""
    x = descriptors().requires_grad_()
    made = head(x.detach(), updates=1000)
    ours = torch.autograd.grad(made.forward_with_loss(x)[1], (x, made.basis))
    features = made._features(x)
    h = made._code(features)
    loss = 0.5 * (features - h @ made.basis.T).square().sum(1)
    loss = loss + 0.5 * made.l2_penalty * h.square().sum(1) + made.l1_penalty * h.sum(1)
    through = torch.autograd.grad(loss.mean(), (x, made.basis))
    for left, right in zip(ours, through, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-6)
        assert left.abs().max() > 1e-4


@pytest.mark.parametrize(('l2', 'l1'), PENALTIES)
def test_codes_are_those_of_scikit_learn(l2, l1):
    x = digits(60)
    w, _, _ = factorize(torch.from_numpy(digits()), 16, l2_penalty=l2, l1_penalty=l1, rounds=30)
    made = GSNMF(64, components=16, l2_penalty=l2, l1_penalty=l1)
    made.updates = 2000  # more than the constructor takes
    made.basis.data = w.float()
    with torch.no_grad():
        ours = made(torch.from_numpy(x)[:, None]).T.numpy()
    theirs = scikit_learn_codes(x, w.numpy(), l2, l1)
    np.testing.assert_allclose(ours, theirs, atol=5e-3)
    least = objective(x, w, theirs, l2, l1)
    assert objective(x, w, ours, l2, l1) == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize('components', [1, 12, 40])
def test_start_is_that_of_scikit_learn(components, monkeypatch):
    x = digits(150).astype(np.float64)

    def exact(rows, count, random_state=None):
        u, s, v = scipy.linalg.svd(rows, full_matrices=False)
        return u[:, :count], s[:count], v[:count]

    monkeypatch.setattr(_nmf, '_randomized_svd', exact)
    codes, basis = _nmf._initialize_nmf(x, components, init='nndsvd')
    w, h = nndsvd(torch.from_numpy(x), components)
    np.testing.assert_allclose(w, basis.T, atol=1e-9)
    np.testing.assert_allclose(h, codes.T, atol=1e-9)
    w32, h32 = nndsvd(torch.from_numpy(x).float(), components)
    np.testing.assert_allclose(w32, basis.T, atol=1e-5)
    np.testing.assert_allclose(h32, codes.T, atol=1e-5)


def test_start_beyond_the_rank_is_zero():
    x = torch.from_numpy(digits(30)) * (torch.arange(64) < 30)
    w, h = nndsvd(x, 50)
    assert w.shape == (64, 50)
    assert h.shape == (50, 30)
    assert not w[:, 30:].any()
    assert not h[30:].any()
    torch.testing.assert_close(nndsvd(x, 7)[0], w[:, :7])


@pytest.mark.parametrize(('l2', 'l1'), PENALTIES)
@pytest.mark.parametrize('components', [12, 100])
def test_objective_never_rises(l2, l1, components):
    x = digits()
    w, h, history = factorize(
        torch.from_numpy(x), components, l2_penalty=l2, l1_penalty=l1, rounds=25
    )
    assert all(np.diff(history) <= 1e-6 * history[0])
    assert history[-1] == pytest.approx(objective(x, w, h, l2, l1), rel=1e-5)
    assert min(w.min(), h.min()) == 0
    torch.testing.assert_close(w.norm(dim=0), torch.ones(components).double())


def test_objective_is_that_of_scikit_learn():
    x = digits()
    history = factorize(torch.from_numpy(x), 12)[2]
    for solver in ('cd', 'mu'):
        w, h = scikit_learn_nmf(x, 12, solver, 0.0, 0.0)
        assert history[-1] <= 1.01 * objective(x, w, h, 0, 0)


@pytest.mark.parametrize(('l2', 'l1'), PENALTIES[1:])
def test_objective_with_penalties_is_not_above_scikit_learns(l2, l1):
    """scikit-learn lets the basis grow and the codes shrink until nothing is left of the penalties;
    under unit columns its solution is worse."""
    x = digits()
    history = factorize(torch.from_numpy(x), 12, l2_penalty=l2, l1_penalty=l1)[2]
    w, _ = scikit_learn_nmf(x, 12, 'cd', l2, l1)
    length = np.linalg.norm(w, axis=0)
    assert length.min() > 5
    w /= length
    theirs = objective(x, w, scikit_learn_codes(x, w, l2, l1), l2, l1)
    assert history[-1] <= 1.01 * theirs


def photographs() -> np.ndarray:
    """Pooled features `[2000, 512]` of unit length: the responses, rectified, of 512 random filters
    to 2000 patches of scikit-learn's two photographs."""
    generator = torch.Generator().manual_seed(0)
    filters = torch.randn(512, 3, 7, 7, generator=generator)
    filters -= filters.mean((1, 2, 3), keepdim=True)
    rows = []
    for image in load_sample_images().images:
        pixels = torch.tensor(image).movedim(2, 0)[None] / 255
        responses = F.conv2d(pixels, filters, stride=4).relu()  # 106 x 159 positions
        pooled = F.avg_pool2d(responses, 7, stride=3)[0].flatten(1).T
        rows.append(pooled[torch.randperm(len(pooled), generator=generator)[:1000]])
    return F.normalize(torch.cat(rows)).numpy()


@pytest.mark.slow
@pytest.mark.parametrize(('l2', 'l1'), PENALTIES[:2])
def test_objective_on_features_of_photographs(l2, l1):
    """It never rises, and ends within 1 % of scikit-learn's, or below, from the same start and with
    the same penalties, which count under unit columns."""
    x = photographs()
    assert x.shape == (2000, 512)
    history = factorize(torch.from_numpy(x), 32, l2_penalty=l2, l1_penalty=l1)[2]
    assert all(np.diff(history) <= 1e-6 * history[0])
    w, h = scikit_learn_nmf(x, 32, 'cd', l2, l1)
    if l2 or l1:
        w /= np.maximum(np.linalg.norm(w, axis=0), 1e-12)
        h = scikit_learn_codes(x, w, l2, l1)
    theirs = objective(x, w, h, l2, l1)
    print(f'{len(history)} rounds: {history[-1]:.6g}, scikit-learn {theirs:.6g}')
    assert history[-1] <= 1.01 * theirs


def test_objective_is_that_of_dictionary_learning():
    """The same problem, where the penalty is L1 alone."""
    x = digits(80)
    w, h, history = factorize(torch.from_numpy(x), 8, l1_penalty=0.1)
    model = DictionaryLearning(
        8, alpha=0.1, fit_algorithm='cd', transform_algorithm='lasso_cd', positive_code=True,
        positive_dict=True, max_iter=200, code_init=h.T.double().numpy(),
        dict_init=w.T.numpy().copy(),
    )  # fmt: skip
    theirs = model.fit(x.astype(np.float64)).error_[-1]
    assert history[-1] == pytest.approx(theirs, rel=0.01)


def test_columns_that_nothing_uses_start_anew(monkeypatch):
    x = torch.from_numpy(digits(200))
    start, _ = nndsvd(x, 80)
    assert (start.norm(dim=0) == 0).sum() > 20  # more components than channels that vary
    w, h, anew = factorize(x, 80, l1_penalty=0.2, rounds=20)
    assert all(np.diff(anew) <= 1e-6 * anew[0])
    assert torch.isfinite(w).all()
    monkeypatch.setattr(gsnmf, 'worst_residuals', lambda x, *_: x[:0].double())
    _, few, history = factorize(x, 80, l1_penalty=0.2, rounds=20)
    assert h.any(1).sum() > few.any(1).sum() + 5
    assert anew[-1] < 0.995 * history[-1]


def test_a_penalty_above_one_leaves_nothing():
    x = torch.from_numpy(digits())
    w, h, history = factorize(x, 12, l1_penalty=1.1)
    assert not h.any()
    assert history[-1] == pytest.approx(200)
    torch.testing.assert_close(w.norm(dim=0), torch.ones(12).double())


@pytest.mark.parametrize('number', [1, 5, 12])
def test_no_more_rows_than_components(number):
    x = torch.from_numpy(digits(number))
    w, h, history = factorize(x, 12)
    torch.testing.assert_close(w.float() @ h, x.T, atol=1e-3, rtol=0)
    assert history[-1] < 1e-6
    least = factorize(x, 12, l1_penalty=0.1)[2][-1]
    assert least == pytest.approx(number * (0.1 - 0.1**2 / 2), rel=0.05)


def test_fit_refuses_what_is_not_finite():
    x = descriptors()
    x[3, 2, 1] = torch.nan
    with pytest.raises(ValueError, match='NaN or infinite'):
        head(x)


def test_scale_of_the_backbone_does_not_matter():
    x = descriptors()
    torch.testing.assert_close(head(1e4 * x)(1e4 * x), head(x)(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(('l2', 'l1'), PENALTIES)
def test_zero_columns_stay_finite(l2, l1):
    made = GSNMF(16, components=6, l2_penalty=l2, l1_penalty=l1)
    with torch.no_grad():
        made.basis[:, 1] = 0
        made.basis[:, 2] = -1
        made.basis[:, 3] *= 7
    made.project_()
    expected = torch.tensor([1.0, 0, 0, 1, 1, 1])
    torch.testing.assert_close(made.basis.norm(dim=0), expected)
    x = descriptors().float()
    x[0] = 0
    x.requires_grad_()
    pooled, loss = made.forward_with_loss(x)
    (pooled.sum() + loss).backward()
    assert not pooled[0].any()
    assert not pooled[:, 1:3].any()
    for gradient in (x.grad, made.basis.grad):
        assert torch.isfinite(gradient).all()


def test_unknown_sign():
    with pytest.raises(ValueError, match="relu, softplus, split, got 'abs'"):
        GSNMF(16, signed='abs')
