"""SimPool, attention by the mean descriptor: timm's `SimPool1d`.

    y_n  = LN(x_n)
    a_hn = softmax_n(q_h . k_hn / sqrt(C / H))   q = Q mean_n x_n,  k_n = K y_n,  H heads of C / H
    z_h  = sum_n a_hn y_n[part h]                no values, no projection
           with gamma: (sum_n a_hn (y_n - min_n y_n + 1e-6)^gamma)^(1 / gamma), channel by channel

timm's module holds the weights, under its names, and starts them. The results are its results, but
the products are taken in another order: timm computes all keys, for N C^2, while
`q_h . K_h y_n = (K_h^T q_h) . y_n` takes C^2 for an image and H N C for its descriptors. With
`qk_norm` each key has a norm of its own, and has to be computed.

gamma goes from 0.1 to 5: the least value, 1e-6, to the power gamma, has to stay in the range of
float32, or the gradient of the root is infinite.

Paper: Psomas, Kakogeorgiou, Karantzalos and Avrithis, "Keep It SimPool: Who Said Supervised
Transformers Suffer from Attention Deficit?", ICCV 2023. It takes gamma 2 for convolutional networks
and 1.25 for transformers; timm's default, and so the default here, is none. timm's `norm_layer`, a
class, is left out: it is PyTorch's layer norm, as in the paper.
"""

from __future__ import annotations

import torch
from timm.layers import SimPool1d
from torch import Tensor

from timm_fisher.head import MOST_FEATURES, PoolingHead, check_range
from timm_fisher.numerics.linalg import call_in_dtype, precise


class SimPool(PoolingHead):
    """Weighted mean of normalised descriptors, by their likeness to the mean.

    The arguments have the names and defaults of timm's class.

    Args:
        in_features: channels C of one descriptor.
        num_heads: H, which divides C.
        qkv_bias: whether queries and keys have a bias.
        qk_norm: normalise queries and keys.
        gamma: exponent of a generalised mean; None for the plain one.

    Output: `[B, C]`.

    Raises:
        ValueError: a number out of range, or one that does not divide.
    """

    def __init__(
        self,
        in_features: int,
        *,
        num_heads: int = 1,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        gamma: float | None = None,
    ) -> None:
        super().__init__()
        check_range(
            'simpool', num_heads=(num_heads, 1, MOST_FEATURES), gamma=(gamma, 0.1, 5.0, None)
        )
        if in_features % num_heads:
            raise ValueError(
                f'simpool gives each head an equal part of the channels: num_heads={num_heads} '
                f'does not divide {in_features}.'
            )
        self.in_features = self.out_features = in_features
        self.gamma = gamma
        self.qk_norm = qk_norm
        self.pool = SimPool1d(
            in_features, num_heads=num_heads, qkv_bias=qkv_bias, qk_norm=qk_norm, gamma=gamma
        )

    @precise
    def forward(self, x: Tensor) -> Tensor:
        y = call_in_dtype(self.pool.norm, x)
        a = self._weights(x, y)
        if self.gamma is None:
            return self._average(a, y)
        y = y - y.amin(1, keepdim=True) + 1e-6
        return self._average(a, y.pow(self.gamma)).pow(1 / self.gamma)

    @precise
    def attention(self, x: Tensor) -> Tensor:
        """Weights a `[B, H, N]` of descriptors `[B, N, C]`, which sum to 1 over N."""
        return self._weights(x, call_in_dtype(self.pool.norm, x))

    def _weights(self, x: Tensor, y: Tensor) -> Tensor:
        pool, heads = self.pool, (self.pool.num_heads, -1)
        q = call_in_dtype(pool.q, x.mean(1)).unflatten(1, heads)
        if self.qk_norm:
            k = call_in_dtype(pool.k, y).unflatten(2, heads)
            q, k = call_in_dtype(pool.q_norm, q), call_in_dtype(pool.k_norm, k)
            scores = torch.einsum('bhd,bnhd->bhn', q, k)
        else:
            weight = pool.k.weight.to(x.dtype).unflatten(0, heads)
            scores = torch.einsum('bhd,hdc->bhc', q, weight) @ y.transpose(1, 2)
            if pool.k.bias is not None:  # the same for all n, so it changes nothing
                bias = pool.k.bias.to(x.dtype).unflatten(0, heads)
                scores = scores + torch.einsum('bhd,hd->bh', q, bias)[..., None]
        a: Tensor = (scores * pool.scale).softmax(-1)
        return a

    def _average(self, a: Tensor, y: Tensor) -> Tensor:
        """Means `[B, C]` of `[B, N, C]`, each part of the channels with the weights of its head."""
        parts = y.unflatten(2, (self.pool.num_heads, -1))
        return torch.einsum('bhn,bnhd->bhd', a, parts).flatten(1)
