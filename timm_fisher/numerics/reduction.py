"""The reduction of heads that are trained by gradient descent from a fit to data of any scale."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_fisher.numerics.clustering import start_reduction
from timm_fisher.numerics.linalg import Linear


class Reduction(Linear):
    """`W x / scale + b`, C -> d.

    The scale is a buffer, the descriptors' root mean squared distance from their mean. Were it in
    the weights, they would be of order 1 / scale and their gradient of order scale: relative to the
    weights a step of gradient descent would grow as scale^2.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.bias)
        self.scale = nn.Buffer(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) / self.scale.to(x.dtype)
        return F.linear(x, weight, self.bias.to(x.dtype))

    @torch.no_grad()
    def start(self, rows: Tensor) -> Tensor:
        """`start_reduction` from descriptors `[M, C]`, whose scale goes into the buffer."""
        rows = rows.double()
        scale = (rows - rows.mean(0)).square().sum(1).mean().sqrt()
        self.scale.copy_(torch.where(scale > 0, scale, 1.0))  # 1 where all descriptors are alike
        return start_reduction(self, rows / self.scale)
