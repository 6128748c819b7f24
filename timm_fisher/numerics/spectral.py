"""Functions of the eigenvalues of a covariance, on the smaller side, with a gradient that is finite
where eigenvalues are equal or zero."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Eigenvalues `[B, n]` -> h `[B, n]` and its divided differences `[B, n, n]`.
Spectrum = Callable[[Tensor], tuple[Tensor, Tensor]]


def covariance_function(x: Tensor, spectrum: Spectrum, at_zero: float | Tensor = 0.0) -> Tensor:
    """`f(S) = U f(s) U^T` `[B, d, d]` of the second moments `S = x^T x` of `[B, N, d]`.

    With `h(s) = (f(s) - f(0)) / s`, f of `x^T x` is `f(0) I + x^T h(x x^T) x`. So h is taken of the
    smaller one of `x x^T` and `x^T x`, and nothing is divided by a small eigenvalue that `spectrum`
    does not divide by itself.

    The gradient of a matrix function takes the divided differences `(h(s) - h(t)) / (s - t)`, h'(s)
    where both are equal. `spectrum` gives them in a form that is finite there, where the gradient
    of an eigendecomposition is not.

    Args:
        x: descriptors, centred and divided by the root of their number, float32 or better.
        spectrum: h and its divided differences, of eigenvalues that are not negative.
        at_zero: f(0), a number or `[B, 1, 1]`.
    """
    n, d = x.shape[1:]
    gram = x @ x.transpose(1, 2) if n < d else x.transpose(1, 2) @ x
    with torch.no_grad():
        s, v = torch.linalg.eigh(gram)
        h, differences = spectrum(s.clamp_min(0))
    # Zero, and its gradient that of the eigenvalues and eigenvectors.
    turned = v.transpose(1, 2) @ gram @ v
    turned = turned - turned.detach()
    function = v @ (torch.diag_embed(h) + differences * turned) @ v.transpose(1, 2)
    result: Tensor = x.transpose(1, 2) @ function @ x if n < d else gram @ function
    if isinstance(at_zero, float) and at_zero == 0:
        return result
    return result + at_zero * torch.eye(d, dtype=x.dtype, device=x.device)


def power_spectrum(s: Tensor, power: float, floor: float) -> tuple[Tensor, Tensor]:
    """Of `f(s) = s^3 (s^2 + floor^2)^((power - 3) / 2)`: `s^power` up to `(floor / s)^2`. Near zero
    it falls as `s^3`, so that rounding errors of zero eigenvalues have next to no power.

    With `k(s) = (s^2 + floor^2)^q`, `h(s) = s^2 k(s)`, and its difference for s < t is
    `s^2 k[s, t] + (s + t) k(t)`, of terms that are not much larger.
    """
    q = (power - 3) / 2
    log = (s.square() + floor**2).log()
    small = torch.minimum(s[:, :, None], s[:, None, :])
    # (a^q - b^q) / (a - b) = (a b)^((q - 1) / 2) sinh(q u) / sinh(u) with u = log(a / b) / 2: small
    # errors of a small u do not matter. And a - b = (s + t) (s - t).
    u = (log[:, :, None] - log[:, None, :]) / 2
    equal = u.abs() < 1e-4
    u = torch.where(equal, 1.0, u)
    ratio = torch.where(equal, q, torch.sinh(q * u) / torch.sinh(u))
    middle = ((q - 1) / 2 * (log[:, :, None] + log[:, None, :])).exp()
    larger = (q * torch.maximum(log[:, :, None], log[:, None, :])).exp()
    differences = (s[:, :, None] + s[:, None, :]) * (small.square() * middle * ratio + larger)
    return s.square() * (q * log).exp(), differences


def log_spectrum(s: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Of `f(s) = log(s + floor)`; f(0) is `log(floor)`.

    h(s) is the divided difference f[0, s], those of h are f[0, s, t]. Of three points in rising
    order it is `(f[y, z] - f[x, y]) / (z - x)`, the widest gap being the one to divide by.
    """
    a = s + floor
    x = torch.full_like(a, floor)[:, :, None].expand(*a.shape, a.shape[1])
    y = torch.minimum(a[:, :, None], a[:, None, :])
    z = torch.maximum(a[:, :, None], a[:, None, :])
    close = z - x < 1e-3 * x  # f''/2 at the mean of all three, up to 1e-6
    gap = torch.where(close, 1.0, z - x)
    middle = (x + y + z) / 3
    differences = torch.where(
        close, -0.5 / middle.square(), (_log_difference(y, z) - _log_difference(x, y)) / gap
    )
    return _log_difference(torch.full_like(a, floor), a), differences


def _log_difference(a: Tensor, b: Tensor) -> Tensor:
    """`(log b - log a) / (b - a)` of positive numbers, 1 / a where they are equal."""
    u = (b - a) / a
    return torch.where(u == 0, 1.0, torch.log1p(u) / torch.where(u == 0, 1.0, u)) / a


def shrinkage_spectrum(s: Tensor, shrinkage: float, eps: float) -> tuple[Tensor, Tensor]:
    """Of the regularised root `f(s) = r(s) - c` of `s + eps`, with `r(s) = sqrt(c^2 + (s + eps) /
    lambda)`, `c = (1 - lambda) / (2 lambda)` and lambda the shrinkage; f(0) is `r(0) - c`.

    h is `1 / (lambda (r(s) + r(0)))`, and its differences are
    `-1 / (lambda^2 (r(s) + r(t)) (r(s) + r(0)) (r(t) + r(0)))`.
    """
    c = (1 - shrinkage) / (2 * shrinkage)
    r = (c**2 + (s + eps) / shrinkage).sqrt()
    h = 1 / (shrinkage * (r + (c**2 + eps / shrinkage) ** 0.5))
    return h, -h[:, :, None] * h[:, None, :] / (r[:, :, None] + r[:, None, :])
