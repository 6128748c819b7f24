"""Deep TEN: residual encoding over learned codes, with a smoothing factor for each.

    y   = R x + r                                     reduction C -> d, started from PCA
    a_k = softmax_k(-s_k |y - c_k|^2)                 soft assignment to K codes
    e_k = 1/N sum_i a_k(y_i) (y_i - c_k)              = 1/N (a^T Y)_k - mean(a_k) c_k
    z   = L2([e_1, ..., e_K])

s is kept as its logarithm, so it stays positive; the authors' code leaves its sign free.

From data: `fit` scales the reduction such that the mean squared length of y is 1, the codes are
k-means centroids, and all s are the value at which the second nearest code weighs 1/100 of the
nearest at the mean gap, as `netvlad` starts. The paper starts from chance and trains; so do codes
without a fit.

Paper: Zhang, Xue and Dana, "Deep TEN: Texture Encoding Network", CVPR 2017 (eqs. 2 to 4). It sums
over descriptors; with the L2 norm at the end the mean is the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_fisher.fitting.stream import DescriptorStream
from timm_fisher.head import MOST_FEATURES, PoolingHead, check_range
from timm_fisher.numerics.clustering import kmeans, sharpness, start_reduction
from timm_fisher.numerics.linalg import Linear, precise

FIT_SAMPLE = 10_000  # descriptors that PCA and codes are fitted to


class DeepTEN(PoolingHead):
    """Mean residuals to softly assigned codes.

    Args:
        in_features: channels C of one descriptor.
        codes: K.
        reduce_dim: d, dimensions after the reduction, at most C; None keeps C.

    Output: `[B, K * d]`, row-major in (K, d).

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, in_features: int, *, codes: int = 32, reduce_dim: int | None = 128) -> None:
        super().__init__()
        check_range(
            'deepten',
            codes=(codes, 1, MOST_FEATURES),
            reduce_dim=(reduce_dim, 1, MOST_FEATURES, None),
        )
        d = min(reduce_dim or in_features, in_features)
        self.in_features, self.out_features = in_features, codes * d
        self.reduce = Linear(in_features, d)
        nn.init.orthogonal_(self.reduce.weight)
        nn.init.zeros_(self.reduce.bias)
        self.codes = nn.Parameter(torch.empty(codes, d))
        self.log_smoothing = nn.Parameter(torch.empty(codes))
        self._start(F.normalize(torch.randn(codes, d)), F.normalize(torch.randn(1000, d)))

    @precise
    def forward(self, x: Tensor) -> Tensor:
        y = self.reduce(x)
        c = self.codes.to(y.dtype)
        a = self._assign(y, c)
        e = a.transpose(1, 2) @ y / y.shape[1] - a.mean(1)[..., None] * c
        # y is of length 1 or so; only an image whose descriptors are a code itself is shorter.
        return F.normalize(e.flatten(1), dim=1, eps=1e-6)

    def _assign(self, y: Tensor, c: Tensor) -> Tensor:
        """Weights `[B, N, K]`, without any `y - c`."""
        s = self.log_smoothing.to(y.dtype).exp()
        length = y.square().sum(-1, keepdim=True)
        return (F.linear(y, 2 * s[:, None] * c, -s * c.square().sum(1)) - length * s).softmax(-1)

    def no_weight_decay(self) -> set[str]:
        """Zero is no natural place for codes."""
        return {'codes'}

    @torch.no_grad()
    def fit(self, stream: DescriptorStream) -> None:
        """PCA for the reduction, k-means for the codes, smoothing factors from their gaps."""
        y = start_reduction(self.reduce, stream.sample(FIT_SAMPLE))
        self._start(kmeans(y, len(self.codes)), y)

    @torch.no_grad()
    def _start(self, codes: Tensor, y: Tensor) -> None:
        self.codes.copy_(codes)
        self.log_smoothing.copy_(sharpness(y, codes).log().expand_as(self.log_smoothing))
