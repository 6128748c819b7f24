"""Several heads in one model, each on a stage of its own: their outputs side by side."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from timm_fisher.head import EXAMPLE, PoolingHead, like, trace
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

    def placed(self) -> Iterator[tuple[PoolingHead, int]]:
        """Each head and its place."""
        return zip(self, self.places, strict=True)  # type: ignore[arg-type]

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        """Pooled vectors `[B, out_features]` of descriptors `[B, N, C]`, one tensor a stage."""
        return self._concatenate([head(x[place]) for head, place in self.placed()])

    def forward_with_loss(self, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As `forward`, and the sum of the heads' unsupervised losses."""
        pooled, losses = zip(
            *(head.forward_with_loss(x[place]) for head, place in self.placed()), strict=True
        )
        return self._concatenate(pooled), torch.stack(losses).sum()

    def _concatenate(self, pooled: Sequence[Tensor]) -> Tensor:
        dtype = functools.reduce(torch.promote_types, [z.dtype for z in pooled])
        parts = [z[:, None].to(at_least_float32(dtype)) for z in pooled]
        return torch.cat([unit_length(z)[:, 0] for z in parts], 1).to(dtype)

    def __prepare_scriptable__(self) -> nn.Module:
        """See `PoolingHead`."""
        channels = {place: head.in_features for head, place in self.placed()}
        example = [torch.zeros(2, EXAMPLE, c, **like(self)) for _, c in sorted(channels.items())]
        return TracedHeads(trace(self, example))

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
