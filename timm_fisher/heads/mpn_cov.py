"""MPN-COV: covariance pooling with matrix power normalisation, or with a matrix logarithm.

    y = ReLU(bn(R x))                                reduction C -> d
    S = 1/N sum_i (y_i - m)(y_i - m)^T = U diag(s) U^T
    z = upper triangle of U diag(f(s)) U^T           d (d + 1) / 2 values
    f(s) = s^power, or with `log` f(s) = log(s + 1e-5 tr S)

By eigendecomposition, of S or, where there are fewer descriptors than dimensions, of the N x N Gram
matrix (`numerics.spectral`): `f(X^T X) = f(0) I + X^T h(X X^T) X`.

The power's slope is infinite at zero, and a covariance of N descriptors has at most N - 1
eigenvalues that are not. So s^power is taken as `s^3 (s^2 + t^2)^((power - 3) / 2)`, t = 1e-6 tr S:
the same up to `(t / s)^2`, with a finite gradient, and eigenvalues that are zero but for rounding
have neither a power nor a gradient, as in the authors' code. The logarithm needs a larger floor, of
the trace too, since it gives each zero eigenvalue the logarithm of the floor; DeepO2P's is
absolute. A map without any variance, a trace of zero, counts as one of trace 1 there.

Power 1/2 is the limit of `isqrt_cov` for many iterations, exact where that stops short on purpose.

Papers: Li, Xie, Wang and Zuo, "Is Second-order Information Helpful for Large-scale Visual
Recognition?", ICCV 2017 (MPN-COV; eqs. 2 and 3); the logarithm: Ionescu, Vantzos and Sminchisescu,
"Matrix Backpropagation for Deep Networks with Structured Layers", ICCV 2015 (DeepO2P).
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import relu

from timm_fisher.head import MOST_FEATURES, PoolingHead, check_range
from timm_fisher.numerics.linalg import LinearNorm, Triangle, precise, safe_trace
from timm_fisher.numerics.spectral import covariance_function, log_spectrum, power_spectrum

FLOOR = 1e-6  # of eigenvalues under a power, relative to the trace
LOG_FLOOR = 1e-5  # added to eigenvalues under the logarithm, relative to the trace


class MPNCov(PoolingHead):
    """Power or logarithm of the covariance of the descriptors.

    Args:
        in_features: channels C of one descriptor.
        reduce_dim: d, dimensions after the reduction, at most C; None keeps C and leaves the
            reduction, with its batch norm and ReLU, out.
        power: of the eigenvalues; 1 is the plain covariance. Small ones have steep slopes: at 0.1
            the gradient is off by some per cent in float32.
        log: the logarithm instead of the power, which then is without effect.

    Output: `[B, d (d + 1) / 2]`, the upper triangle row by row.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        in_features: int,
        *,
        reduce_dim: int | None = 256,
        power: float = 0.5,
        log: bool = False,
    ) -> None:
        super().__init__()
        check_range(
            'mpn_cov',
            reduce_dim=(reduce_dim, 1, MOST_FEATURES, None),
            power=(power, 0.01, 1.0),
        )
        d = min(reduce_dim or in_features, in_features)
        self.in_features = in_features
        self.triangle = Triangle(d)
        self.out_features = self.triangle.length
        self.power = power
        self.log = log
        self.reduce = LinearNorm(in_features, d) if reduce_dim is not None else None

    @precise
    def forward(self, x: Tensor) -> Tensor:
        y = x if self.reduce is None else relu(self.reduce(x))
        z: Tensor = self.triangle(normalized_covariance(y, self.power, self.log))
        return z


def normalized_covariance(x: Tensor, power: float, log: bool) -> Tensor:
    """The power, or logarithm, `[B, d, d]` of covariances of descriptors `[B, N, d]`, float32 or
    better."""
    x = (x - x.mean(1, keepdim=True)) * x.shape[1] ** -0.5
    trace = safe_trace(x.square().sum((1, 2)))
    x = x * trace.rsqrt()
    if log:
        spectrum = partial(log_spectrum, floor=LOG_FLOOR)
        return covariance_function(x, spectrum, math.log(LOG_FLOOR) + torch.log(trace))
    return covariance_function(x, partial(power_spectrum, power=power, floor=FLOOR)) * trace**power
