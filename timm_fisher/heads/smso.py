"""SMSO: statistically motivated second-order pooling.

    v_j = 1/N sum_i (w_j^T x_i)^2 = w_j^T M w_j       parametric vectorization of M = 1/N X^T X
    z_j = g_j sqrt(v_j) + b_j                         variance-stabilising root, scale and offset

M itself, C x C, is formed only where there are more descriptors than channels, so that it is the
cheaper way. For normal x_i with mean zero, N v_j / s_j^2 is chi-square with N degrees of freedom,
whose variance grows with its mean; its root is nearly normal, `sqrt(2 N v_j) / s_j - sqrt(2 N - 1)
~ N(0, 1)`. The scale g and offset b stand for these constants and are trained.

Where the paper is silent or its text was not at hand (its method was read in its abstract and in
the authors' Keras code, where the root is commented out), and what is done here:
- The second moment is not centred. The authors have batch norm before it, here the backbone's.
- `fit` scales w by one number, such that the mean of v is 1, and sets g and b such that each z_j
  has mean 0 and variance 1 over the training images. Their code starts g at 1 and b at 0;
  so does a head without a fit.
- The slope of the root is infinite at zero, so it is taken as `v / sqrt(v + t)`, t = 1e-6 times the
  mean of v over j.

Paper: Yu and Salzmann, "Statistically-motivated Second-order Pooling", ECCV 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from timm_fisher.fitting.stream import DescriptorStream
from timm_fisher.head import MOST_FEATURES, PoolingHead, check_range
from timm_fisher.numerics.linalg import Linear, at_least_float32, precise, safe_trace

FLOOR = 1e-6  # of the mean of v


class SMSO(PoolingHead):
    """Second moments along trained directions, with a variance-stabilising root.

    Args:
        in_features: channels C of one descriptor.
        features: directions w_j, and the length of the output.

    Output: `[B, features]`.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, in_features: int, *, features: int = 2048) -> None:
        super().__init__()
        check_range('smso', features=(features, 1, MOST_FEATURES))
        self.in_features, self.out_features = in_features, features
        self.directions = Linear(in_features, features, bias=False)
        nn.init.normal_(self.directions.weight, std=in_features**-0.5)
        self.scale = nn.Parameter(torch.ones(features))
        self.offset = nn.Parameter(torch.zeros(features))

    @precise
    def forward(self, x: Tensor) -> Tensor:
        return self._root(x) * self.scale.to(x.dtype) + self.offset.to(x.dtype)

    def _root(self, x: Tensor) -> Tensor:
        """`sqrt(v_j)`, `[B, features]`."""
        n, c = x.shape[1:]
        if n <= c:
            v = self.directions(x).square().mean(1)
        else:  # rounding may leave less than zero
            w = self.directions.weight.to(x.dtype).T
            v = ((x.transpose(1, 2) @ (x / n) @ w) * w).sum(1).clamp_min(0)
        mean = safe_trace(v.mean(1))[:, 0]
        v = v / mean
        root: Tensor = v * torch.rsqrt(v + FLOOR) * mean.sqrt()
        return root

    def no_weight_decay(self) -> set[str]:
        """Zero is no natural place for directions."""
        return {'directions.weight'}

    @torch.no_grad()
    def fit(self, stream: DescriptorStream) -> None:
        """The scale of w; scale and offset of the root from its mean and variance over images."""
        weight = self.directions.weight
        sums = torch.zeros(2, self.out_features, dtype=torch.float64, device=weight.device)
        count = torch.zeros((), dtype=torch.float64, device=weight.device)
        for x in stream.batches():
            root = self._root(x.to(weight.device, at_least_float32(x.dtype))).double()
            sums += torch.stack([root.sum(0), root.square().sum(0)])
            count += len(x)
        sums, count = stream.sum(sums, count)
        mean, square = sums / count
        if not torch.isfinite(sums).all():
            raise ValueError(
                'The descriptors hold NaN or infinite values, so nothing can be fitted to them.'
            )
        length = square.mean().sqrt()
        length = torch.where(length > 0, length, 1.0)
        # If all images are alike, the deviation is zero: do not blow up rounding errors.
        deviation = (square - mean.square()).clamp_min(0).sqrt()
        deviation = torch.maximum(deviation, 1e-3 * mean)
        deviation = torch.where(deviation > 0, deviation, length)
        weight.div_(length)
        self.scale.copy_(length / deviation)
        self.offset.copy_(-mean / deviation)
