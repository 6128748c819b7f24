"""NetVLAD: residuals to soft-assigned clusters.

    y   = L2(R x + r)                        reduction C -> d, started from PCA
    a_k = softmax_k(w_k y + b_k)             soft assignment
    V_k = 1/N sum_i a_k(y_i) (y_i - c_k)     = 1/N (a^T Y)_k - mean(a_k) c_k
    z   = L2([L2(V_1), ..., L2(V_K)])        intra-normalisation, then over all

w, b and c are free. They start from k-means: w = 2 alpha c, b = -alpha |c|^2, where alpha, as in
the authors' code, lets the second nearest c weigh 1/100 of the nearest at the mean gap.

Paper: Arandjelovic, Gronat, Torii, Pajdla and Sivic, "NetVLAD: CNN architecture for weakly
supervised place recognition", CVPR 2016 (eqs. 1 to 4, section 3.1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_fisher.fitting.stream import DescriptorStream
from timm_fisher.head import MOST_FEATURES, PoolingHead, check_range
from timm_fisher.numerics.clustering import kmeans, pca, sharpness
from timm_fisher.numerics.linalg import Linear, precise, unit_length

FIT_SAMPLE = 10_000  # descriptors that PCA and centroids are fitted to


class NetVLAD(PoolingHead):
    """Vector of locally aggregated descriptors, with soft assignment.

    Args:
        in_features: channels C of one descriptor.
        reduce_dim: d, dimensions after the reduction, at most C; None keeps C, without reduction.
        clusters: K.

    Output: `[B, K * d]`, row-major in (K, d).

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self, in_features: int, *, reduce_dim: int | None = 128, clusters: int = 32
    ) -> None:
        super().__init__()
        check_range(
            'netvlad',
            reduce_dim=(reduce_dim, 1, MOST_FEATURES, None),
            clusters=(clusters, 1, MOST_FEATURES),
        )
        d = min(reduce_dim or in_features, in_features)
        self.in_features, self.out_features = in_features, clusters * d
        self.reduce = Linear(in_features, d) if reduce_dim is not None else None
        self.assign = Linear(d, clusters)
        self.centroids = nn.Parameter(torch.empty(clusters, d))
        self._start(F.normalize(torch.randn(clusters, d)), F.normalize(torch.randn(1000, d)))

    @precise
    def forward(self, x: Tensor) -> Tensor:
        y = unit_length(x if self.reduce is None else self.reduce(x))
        a = self.assign(y).softmax(-1)
        c = self.centroids.to(y.dtype)
        v = a.transpose(1, 2) @ y / y.shape[1] - a.mean(1)[..., None] * c
        # y has length 1, so these floors are relative. A cluster with next to nothing stays
        # short; if one has more, the whole has length 1 or more before the last step.
        v = F.normalize(v, dim=2, eps=1e-6)
        return F.normalize(v.flatten(1), dim=1, eps=0.5)

    def no_weight_decay(self) -> set[str]:
        """Zero is no natural place for centroids."""
        return {'centroids'}

    @torch.no_grad()
    def fit(self, stream: DescriptorStream) -> None:
        """PCA for the reduction, k-means for the centroids, then the assignment from these."""
        y = stream.sample(FIT_SAMPLE).double()
        if self.reduce is not None:
            components, mean = pca(y, len(self.reduce.weight))
            y = (y - mean) @ components.T
            self.reduce.weight.copy_(components)
            self.reduce.bias.copy_(-components @ mean)
        y = unit_length(y)
        self._start(kmeans(y, len(self.centroids)), y)

    @torch.no_grad()
    def _start(self, centroids: Tensor, y: Tensor) -> None:
        alpha = sharpness(y, centroids)
        self.centroids.copy_(centroids)
        self.assign.weight.copy_(2 * alpha * centroids)
        self.assign.bias.copy_(-alpha * centroids.square().sum(1))
