"""Deep sparse coding Fisher vector.

    y  = R x / scale + r                        reduction C -> d, started from PCA
    u0 = T(W y),  uk = T(S u(k-1) + W y)        LISTA: sparse code over the atoms of B
    G  = 1/N sum_i (y_i - B u_i) u_i^T          Fisher code, d x m (eq. 4)
    z  = power_l2(vec G)

T is the soft threshold with one positive value per atom. The unsupervised loss (eq. 1), used while
the backbone is frozen, is the mean of `|y - B u|^2 + sparsity |u|_1`.

Where the paper is silent, and what is done here:
- The normalisation at the end is the one of the off-the-shelf method that the paper builds on
  (Liu et al., NIPS 2014).
- The penalty is absolute, so its effect would depend on the backbone's scale. `fit` therefore
  scales the reduction by one number, such that the mean squared length of y is 1. The data's scale
  is a buffer: in R it made the warm-up diverge at the paper's learning rate.
- Eq. 1 alone can be lowered without end by longer atoms and shorter codes. `project_` keeps each
  atom within the unit ball, the usual constraint of dictionary learning.
- Eq. 1 is least, zero, where the reduction gives zero. So its y is held fixed: the unsupervised
  loss trains dictionary and LISTA, the cross-entropy alone trains the reduction.

Paper: "Deep sparse coding Fisher vector"; sections and equations are numbered as there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_fisher.fitting.stream import DescriptorStream
from timm_fisher.head import MOST_FEATURES, MOST_ITERATIONS, PoolingHead, check_range
from timm_fisher.numerics.linalg import power_l2, precise
from timm_fisher.numerics.reduction import Reduction
from timm_fisher.numerics.sparse_coding import (
    ista,
    learn_dictionary,
    lista,
    shorten_atoms_,
    start_lista,
)

FIT_SAMPLE = 10_000  # descriptors that PCA and dictionary are fitted to (section 3.3)


class SparseFisher(PoolingHead):
    """Fisher vector of a sparse-coding model, with the sparse code unfolded (LISTA).

    Args:
        in_features: channels C of one descriptor.
        reduce_dim: d, dimensions after the reduction, at most C; None keeps C.
        code_dim: m, atoms of the dictionary.
        iterations: LISTA iterations after the first threshold.
        sparsity: weight of the L1 penalty, for descriptors of unit mean squared length.
        tied: compute W, S and the threshold from the dictionary (plain ISTA) instead of training
            them as parameters of their own.
        normalize: end with `power_l2`.

    Output: `[B, d * m]`, row-major in (d, m).

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        in_features: int,
        *,
        reduce_dim: int | None = 128,
        code_dim: int = 32,
        iterations: int = 2,
        sparsity: float = 0.1,
        tied: bool = False,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        check_range(
            'sparse_fisher',
            reduce_dim=(reduce_dim, 1, MOST_FEATURES, None),
            code_dim=(code_dim, 1, MOST_FEATURES),
            iterations=(iterations, 1, MOST_ITERATIONS),
            sparsity=(sparsity, 1e-6, 1e6),
        )
        d = min(reduce_dim or in_features, in_features)
        self.in_features = in_features
        self.out_features = d * code_dim
        self.code_dim = code_dim
        self.iterations = iterations
        self.sparsity = sparsity
        self.tied = tied
        self.normalize = normalize

        self.reduce = Reduction(in_features, d)
        self.dictionary = nn.Parameter(F.normalize(torch.randn(d, code_dim), dim=0))
        if not tied:
            self.encoder = nn.Parameter(torch.empty(code_dim, d))
            self.lateral = nn.Parameter(torch.empty(code_dim, code_dim))
            self.log_threshold = nn.Parameter(torch.empty(code_dim))
            start_lista(self)

    @precise
    def forward(self, x: Tensor) -> Tensor:
        return self._pool(*self.encode(self.reduce(x)))

    @precise
    def forward_with_loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.reduce(x)
        pooled = self._pool(*self.encode(y))
        code, residual = self.encode(y.detach())
        loss = residual.square().sum(-1).mean() + self.sparsity * code.abs().sum(-1).mean()
        return pooled, loss

    @torch.no_grad()
    def fit(self, stream: DescriptorStream) -> None:
        """PCA for the reduction, dictionary learning for B, then W, S and the threshold from B."""
        y = self.reduce.start(stream.sample(FIT_SAMPLE))
        self.dictionary.copy_(learn_dictionary(y, self.dictionary.shape[1], self.sparsity))
        if not self.tied:
            start_lista(self)

    def project_(self) -> None:
        """Atoms longer than 1 are cut back to length 1."""
        shorten_atoms_(self.dictionary)

    def encode(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Sparse codes `[B, N, m]` and residuals `[B, N, d]` of reduced descriptors `[B, N, d]`."""
        dictionary = self.dictionary.to(y.dtype)
        if self.tied:
            encoder, lateral, threshold = ista(dictionary, self.sparsity)
        else:
            encoder, lateral = self.encoder.to(y.dtype), self.lateral.to(y.dtype)
            threshold = self.log_threshold.to(y.dtype).exp()
        code = lista(y, encoder, lateral, threshold, self.iterations)
        return code, y - F.linear(code, dictionary)

    def _pool(self, code: Tensor, residual: Tensor) -> Tensor:
        fisher = (residual.transpose(1, 2) @ code / code.shape[1]).flatten(1)
        return power_l2(fisher) if self.normalize else fisher
