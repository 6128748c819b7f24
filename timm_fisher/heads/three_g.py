"""3G: covariance of a generalized Gaussian.

    x0 = ReLU(bn(R x))                                            reduction C -> d
    for each block, with weights of its own:                      re-weighting of descriptors
        z = ReLU(bn(A x) * bn(A' x) + bn(A'' x0))
        y = ReLU(bn(P z)) * ReLU(bn(P' z))
        l = q ReLU(bn(Q y))
        x <- sigmoid(l + a l) x                                   one weight per descriptor
    S = 1/N sum_i (x_i - m)(x_i - m)^T + 1e-7 I
    z = lower triangle of an approximate root of S                d (d + 1) / 2 values

Paper: Wang, Li, Hu, Zhu and Zuo, "Deep Global Generalized Gaussian Networks", CVPR 2019. Where
paper and authors' code differ, this follows the code:
- the covariance is centred (section 3.1 assumes a zero mean);
- the power 1 - beta of the weights is dropped, one trained number `a` takes its place;
- the root is that of five Newton-Schulz iterations, which stop short of the true one.

`shrinkage` is lambda of theorem 1, the strength of the von Neumann regulariser: an eigenvalue s
becomes `sqrt(c^2 + s / lambda) - c` with `c = (1 - lambda) / (2 lambda)`. The authors use 1, the
plain root. Any other value is computed by an eigendecomposition.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from timm_fisher.head import MOST_FEATURES, MOST_STEPS, PoolingHead, check_range
from timm_fisher.numerics.linalg import Linear, LinearNorm, Triangle, covariance_root, precise
from timm_fisher.numerics.spectral import covariance_function, shrinkage_spectrum

EPS = 1e-7  # on the diagonal of the covariance, as the authors have it; absolute, after batch norm


class ThreeG(PoolingHead):
    """Square root of the covariance of a generalized Gaussian, by unrolled re-weighting.

    Args:
        in_features: channels C of one descriptor.
        reduce_dim: d, dimensions after the reduction, at most C; None keeps C channels (the
            reduction with its batch norm and ReLU stays).
        blocks: T, re-weighting blocks.
        iterations: of Newton-Schulz, for a shrinkage of 1.
        shrinkage: lambda of theorem 1, positive.

    Output: `[B, d (d + 1) / 2]`, the lower triangle row by row, as the authors read it.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        in_features: int,
        *,
        reduce_dim: int | None = 256,
        blocks: int = 3,
        iterations: int = 5,
        shrinkage: float = 1.0,
    ) -> None:
        super().__init__()
        check_range(
            '3g',
            reduce_dim=(reduce_dim, 1, MOST_FEATURES, None),
            blocks=(blocks, 0, 16),
            iterations=(iterations, 1, MOST_STEPS),
            shrinkage=(shrinkage, 1e-6, 1e6),
        )
        d = min(reduce_dim or in_features, in_features)
        self.in_features = in_features
        self.triangle = Triangle(d, lower=True)
        self.out_features = self.triangle.length
        self.iterations = iterations
        self.shrinkage = shrinkage
        self.reduce = LinearNorm(in_features, d)
        self.blocks = nn.ModuleList(Reweighting(d) for _ in range(blocks))

    @precise
    def forward(self, x: Tensor) -> Tensor:
        x0 = y = relu(self.reduce(x))
        for block in self.blocks:
            y = block(y, x0)
        if self.shrinkage == 1:
            root = covariance_root(y, self.iterations, EPS)
        else:
            root = shrunk_root(y, self.shrinkage, EPS)
        z: Tensor = self.triangle(root)
        return z


class Reweighting(nn.Module):
    """One block: each descriptor gets a weight in (0, 1) (section 3.2.2, figure 3)."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.left, self.right, self.skip = (LinearNorm(d, d) for _ in range(3))  # A, A', A''
        self.project_left, self.project_right = (LinearNorm(d, d) for _ in range(2))  # P, P'
        self.squeeze = LinearNorm(d, max(1, d // 4))  # Q
        self.score = Linear(max(1, d // 4), 1, bias=False)  # q
        self.scale = nn.Parameter(torch.rand(()))  # a

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        """Weighted descriptors `[B, N, d]` of x and of the first ones x0, both `[B, N, d]`."""
        z = relu(self.left(x) * self.right(x) + self.skip(x0))
        y = relu(self.project_left(z)) * relu(self.project_right(z))
        score = self.score(relu(self.squeeze(y)))
        weight: Tensor = torch.sigmoid(score + self.scale.to(y.dtype) * score)
        return weight * x


def shrunk_root(x: Tensor, shrinkage: float, eps: float) -> Tensor:
    """The regularised roots `[B, d, d]` (theorem 1) of covariances of descriptors `[B, N, d]`, plus
    `eps` I; float32 or better, on the smaller side."""
    x = (x - x.mean(1, keepdim=True)) * x.shape[1] ** -0.5
    c = (1 - shrinkage) / (2 * shrinkage)
    at_zero = (c**2 + eps / shrinkage) ** 0.5 - c
    spectrum = partial(shrinkage_spectrum, shrinkage=shrinkage, eps=eps)
    return covariance_function(x, spectrum, at_zero)


def convert_state_dict(authors_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' checkpoint as that of a `PooledModel` with the head `3g` or `isqrt_cov`.

    Both heads read their triangle as the authors' code does, so the classifier is taken as it is.
    The authors' backbones have the parameter names of timm's ResNets.

    ```python
    model = timm_fisher.create_model('resnet50', head='3g', last_stride=1)
    model.load_state_dict(convert_state_dict(checkpoint))
    ```

    Args:
        authors_state: tensors by the authors' names: `layer_reduce`, `layer_reduce_bn`, `AtMp1`
            and so on, `fc`, and those of the backbone; with `module.` of DataParallel or without.
    """
    of_block = {
        'map1': 'left.linear', 'bn1': 'left.norm',
        'map2': 'right.linear', 'bn2': 'right.norm',
        'map21': 'skip.linear', 'bn21': 'skip.norm',
        'map3': 'project_left.linear', 'bn3': 'project_left.norm',
        'map4': 'project_right.linear', 'bn4': 'project_right.norm',
        'atmap1': 'squeeze.linear', 'bnat1': 'squeeze.norm', 'atmap2': 'score',
    }  # fmt: skip
    converted = {}
    for key, value in authors_state.items():
        key = key.removeprefix('module.')
        module, _, name = key.rpartition('.')
        block, _, part = module.partition('.')
        if module == 'layer_reduce':
            key, value = f'head.reduce.linear.{name}', value.flatten(1)
        elif module == 'layer_reduce_bn':
            key = f'head.reduce.norm.{name}'
        elif module == 'fc':
            key = f'classifier.{name}'
        elif block.startswith('AtMp') and part == 'atmap3':
            key, value = f'head.blocks.{int(block[4:]) - 1}.scale', value.reshape(())
        elif block.startswith('AtMp'):
            key = f'head.blocks.{int(block[4:]) - 1}.{of_block[part]}.{name}'
            value = value.flatten(1) if value.ndim == 4 else value
        else:
            key = f'backbone.{key}'
        converted[key] = value
    return converted
