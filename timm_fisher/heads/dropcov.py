"""DropCov: covariance pooling with an adaptive channel dropout before it, and nothing after it.

    y = ReLU(bn(R x))                                     reduction C -> d
    z = upper triangle of 1/N sum_i (y_i - m)(y_i - m)^T  d (d + 1) / 2 values

In training only, between the two:

    a = softmax(k * mean of y_i)                          importance of each channel, [d]
    y <- y (1 + a)
    q = S 1                                               correlation: row sums of y's covariance S
    p = 1 - 10 / log2(d) * mean over the batch of cos(a, q)
    y <- channels dropped with probability p, each image by itself, the others times 1 / (1 - p)

k is a trained filter of three weights over neighbouring channels (that of ECA), * a convolution. So
channels are dropped the more, the less importance and correlation agree: dropout takes the place of
a matrix power, decorrelating in training what is too correlated, and costs nothing at inference.

This follows the authors' code (github.com/mingzeG/DropCov, acd/models/ResNet_ACD.py), where one
probability is shared by the batch and no gradient passes through it. Assumed here: p is at most 0.9
(the code allows 1, which drops everything), and a map without variance counts as a cosine of 0.

Random numbers are those of PyTorch's global generator on the descriptors' device.

Paper: Wang, Gao, Zhang, Xie, Li and Hu, "DropCov: A Simple yet Effective Method for Improving Deep
Architectures", NeurIPS 2022.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import relu

from timm_fisher.head import MOST_FEATURES, PoolingHead, check_range
from timm_fisher.numerics.linalg import LinearNorm, Triangle, precise

MOST_DROPPED = 0.9  # largest probability; what is kept is multiplied by 10


class DropCov(PoolingHead):
    """Covariance of the descriptors; in training, of those that adaptive channel dropout leaves.

    Args:
        in_features: channels C of one descriptor.
        reduce_dim: d, dimensions after the reduction, at most C; None keeps C and leaves the
            reduction, with its batch norm and ReLU, out.

    Output: `[B, d (d + 1) / 2]`, the upper triangle row by row.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, in_features: int, *, reduce_dim: int | None = 256) -> None:
        super().__init__()
        check_range('dropcov', reduce_dim=(reduce_dim, 1, MOST_FEATURES, None))
        d = min(reduce_dim or in_features, in_features)
        self.in_features = in_features
        self.triangle = Triangle(d)
        self.out_features = self.triangle.length
        self.reduce = LinearNorm(in_features, d) if reduce_dim is not None else None
        self.filter = nn.Parameter(torch.empty(3).uniform_(-(3**-0.5), 3**-0.5))

    @precise
    def forward(self, x: Tensor) -> Tensor:
        y = x if self.reduce is None else relu(self.reduce(x))
        if self.training:
            importance = self._importance(y)
            y = y * (1 + importance[:, None])
            with torch.no_grad():
                p = drop_probability(y, importance)
                kept = torch.rand(y.shape[0], 1, y.shape[2], dtype=y.dtype, device=y.device) >= p
            y = y * (kept / (1 - p))
        y = y - y.mean(1, keepdim=True)
        z: Tensor = self.triangle(y.transpose(1, 2) @ (y / y.shape[1]))
        return z

    def _importance(self, y: Tensor) -> Tensor:
        """Importance `[B, d]` of each channel of an image, of sum 1."""
        filtered = F.conv1d(y.mean(1)[:, None], self.filter.to(y.dtype)[None, None], padding=1)
        return filtered[:, 0].softmax(1)


def drop_probability(y: Tensor, importance: Tensor) -> Tensor:
    """Of each channel, one number for descriptors `[B, N, d]` and importances `[B, d]`."""
    centred = y - y.mean(1, keepdim=True)
    correlation = (centred * centred.sum(2, keepdim=True)).mean(1)
    largest = correlation.abs().amax(1, keepdim=True)
    correlation = correlation / torch.where(largest > 0, largest, 1.0)
    cosine = (F.normalize(correlation, dim=1) * F.normalize(importance, dim=1)).sum(1)
    # With a single channel the logarithm would be zero.
    slope = 10 / math.log2(max(2, y.shape[2]))
    return (1 - slope * cosine.mean()).clamp(0, MOST_DROPPED)
