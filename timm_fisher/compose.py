"""Several heads in one model, each on a stage of its own: their outputs side by side."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from timm_fisher.head import PoolingHead, example, trace
from timm_fisher.numerics.linalg import at_least_float32, unit_length


@register_notrace_module
class ConcatHeads(nn.ModuleList):
    """Heads whose outputs are L2-normalised, so that none drowns the others, and concatenated.

    Args:
        heads: two or more, or one.
        places: for each head, which of the descriptors it pools.

    Attributes:
        out_features: sum of those of the heads.
    """

    def __init__(self, heads: Sequence[PoolingHead], places: Sequence[int]) -> None:
        super().__init__(heads)
        self.places = list(places)
        self.out_features = sum(head.out_features for head in heads)

    def __iter__(self) -> Iterator[PoolingHead]:
        return cast(Iterator[PoolingHead], super().__iter__())

    def placed(self) -> Iterator[tuple[PoolingHead, int]]:
        """Each head and its place."""
        return zip(self, self.places, strict=True)

    def forward(self, x: Sequence[Tensor], contexts: Sequence[Mapping[str, Any]] = ()) -> Tensor:
        """Pooled vectors `[B, out_features]`.

        Args:
            x: descriptors `[B, N, C]` of each head.
            contexts: for each head what else it asks for, if any asks.
        """
        inputs = zip(self, x, contexts or [{}] * len(self), strict=True)
        return self._concatenate([head(y, **context) for head, y, context in inputs])

    def forward_with_loss(
        self, x: Sequence[Tensor], contexts: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, and the sum of the heads' unsupervised losses."""
        inputs = zip(self, x, contexts or [{}] * len(self), strict=True)
        both = [head.forward_with_loss(y, **context) for head, y, context in inputs]
        pooled, losses = zip(*both, strict=True)
        return self._concatenate(pooled), torch.stack(losses).sum()

    def _concatenate(self, pooled: Sequence[Tensor]) -> Tensor:
        dtype = functools.reduce(torch.promote_types, [z.dtype for z in pooled])
        parts = [z[:, None].to(at_least_float32(dtype)) for z in pooled]
        return torch.cat([unit_length(z)[:, 0] for z in parts], 1).to(dtype)

    def __prepare_scriptable__(self) -> nn.Module:
        """See `PoolingHead`."""
        for head in self:
            head.__prepare_scriptable__()  # refuses what needs more
        return TracedHeads(trace(self, [example(head)[0] for head in self]))

    def extra_repr(self) -> str:
        return f'places={self.places}'


class TracedHeads(nn.Module):
    """`ConcatHeads`, traced, for `torch.jit.script`."""

    def __init__(self, heads: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: list[Tensor]) -> Tensor:
        """As `ConcatHeads`."""
        pooled: Tensor = self.heads(x)
        return pooled
