"""Compact bilinear pooling: a tensor sketch of the second moments.

    a_i = sketch of x_i by h1, s1;  b_i = sketch of x_i by h2, s2      each of D values:
          a_i[k] = sum of s1(c) x_ic over the channels c with h1(c) = k
    z   = 1/N sum_i (a_i convolved with b_i, circularly)
        = IFFT( 1/N sum_i FFT(a_i) FFT(b_i) )
    z   = power_l2(z)                          signed square root, then L2

The convolution is the count sketch of x x^T with hash `(h1(c) + h2(c')) mod D` and sign
`s1(c) s2(c')`, so inner products of z, before the normalisation, estimate those of second moments:
<x, y>^2 for single descriptors, with an error that falls as 1 / sqrt(D).

Sums are taken in the frequency domain: one inverse FFT for an image, not for a descriptor. Where C
is small beside D the second moment M itself is sketched, entry by entry: the same numbers from
N C^2 operations and one scattered sum of C^2, without two FFTs of length D for each descriptor.

Hashes and signs depend on the seed alone, by an integer hash: the same on every machine. The paper
draws them at random and can also train the signs as real numbers; here they are fixed.

Paper: Gao, Beijbom, Zhang and Darrell, "Compact Bilinear Pooling", CVPR 2016 (algorithm 2); the
tensor sketch: Pham and Pagh, KDD 2013.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from timm_fisher.head import MOST_FEATURES, PoolingHead, check_range
from timm_fisher.numerics.hashing import scatter
from timm_fisher.numerics.linalg import power_l2, precise

# Second moments are sketched up to C^2 = 16 D log2 D. By count of operations two FFTs for each
# descriptor cost as much as C^2 = 2.5 D log2 D; but on a CPU, with D = 8192, they took as long as
# second moments at C = 1280 with 49 descriptors, and 3 times as long with 196.
DENSE = 16


class CompactBilinear(PoolingHead):
    """Tensor sketch of the second moments, with signed square root and L2 norm.

    Args:
        in_features: channels C of one descriptor.
        sketch_dim: D, the length of the sketch.
        seed: of hashes and signs.

    Output: `[B, D]`.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, in_features: int, *, sketch_dim: int = 8192, seed: int = 0) -> None:
        super().__init__()
        check_range(
            'compact_bilinear',
            sketch_dim=(sketch_dim, 1, MOST_FEATURES),
            seed=(seed, 0, MOST_FEATURES),
        )
        self.in_features, self.out_features = in_features, sketch_dim
        self.seed = seed
        self.dense = in_features**2 <= DENSE * sketch_dim * math.log2(sketch_dim)
        # Positions in the sketch: of the entries of M, row by row, or of the channels in a and b.
        positions = in_features**2 if self.dense else 2 * in_features
        self.index = nn.Buffer(torch.empty(positions, dtype=torch.long), persistent=False)
        self.signs = nn.Buffer(torch.empty(2, in_features), persistent=False)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Fill in hashes and signs, from the seed."""
        rows = 4 * self.seed + torch.arange(4, device=self.index.device)
        hashes = scatter(rows, self.in_features)
        self.signs.copy_(1 - 2 * (hashes[2:] >> 31))
        first, second = hashes[:2] % self.out_features
        if self.dense:
            index = (first[:, None] + second) % self.out_features
        else:
            index = torch.stack([first, second + self.out_features])
        self.index.copy_(index.flatten())

    @precise
    def forward(self, x: Tensor) -> Tensor:
        signs = self.signs.to(x.dtype)
        return power_l2(self._moments(x, signs) if self.dense else self._spectra(x, signs))

    def _moments(self, x: Tensor, signs: Tensor) -> Tensor:
        """The sketch of `M = 1/N X^T X`."""
        moments = (signs[0] * x).transpose(1, 2) @ (signs[1] / x.shape[1] * x)
        sketch = x.new_zeros(x.shape[0], self.out_features)
        return sketch.index_add(1, self.index, moments.flatten(1))

    def _spectra(self, x: Tensor, signs: Tensor) -> Tensor:
        """The same by sketches of descriptors, both in one tensor, and their spectra."""
        batch, n, _ = x.shape
        signed = (x[:, :, None] * signs).flatten(2)
        both = x.new_zeros(batch, n, 2 * self.out_features)
        both = both.scatter_add(2, self.index.expand_as(signed), signed)
        first, second = (torch.fft.rfft(part) for part in both.chunk(2, dim=2))
        sketch: Tensor = torch.fft.irfft((first * second).sum(1) / n, n=self.out_features)
        return sketch
