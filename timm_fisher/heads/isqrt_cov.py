"""iSQRT-COV: covariance pooling with a matrix square root.

    y = ReLU(bn(R x))                                reduction C -> d
    S = 1/N sum_i (y_i - m)(y_i - m)^T
    z = upper triangle of an approximate root of S   d (d + 1) / 2 values

The root is that of Newton-Schulz iterations, divided by the trace before and multiplied by its
root after; five iterations are meant to stop short of the true root. The triangle is read in the
order of the authors' code, so that their classifier fits.

Paper: Li, Xie, Wang and Gao, "Towards Faster Training of Global Covariance Pooling Networks by
Iterative Matrix Square Root Normalization", CVPR 2018. The authors keep stride 1 in the last stage
of a ResNet, without dilation (`last_stride=1` of the model).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import relu

from timm_fisher.head import MOST_FEATURES, MOST_STEPS, PoolingHead, check_range
from timm_fisher.numerics.linalg import LinearNorm, Triangle, covariance_root, precise


class ISqrtCov(PoolingHead):
    """Iterative matrix square root of the covariance of the descriptors.

    Args:
        in_features: channels C of one descriptor.
        reduce_dim: d, dimensions after the reduction, at most C; None keeps C and leaves the
            reduction, with its batch norm and ReLU, out.
        iterations: of Newton-Schulz.

    Output: `[B, d (d + 1) / 2]`, the upper triangle row by row.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self, in_features: int, *, reduce_dim: int | None = 256, iterations: int = 5
    ) -> None:
        super().__init__()
        check_range(
            'isqrt_cov',
            reduce_dim=(reduce_dim, 1, MOST_FEATURES, None),
            iterations=(iterations, 1, MOST_STEPS),
        )
        d = min(reduce_dim or in_features, in_features)
        self.in_features = in_features
        self.triangle = Triangle(d)
        self.out_features = self.triangle.length
        self.iterations = iterations
        self.reduce = LinearNorm(in_features, d) if reduce_dim is not None else None

    @precise
    def forward(self, x: Tensor) -> Tensor:
        y = x if self.reduce is None else relu(self.reduce(x))
        z: Tensor = self.triangle(covariance_root(y, self.iterations))
        return z
