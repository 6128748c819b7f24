"""sparse_fisher against scikit-learn, autograd and a slow float64 reference."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from references import sparse_fisher as reference
from sklearn.decomposition import DictionaryLearning, sparse_encode
from torch.nn import functional as F

from timm_fisher import ListStream
from timm_fisher.heads.sparse_fisher import SparseFisher
from timm_fisher.numerics.sparse_coding import ista, learn_dictionary


def data(images: int = 30, number: int = 20, channels: int = 24, seed: int = 0) -> torch.Tensor:
    """Descriptors that really are sparse over some atoms, plus noise and an offset."""
    generator = torch.Generator().manual_seed(seed)
    atoms = F.normalize(
        torch.randn(channels, 40, generator=torch.Generator().manual_seed(7)), dim=0
    )
    codes = torch.randn(images, number, 40, generator=generator)
    codes *= torch.rand(images, number, 40, generator=generator) < 0.1
    x = codes @ atoms.T + 0.05 * torch.randn(images, number, channels, generator=generator)
    return (x + 3).double()


def head(x: torch.Tensor, **arguments: object) -> SparseFisher:
    torch.manual_seed(0)
    made = SparseFisher(x.shape[-1], **{'reduce_dim': 12, 'code_dim': 16, **arguments})
    made.fit(ListStream([x]))
    return made.double()


def numpy_state(made: SparseFisher) -> dict:
    return {key: value.numpy() for key, value in made.state_dict().items()}


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('iterations', [1, 2, 5])
def test_equals_reference(tied, iterations):
    x = data()
    made = head(x, tied=tied, iterations=iterations, normalize=False)
    if not tied:  # away from the start, where free and tied weights are the same
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, dtype=torch.float64)
    arguments = dict(tied=tied, iterations=iterations, sparsity=made.sparsity, normalize=False)
    pooled, loss = made.forward_with_loss(x[:4])
    expected = reference.pool(numpy_state(made), x[:4].numpy(), arguments)
    np.testing.assert_allclose(pooled.detach(), expected, rtol=1e-10, atol=1e-12)
    expected = reference.loss(numpy_state(made), x[:4].numpy(), arguments)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_unsupervised_loss_does_not_shrink_the_reduction():
    """Eq. 1 is zero for y = 0; only the cross-entropy may train the reduction."""
    x = data()[:8]
    made = head(x)
    made.forward_with_loss(x)[1].backward()
    assert made.reduce.weight.grad is None
    assert made.dictionary.grad.abs().max() > 0
    assert made.encoder.grad.abs().max() > 0
    made.forward_with_loss(x)[0].abs().sum().backward()
    assert made.reduce.weight.grad.abs().max() > 1e-3


def test_free_weights_start_as_tied_ones():
    x = data()
    torch.testing.assert_close(head(x, tied=False)(x), head(x, tied=True)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('sparsity', [0.05, 0.2])
def test_many_tied_iterations_are_the_lasso(sparsity):
    x = data()
    # Fewer atoms than dimensions, so that the solution is unique and both converge to it.
    made = head(x, tied=True, sparsity=sparsity, code_dim=10)
    made.iterations = 3000  # more than the constructor takes
    with torch.no_grad():
        y = made.reduce(x).flatten(0, 1).numpy()
        code = made.encode(made.reduce(x))[0].flatten(0, 1).numpy()
    # scikit-learn minimises |y - B u|^2 / 2 + alpha |u|_1
    atoms = made.dictionary.detach().numpy().T
    expected = sparse_encode(
        y, atoms, algorithm='lasso_cd', alpha=sparsity / 2, max_iter=20000, check_input=False
    )
    np.testing.assert_allclose(code, expected, atol=2e-4)
    share = np.mean(np.abs(expected) > 1e-3)
    assert 0.02 < share < 0.9


def test_fisher_code_is_the_gradient_of_the_loss():
    """At the optimal code the derivative through the code vanishes (envelope theorem), so that
    G = -1/2 d loss / d B even when autograd goes through all iterations."""
    x = data(images=1)
    made = head(x, tied=True, normalize=False)
    made.iterations = 3000
    pooled, loss = made.forward_with_loss(x)
    (gradient,) = torch.autograd.grad(loss, made.dictionary)
    torch.testing.assert_close(pooled[0], -gradient.flatten() / 2, rtol=1e-4, atol=1e-6)
    assert pooled.abs().max() > 1e-3


def test_ista_step():
    dictionary = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w, s, threshold = ista(dictionary, 0.3)
    y, u = torch.randn(6, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    step = 1 / (2 * torch.linalg.matrix_norm(dictionary, 2) ** 2)
    gradient = 2 * dictionary.T @ (dictionary @ u - y)
    torch.testing.assert_close(s @ u + w @ y, u - step * gradient)
    torch.testing.assert_close(threshold, 0.3 * step)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::sklearn.exceptions.ConvergenceWarning')
def test_dictionary_is_as_good_as_scikit_learns():
    x = data()
    y = head(x).reduce(x).detach().flatten(0, 1)

    def objective(dictionary: np.ndarray) -> float:
        code = sparse_encode(
            y.numpy(), dictionary.T, algorithm='lasso_cd', alpha=0.05, max_iter=20000
        )
        error = y.numpy() - code @ dictionary.T
        return float(np.mean((error**2).sum(1) + 0.1 * np.abs(code).sum(1)))

    ours = learn_dictionary(y, 16, 0.1)
    torch.testing.assert_close(ours.norm(dim=0), torch.ones(16, dtype=torch.float64))
    theirs = DictionaryLearning(16, alpha=0.05, max_iter=100, random_state=0, fit_algorithm='cd')
    theirs = theirs.fit(y.numpy()).components_.T
    assert objective(ours.numpy()) < 1.02 * objective(theirs)
    start = F.normalize(y[torch.randperm(len(y))[:16]], dim=1).T
    assert objective(ours.numpy()) < 0.9 * objective(start.numpy())


@pytest.mark.filterwarnings('ignore::sklearn.exceptions.ConvergenceWarning')
def test_dictionary_objective_never_rises():
    x = data()
    y = head(x).reduce(x).detach().flatten(0, 1)
    values = []
    for rounds in (1, 2, 4, 8, 16, 32):
        dictionary = learn_dictionary(y, 16, 0.1, rounds=rounds)
        code = sparse_encode(
            y.numpy(), dictionary.numpy().T, algorithm='lasso_cd', alpha=0.05, max_iter=20000
        )
        error = y.numpy() - code @ dictionary.numpy().T
        values.append(np.mean((error**2).sum(1) + 0.1 * np.abs(code).sum(1)))
    assert all(later <= earlier * (1 + 1e-3) for earlier, later in pairwise(values))


def test_codes_are_sparse_at_any_scale_of_the_backbone():
    x = data()
    shares, outputs = [], []
    for scale in (1e-3, 1.0, 1e4):
        made = head(x * scale)
        code, _ = made.encode(made.reduce(x * scale))
        shares.append((code != 0).double().mean().item())
        outputs.append(made(x * scale))
    assert 0.05 < shares[1] < 0.95
    assert shares == pytest.approx([shares[1]] * 3, abs=1e-6)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(outputs[2], outputs[1], rtol=1e-3, atol=1e-4)


def test_fit_reduces_by_pca_to_unit_mean_square():
    x = data()
    made = head(x)
    y = made.reduce(x).detach().flatten(0, 1)
    torch.testing.assert_close(y.mean(0), torch.zeros(12, dtype=torch.float64), rtol=0, atol=1e-6)
    assert y.square().sum(1).mean().item() == pytest.approx(1, rel=1e-5)
    covariance = np.cov(y.numpy().T)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-6)


def test_fit_to_fewer_descriptors_than_atoms():
    made = head(data(images=2, number=3), code_dim=50)
    assert torch.isfinite(made(data())).all()
    torch.testing.assert_close(made.dictionary.norm(dim=0), torch.ones(50, dtype=torch.float64))


def test_fit_refuses_what_is_not_finite():
    x = data()
    x[3, 2, 1] = torch.nan
    with pytest.raises(ValueError, match='NaN or infinite'):
        head(x)


def test_project_cuts_long_atoms_only():
    made = SparseFisher(24, code_dim=3)
    with torch.no_grad():
        made.dictionary.mul_(torch.tensor([0.5, 1.0, 3.0]))
    made.project_()
    torch.testing.assert_close(made.dictionary.norm(dim=0), torch.tensor([0.5, 1.0, 1.0]))


def test_reduction_never_exceeds_the_channels():
    assert SparseFisher(24, reduce_dim=None, code_dim=5).out_features == 24 * 5
    assert SparseFisher(24, reduce_dim=128, code_dim=5).out_features == 24 * 5
    assert SparseFisher(24, reduce_dim=8, code_dim=5).out_features == 8 * 5
