"""mpn_cov against the limit of Newton-Schulz iterations; gradients where eigenvalues are equal."""

from __future__ import annotations

import pytest
import torch
from references import mpn_cov as reference
from references.isqrt_cov import covariance
from torch import Tensor

from timm_fisher import create_head
from timm_fisher.heads.mpn_cov import FLOOR, LOG_FLOOR, normalized_covariance
from timm_fisher.numerics.spectral import log_spectrum, power_spectrum, shrinkage_spectrum

POWERS = [(0.5, False), (0.3, False), (1.0, False), (0.5, True)]
EQUAL = {
    'repeated': torch.cat([torch.eye(4), -torch.eye(4)])[None],
    'repeated and zero': torch.cat([torch.eye(6)[:3], -torch.eye(6)[:3]])[None],
    'gram side': torch.eye(7)[None, :4],
    'one zero': torch.cat([torch.eye(4), -torch.eye(4)])[None] * torch.tensor([1.0, 2.0, 2.0, 0.0]),
}


def descriptors(number: int, d: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, number, d, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize('reduce_dim', [None, 6])
@pytest.mark.parametrize('number', [5, 40])
def test_power_one_half_is_the_limit_of_isqrt_cov(number, reduce_dim):
    torch.manual_seed(0)
    head = create_head('mpn_cov', 8, reduce_dim=reduce_dim).double().eval()
    iterated = create_head('isqrt_cov', 8, reduce_dim=reduce_dim).double().eval()
    iterated.load_state_dict(head.state_dict())
    iterated.iterations = 40  # more than the constructor takes
    x = descriptors(number)
    torch.testing.assert_close(head(x), iterated(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(('power', 'log'), POWERS)
@pytest.mark.parametrize('number', [5, 30])
@pytest.mark.parametrize('scale', [1e-6, 1.0, 1e4])
def test_is_the_function_of_the_eigenvalues(number, power, log, scale):
    x = scale * descriptors(number)
    for row, ours in zip(x, normalized_covariance(x, power, log), strict=True):
        expected = torch.from_numpy(reference.normalize(covariance(row.numpy()), power, log))
        # What is left of zero eigenvalues is rounding to the power.
        torch.testing.assert_close(
            ours, expected, rtol=1e-6, atol=1e-4 * float(expected.abs().max())
        )
    if power == 0.5 and not log and number > 8:
        torch.testing.assert_close(ours @ ours, torch.from_numpy(covariance(row.numpy())))


@pytest.mark.parametrize(('power', 'log'), POWERS)
@pytest.mark.parametrize('case', EQUAL)
def test_gradient_at_equal_and_zero_eigenvalues(case, power, log):
    """Where that of an eigendecomposition is NaN."""
    x = EQUAL[case].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: normalized_covariance(x, power, log), x, atol=1e-4)


@pytest.mark.parametrize(('power', 'log'), POWERS)
@pytest.mark.parametrize('number', [5, 12])
def test_gradient_at_any_eigenvalues(number, power, log):
    x = descriptors(number).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: normalized_covariance(x, power, log), x, atol=1e-4)


@pytest.mark.parametrize(
    'spectrum',
    [
        lambda s: power_spectrum(s, 0.5, FLOOR),
        lambda s: power_spectrum(s, 0.3, FLOOR),
        lambda s: power_spectrum(s, 1.0, FLOOR),
        lambda s: log_spectrum(s, LOG_FLOOR),
        lambda s: shrinkage_spectrum(s, 0.5, 1e-7),
    ],
)
def test_divided_differences(spectrum):
    """In float32 those of float64, of eigenvalues far apart, near one another, equal and zero."""
    s = torch.tensor([[0, 1e-12, 3e-8, 1e-6, 1.01e-6, 1e-4, 0.2, 0.2000001, 0.2000001, 1]]).double()
    h, differences = spectrum(s)
    gap = s[:, :, None] - s[:, None, :]
    apart = gap.abs() > 1e-9 + 1e-3 * (s[:, :, None] + s[:, None, :])
    quotient = (h[:, :, None] - h[:, None, :]) / gap
    torch.testing.assert_close(differences[apart], quotient[apart], rtol=1e-4, atol=1e-6)
    # On the diagonal it is the derivative.
    points = s.clone().requires_grad_()
    (slope,) = torch.autograd.grad(spectrum(points)[0].sum(), points)
    diagonal = differences.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(diagonal[:, 1:], slope[:, 1:], rtol=1e-4, atol=1e-6)
    # Relative to h / s, where two large parts are all but equal, as those of a power of 1.
    rounding = 1e-5 * (h[:, :, None] + h[:, None, :]) / (s[:, :, None] + s[:, None, :] + 1e-12)
    single, single_differences = spectrum(s.float())
    torch.testing.assert_close(single.double(), h, rtol=1e-4, atol=1e-6)
    error = (single_differences - differences).abs()
    assert (error <= 3e-3 * differences.abs() + rounding).all()
