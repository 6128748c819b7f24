"""EP, efficient probing: one learned query for each slice of the output.

    a_jn = softmax_n(q_j . x_n / sqrt(C))        M queries q_j, compared with the descriptors as
                                                 they are: no key projection, no heads
    z_j  = W_j (sum_n a_jn x_n)                  W_j: the j-th of M slices of the rows of W
    z    = [z_1, ..., z_M]                       C / d values

The paper projects first, v_n = W x_n, and takes `sum_n a_jn v_n[slice j]`. That is the same, and
about N times dearer: here the M averages are projected, each to its slice, and not N descriptors.

The paper trains it on a frozen backbone, with a batch norm without scale and shift between the
pooled vector and the classifier; that norm belongs to the model, not to this head. The queries
start as in the authors' code: random, with deviation 0.02, so that a is near to uniform at first.

Paper: Psomas et al., "Attention, Please! Revisiting Attentive Probing Through the Lens of
Efficiency", ICLR 2026. Outputs and gradients equal those of the authors' code (tests/golden).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from timm_fisher.head import MOST_FEATURES, PoolingHead, check_range
from timm_fisher.numerics.linalg import Linear, precise


class EfficientProbing(PoolingHead):
    """Attention of M queries over the descriptors, each for its own slice of a linear map.

    Args:
        in_features: channels C of one descriptor.
        queries: M, which divides the length of the output.
        out_divisor: d, by how much the output is shorter than a descriptor; divides C.

    Output: `[B, C / d]`, slice after slice.

    Raises:
        ValueError: a number out of range, or one that does not divide.
    """

    def __init__(self, in_features: int, *, queries: int = 32, out_divisor: int = 1) -> None:
        super().__init__()
        check_range(
            'ep',
            queries=(queries, 1, MOST_FEATURES),
            out_divisor=(out_divisor, 1, MOST_FEATURES),
        )
        if in_features % out_divisor:
            raise ValueError(
                f'ep gives 1/out_divisor of the channels: out_divisor={out_divisor} does not '
                f'divide {in_features}. Take {divisor(in_features, out_divisor)}.'
            )
        width = in_features // out_divisor
        if width % queries:
            raise ValueError(
                f'ep gives each query an equal slice of its output: queries={queries} does not '
                f'divide {width} (= {in_features} channels / out_divisor={out_divisor}). '
                f'Take {divisor(width, queries)}.'
            )
        self.in_features = in_features
        self.out_features = width
        self.queries = nn.Parameter(0.02 * torch.randn(queries, in_features))
        self.value = Linear(in_features, width, bias=False)

    @precise
    def forward(self, x: Tensor) -> Tensor:
        means = self._weights(x) @ x
        slices = self.value.weight.to(x.dtype).unflatten(0, (len(self.queries), -1))
        z: Tensor = torch.einsum('bmc,msc->bms', means, slices).flatten(1)
        return z

    @precise
    def attention(self, x: Tensor) -> Tensor:
        """Weights a `[B, M, N]` of descriptors `[B, N, C]`, which sum to 1 over N."""
        return self._weights(x)

    def _weights(self, x: Tensor) -> Tensor:
        queries = self.queries.to(x.dtype) / math.sqrt(self.in_features)
        return (queries @ x.transpose(1, 2)).softmax(-1)


def divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is not above `most`."""
    return next(d for d in range(min(most, number), 0, -1) if number % d == 0)
