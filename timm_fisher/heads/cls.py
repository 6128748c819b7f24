"""The class token itself: the baseline of every vision transformer.

    z = class token                         normalize: then sign(z) sqrt|z|, and unit length

The local descriptors are not read. A backbone without a class token cannot have this head.
"""

from __future__ import annotations

from torch import Tensor

from timm_fisher.head import PoolingHead
from timm_fisher.numerics.linalg import power_l2, precise


class ClassToken(PoolingHead):
    """What the backbone itself has gathered of the image.

    Args:
        in_features: channels C of the class token, which are those of one descriptor.
        normalize: end with `power_l2`, as the Fisher heads do. With it, a comparison shows what
            another head brings and not what its normalisation brings.

    Output: `[B, C]`.
    """

    def __init__(self, in_features: int, *, normalize: bool = False) -> None:
        super().__init__()
        self.in_features = self.out_features = in_features
        self.normalize = normalize

    @precise
    def forward(self, x: Tensor, *, class_token: Tensor) -> Tensor:
        return power_l2(class_token) if self.normalize else class_token
