"""MAP, multi-head attention pooling, by a learned query: timm's `AttentionPoolLatent`.

    a_hn = softmax_n(q_h . k_hn / sqrt(C / H))   H heads of C / H channels; k = K x + b', and
                                                 q = Q p + b for a learned p (L of them)
    y    = P [V_h (sum_n a_hn x_n) + b_h]_h      the heads side by side, projected
    z    = y + MLP(norm(y))                      of the first p, or the mean over all

timm's module holds the weights, under its names, and starts them. The results are its results, but
the products are taken in another order. timm computes k and v of every descriptor, for 2 N C^2. But
`q_h . K_h x_n = (K_h^T q_h) . x_n`, and `sum_n a_hn V_h x_n = V_h (sum_n a_hn x_n)`, which takes
2 H N C for the descriptors and C^2 for an image. (b' adds the same to all n, so it falls out of a.)
With `qk_norm` each key has a norm of its own, and has to be computed.

Of timm's arguments, `embed_dim` is left out, which must equal C, and so are `pos_embed` and
`feat_size`, which fix number and order of the descriptors. `norm_layer` is 'layernorm' here as in
timm's vision transformers with `global_pool='map'`, where timm's class alone has none.

Paper: Zhai, Kolesnikov, Houlsby and Beyer, "Scaling Vision Transformers", CVPR 2022;
after Lee et al., "Set Transformer", ICML 2019 (pooling by multi-head attention).
"""

from __future__ import annotations

from typing import cast

import torch
from timm.layers import AttentionPoolLatent, get_act_layer, get_norm_layer
from torch import Tensor
from torch.nn.functional import linear

from timm_fisher.head import MOST_FEATURES, PoolingHead, check_range
from timm_fisher.numerics.linalg import call_in_dtype, precise

CHOICES = {
    'pool_type': ('token', 'avg'),
    'norm_layer': ('layernorm', 'rmsnorm', ''),
    'act_layer': ('gelu', 'gelu_tanh', 'relu', 'silu'),
}


class LatentAttention(PoolingHead):
    """Attention of a learned query, a projection and a residual perceptron.

    The arguments have the names, and but for `norm_layer` the defaults, of timm's class.

    Args:
        in_features: channels C of one descriptor.
        out_features: of the projection; None for C, 0 for neither projection nor perceptron.
        num_heads: H, which divides C.
        mlp_ratio: width of the perceptron's hidden layer, in units of `out_features`.
        qkv_bias: whether queries, keys and values have a bias.
        q_proj: project the latent to queries; otherwise it is the query.
        qk_norm: normalise queries and keys.
        latent_len: L, number of latents.
        latent_dim: length of a latent; None for C.
        pool_type: what is taken of the results for L latents, the first, 'token', or 'avg'.
        norm_layer: before the perceptron, and of queries and keys: 'layernorm', 'rmsnorm', or ''
            for none (for queries and keys a layer norm).
        act_layer: of the perceptron: 'gelu', 'gelu_tanh', 'relu' or 'silu'.
        drop: share of the projection's outputs dropped in training.

    Output: `[B, out_features]`.

    Raises:
        ValueError: a number out of range, or one that does not divide, or an unknown choice.
    """

    def __init__(
        self,
        in_features: int,
        *,
        out_features: int | None = None,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        q_proj: bool = True,
        qk_norm: bool = False,
        latent_len: int = 1,
        latent_dim: int | None = None,
        pool_type: str = 'token',
        norm_layer: str = 'layernorm',
        act_layer: str = 'gelu',
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_range(
            'map',
            out_features=(out_features, 0, MOST_FEATURES, None),
            num_heads=(num_heads, 1, MOST_FEATURES),
            mlp_ratio=(mlp_ratio, 0.25, 64.0),
            latent_len=(latent_len, 1, MOST_FEATURES),
            latent_dim=(latent_dim, 1, MOST_FEATURES, None),
            drop=(drop, 0.0, 0.9),
        )
        given = {'pool_type': pool_type, 'norm_layer': norm_layer, 'act_layer': act_layer}
        for name, value in given.items():
            if value not in CHOICES[name]:
                choices = ', '.join(map(repr, CHOICES[name]))
                raise ValueError(f'map takes {name} as one of {choices}, got {value!r:.99}.')
        if in_features % num_heads:
            raise ValueError(
                f'map gives each head an equal part of the channels: num_heads={num_heads} does '
                f'not divide {in_features}.'
            )
        if not q_proj and latent_dim not in (None, in_features):
            raise ValueError(
                f'map takes the latent as the query with q_proj=False, so latent_dim must be '
                f'{in_features}, the number of channels, or None, got {latent_dim}.'
            )
        self.pool = AttentionPoolLatent(
            in_features,
            out_features=in_features if out_features is None else out_features,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            q_proj=q_proj,
            qk_norm=qk_norm,
            latent_len=latent_len,
            latent_dim=latent_dim or in_features,
            pool_type=pool_type,
            norm_layer=get_norm_layer(norm_layer),
            act_layer=get_act_layer(act_layer),
            drop=drop,
        )
        self.in_features = in_features
        self.out_features = self.pool.out_features
        self.qk_norm = qk_norm

    @precise
    def forward(self, x: Tensor) -> Tensor:
        pool = self.pool
        means = (self._weights(x) @ x).unflatten(1, (pool.latent_len, -1))  # [B, L, H, C]
        weight, bias = self._part(x.dtype, 1)
        y: Tensor = torch.einsum('blhc,hdc->blhd', means, weight).flatten(2)
        y = y if bias is None else y + bias
        y = pool.proj_drop(call_in_dtype(pool.proj, y))
        if pool.mlp is not None:
            y = y + call_in_dtype(pool.mlp, call_in_dtype(pool.norm, y))
        return y[:, 0] if pool.pool == 'token' else y.mean(1)

    @precise
    def attention(self, x: Tensor) -> Tensor:
        """Weights a `[B, L * H, N]` of descriptors `[B, N, C]`, the heads of one latent side by
        side; they sum to 1 over N."""
        return self._weights(x)

    def _weights(self, x: Tensor) -> Tensor:
        pool = self.pool
        weight, bias = self._part(x.dtype, 0)
        q = call_in_dtype(pool.q, pool.latent.to(x.dtype))[0].unflatten(1, (pool.num_heads, -1))
        if self.qk_norm:
            k = linear(x, weight.flatten(0, 1), bias).unflatten(2, (pool.num_heads, -1))
            q, k = call_in_dtype(pool.q_norm, q), call_in_dtype(pool.k_norm, k)
            scores = torch.einsum('lhd,bnhd->blhn', q, k).flatten(1, 2)
        else:
            scores = torch.einsum('lhd,hdc->lhc', q, weight).flatten(0, 1) @ x.transpose(1, 2)
        a: Tensor = (scores * pool.scale).softmax(-1)
        return a

    def _part(self, dtype: torch.dtype, part: int) -> tuple[Tensor, Tensor | None]:
        """Weight `[H, C / H, C]` and bias `[C]` of the keys (part 0) or the values (part 1)."""
        kv = self.pool.kv
        weight = kv.weight.to(dtype).unflatten(0, (2, self.pool.num_heads, -1))[part]
        bias = None if kv.bias is None else kv.bias.to(dtype).unflatten(0, (2, -1))[part]
        return cast(Tensor, weight), bias
