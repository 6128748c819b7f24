"""The class token itself: the baseline of every vision transformer.

    z = class token                          power_l2: then sign(z) sqrt|z|, and unit length

The local descriptors are not read. A backbone without a class token cannot have this head.
"""

from __future__ import annotations

from torch import Tensor

from timm_fisher.head import PoolingHead
from timm_fisher.numerics import linalg
from timm_fisher.numerics.linalg import precise


class ClassToken(PoolingHead):
    """What the backbone itself has gathered of the image.

    Args:
        in_features: channels C of the class token, which are those of one descriptor.
        power_l2: end with `power_l2`, as the Fisher heads do. With it, a comparison shows what
            another head brings and not what its normalisation brings.

    Output: `[B, C]`.
    """

    def __init__(self, in_features: int, *, power_l2: bool = False) -> None:
        super().__init__()
        self.in_features = self.out_features = in_features
        self.power_l2 = power_l2

    @precise
    def forward(self, x: Tensor, *, class_token: Tensor) -> Tensor:
        return linalg.power_l2(class_token) if self.power_l2 else class_token
