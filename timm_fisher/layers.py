"""What stands between the pooling head and the end of a model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_fisher.numerics.clustering import pca
from timm_fisher.numerics.linalg import precise, unit_length

# Of the largest variance: what rounding may leave of none.
LEAST_VARIANCE = 1e-12


class PreNorm(nn.BatchNorm1d):
    """Batch norm without weights, by the running statistics also where a batch is one image. Its
    floor is small beside the variance of vectors of length 1, which is below 1 / D."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, eps=1e-6, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        training = self.training and len(x) > 1
        mean, var, momentum = self.running_mean, self.running_var, self.momentum or 0.0
        return F.batch_norm(x, mean, var, None, None, training, momentum, self.eps)


class Projection(nn.Linear):
    """Fewer dimensions: a linear map of vectors divided by their length, `[B, D]` -> `[B, d]`.
    Starts at random, or by `fit` from the principal components.

    Raises:
        ValueError: d is not below D.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        if not 1 <= out_features < in_features:
            raise ValueError(
                f'projection is {out_features}, but the pooled vectors have {in_features} '
                'dimensions. Give fewer, 1 or more.'
            )
        super().__init__(in_features, out_features)

    @precise
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(
            unit_length(x[:, None])[:, 0], self.weight.to(x.dtype), self.bias.to(x.dtype)
        )

    @torch.no_grad()
    def fit(self, vectors: Tensor, whiten: float) -> None:
        """Start from the PCA of vectors, as scikit-learn's, up to the signs of components.

        Args:
            vectors: `[n, D]`, divided by their lengths here; more than d.
            whiten: components are divided by their standard deviation to this power: 0 keeps
                distances, 1 gives all of them the variance 1.

        Raises:
            ValueError: too few vectors, one that is not finite, or `whiten` outside 0 to 1.
        """
        if not 0 <= whiten <= 1:
            raise ValueError(f'whiten is {whiten}; give a number from 0 to 1.')
        if len(vectors) <= self.out_features:
            raise ValueError(
                f'A projection to {self.out_features} dimensions is fitted to more images than '
                f'that, here are {len(vectors)}. Give more, or choose fewer dimensions.'
            )
        x = unit_length(vectors[:, None].double())[:, 0]
        components, mean = pca(x, self.out_features)
        variances = ((x - mean) @ components.T).var(0)
        weight = components * whitening(variances, whiten)[:, None]
        self.weight.copy_(weight)
        self.bias.copy_(-(weight @ mean))


def whitening(variances: Tensor, power: float) -> Tensor:
    """Factors `[d]` that divide components by their standard deviations to a power, from their
    variances `[d]`, of which those below rounding errors count as these."""
    scale = variances.clamp_min(LEAST_VARIANCE * variances.amax()) ** (-power / 2)
    return torch.where(scale.isfinite(), scale, 1.0)  # all vectors alike


def create_classifier(in_features: int, num_classes: int) -> nn.Module:
    """`nn.Linear`, or `nn.Identity` without classes."""
    return nn.Linear(in_features, num_classes) if num_classes > 0 else nn.Identity()
