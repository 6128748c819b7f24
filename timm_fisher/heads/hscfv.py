"""HSCFV: Fisher vector of a compositional model, with a common and a residual dictionary.

    y = R x / scale + r                          reduction C -> d, started from PCA
    u = sparse code of y over m atoms B          LISTA, as in sparse_fisher
    v = sparse code of y - B u over n atoms B'   LISTA with weights of its own
    e = y - B u - B' v
    G = mean of e_i u_i^T,  G' = mean of e_i v_i^T
    z = power_l2([vec G, vec G'])                d (m + n) values

A descriptor is the sum of a common part B u, a residual part B' v and normal noise e; G and G' are
the gradients of its log-likelihood with respect to B and B', up to a factor. The unsupervised loss
is the mean of `|e|^2 + sparsity (|u|_1 + |v|_1)`.

Only the paper's abstract and what others say of it were at hand: a discriminative and a residual
part, told apart by a supervised coding method that is trained beforehand, and the Fisher codes of
both dictionaries concatenated. Assumed here:
- There is no coder from elsewhere. The first LISTA takes its place, which the cross-entropy trains
  with all the rest; before that, `fit` learns B from the descriptors and B' from what B leaves.
- The parts are coded one after the other. Coded together, with one penalty, they would be
  `sparse_fisher` with m + n atoms.
- The penalty is the same for both. Scale, unit ball and the reduction that the unsupervised loss
  leaves alone are as in `sparse_fisher`, and said there.

Paper: Liu, Wang, Shen, Wang, van den Hengel, Wang and Shen, "Compositional Model Based Fisher
Vector Coding for Image Classification", TPAMI 2017.
"""

from __future__ import annotations

import torch
from torch import Tensor

from timm_fisher.fitting.stream import DescriptorStream
from timm_fisher.head import MOST_FEATURES, MOST_ITERATIONS, PoolingHead, check_range
from timm_fisher.numerics.linalg import power_l2, precise
from timm_fisher.numerics.reduction import Reduction
from timm_fisher.numerics.sparse_coding import SparseCoder, learn_dictionary

FIT_SAMPLE = 10_000  # descriptors that PCA and dictionaries are fitted to


class HybridFisher(PoolingHead):
    """Fisher vector of two sparse codes, the second of what the first leaves.

    Args:
        in_features: channels C of one descriptor.
        reduce_dim: d, dimensions after the reduction, at most C; None keeps C.
        code_dim: m, atoms of the common dictionary.
        residual_code_dim: n, atoms of the residual dictionary.
        iterations: LISTA iterations after the first threshold, of both.
        sparsity: weight of the L1 penalty, for descriptors of unit mean squared length.

    Output: `[B, d * (m + n)]`: row-major in (d, m), then in (d, n).

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        in_features: int,
        *,
        reduce_dim: int | None = 128,
        code_dim: int = 32,
        residual_code_dim: int = 32,
        iterations: int = 2,
        sparsity: float = 0.1,
    ) -> None:
        super().__init__()
        check_range(
            'hscfv',
            reduce_dim=(reduce_dim, 1, MOST_FEATURES, None),
            code_dim=(code_dim, 1, MOST_FEATURES),
            residual_code_dim=(residual_code_dim, 1, MOST_FEATURES),
            iterations=(iterations, 1, MOST_ITERATIONS),
            sparsity=(sparsity, 1e-6, 1e6),
        )
        d = min(reduce_dim or in_features, in_features)
        self.in_features = in_features
        self.out_features = d * (code_dim + residual_code_dim)
        self.sparsity = sparsity
        self.reduce = Reduction(in_features, d)
        self.common = SparseCoder(d, code_dim, iterations, sparsity)
        self.residual = SparseCoder(d, residual_code_dim, iterations, sparsity)

    @precise
    def forward(self, x: Tensor) -> Tensor:
        return pool(*self.encode(self.reduce(x)))

    @precise
    def forward_with_loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.reduce(x)
        pooled = pool(*self.encode(y))
        u, v, error = self.encode(y.detach())
        penalty = u.abs().sum(-1).mean() + v.abs().sum(-1).mean()
        return pooled, error.square().sum(-1).mean() + self.sparsity * penalty

    def encode(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes `[B, N, m]` and `[B, N, n]` of reduced descriptors `[B, N, d]`, and what both
        leave `[B, N, d]`."""
        u, left = self.common(y)
        v, error = self.residual(left)
        return u, v, error

    @torch.no_grad()
    def fit(self, stream: DescriptorStream) -> None:
        """PCA for the reduction, then a dictionary, and another of what its codes leave."""
        y = self.reduce.start(stream.sample(FIT_SAMPLE))
        for coder in (self.common, self.residual):
            coder.start(learn_dictionary(y, coder.dictionary.shape[1], self.sparsity))
            _, y = coder(y)

    @torch.no_grad()
    def project_(self) -> None:
        """Atoms longer than 1 are cut back to length 1."""
        self.common.project_()
        self.residual.project_()


def pool(u: Tensor, v: Tensor, error: Tensor) -> Tensor:
    """Both Fisher codes, with signed square root and L2 norm."""
    weighted = error.transpose(1, 2) / u.shape[1]
    return power_l2(torch.cat([(weighted @ code).flatten(1) for code in (u, v)], dim=1))
