"""B-CNN: bilinear pooling of one network with itself, a second moment.

    y = R x                               reduction C -> d without bias
    M = 1/N sum_i y_i y_i^T               not centred
    z = power_l2(vec M)                   signed square root, then L2

M is symmetric, so one triangle says all. The inner product of two matrices counts an entry beside
the diagonal twice; with such entries times sqrt(2), after the signed square root, inner products
of triangles are those of full matrices, and so are lengths. A linear classifier or kernel
therefore sees the full matrix at half the size.

Paper: Lin, RoyChowdhury and Maji, "Bilinear CNN Models for Fine-grained Visual Recognition",
ICCV 2015 (eq. 2 and section 3.1, both networks the same). The paper has no reduction.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_fisher.fitting.stream import DescriptorStream
from timm_fisher.head import MOST_FEATURES, PoolingHead, check_range
from timm_fisher.numerics.clustering import pca
from timm_fisher.numerics.linalg import Linear, Triangle, power_l2, precise

FIT_SAMPLE = 10_000  # descriptors that PCA is fitted to


class Bilinear(PoolingHead):
    """Second moment of the descriptors, with signed square root and L2 norm.

    Args:
        in_features: channels C of one descriptor.
        reduce_dim: d, dimensions after the reduction, at most C; None keeps C, without reduction.
        normalize: end with signed square root and L2 norm.

    Output: `[B, d (d + 1) / 2]`, the upper triangle row by row, sqrt(2) beside the diagonal.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self, in_features: int, *, reduce_dim: int | None = 128, normalize: bool = True
    ) -> None:
        super().__init__()
        check_range('bilinear', reduce_dim=(reduce_dim, 1, MOST_FEATURES, None))
        d = min(reduce_dim or in_features, in_features)
        self.in_features = in_features
        self.triangle = Triangle(d)
        self.out_features = self.triangle.length
        self.normalize = normalize
        self.reduce = None
        if reduce_dim is not None:
            self.reduce = Linear(in_features, d, bias=False)
            nn.init.orthogonal_(self.reduce.weight)

    @precise
    def forward(self, x: Tensor) -> Tensor:
        y = x if self.reduce is None else self.reduce(x)
        n, d = y.shape[1:]
        z: Tensor = self.triangle(y.transpose(1, 2) @ y / n)
        if self.normalize:
            z = power_l2(z)
        z = torch.where(self.triangle.index % (d + 1) == 0, z, 2**0.5 * z)
        # With `normalize` of length 1 to sqrt(2) by now, or zero.
        return F.normalize(z, dim=1, eps=0.5) if self.normalize else z

    @torch.no_grad()
    def fit(self, stream: DescriptorStream) -> None:
        """PCA's rotation, scaled to unit mean square; the mean stays, as part of the moment."""
        if self.reduce is None:
            return
        rows = stream.sample(FIT_SAMPLE)
        components, _ = pca(rows, len(self.reduce.weight))
        scale = (rows.double() @ components.T).square().sum(1).mean().sqrt()
        self.reduce.weight.copy_(components / torch.where(scale > 0, scale, 1.0))
