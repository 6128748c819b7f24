"""Global average pooling: what timm does, and the baseline that other heads are compared with."""

from __future__ import annotations

from torch import Tensor

from timm_fisher.head import PoolingHead
from timm_fisher.numerics.linalg import at_least_float32, power_l2, without_autocast


class Average(PoolingHead):
    """Mean of the descriptors.

    Args:
        in_features: channels C of one descriptor.
        normalize: end with `power_l2`, as the Fisher heads do. With it, a comparison shows what
            the head itself brings and not what its normalisation brings.

    Output: `[B, C]`.
    """

    def __init__(self, in_features: int, *, normalize: bool = False) -> None:
        super().__init__()
        self.in_features = self.out_features = in_features
        self.normalize = normalize

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            z = x.mean(1, dtype=at_least_float32(x.dtype))
            return (power_l2(z) if self.normalize else z).to(x.dtype)
