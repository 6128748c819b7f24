"""Exact search: the vectors of a gallery that are most alike to others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

HELD = 2**24  # similarities at a time: 64 MiB


def nearest_neighbours(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most similar vectors of a gallery for each query, by their dot products.

    Args:
        queries: `[m, D]`, of unit length as `timm_fisher.embed` gives them.
        gallery: `[n, D]`, likewise, on the same device.
        k: at most n are given.

    Returns:
        Similarities and places in the gallery, both `[m, min(k, n)]`, the most similar first; of
        equally similar ones that with the lower place.

    Raises:
        ValueError: an empty gallery, vectors of another size, or k below 1.
    """
    check_sizes(queries, gallery)
    if k < 1:
        raise ValueError(f'k is {k}; give 1 or more.')
    k = min(k, len(gallery))
    found = []
    for similarities in chunks(queries, gallery):
        values = similarities.topk(k).values
        # topk gives any of those that are as similar as the last one.
        above = similarities > values[:, -1:]
        last = similarities == values[:, -1:]
        chosen = above | (last & (last.cumsum(1) <= k - above.sum(1, keepdim=True)))
        places = chosen.nonzero()[:, 1].view(len(similarities), k)
        values = similarities.gather(1, places)
        values, order = values.sort(dim=1, descending=True, stable=True)
        found.append((values, places.gather(1, order)))
    values, places = (torch.cat(part) for part in zip(*found, strict=True))
    return values, places


def chunks(queries: Tensor, gallery: Tensor) -> Iterator[Tensor]:
    """Dot products `[B, n]` of some queries at a time, as many as memory is meant for."""
    for part in queries.split(max(1, HELD // len(gallery))):
        yield part @ gallery.T


def check_sizes(queries: Tensor, gallery: Tensor) -> None:
    """Refuse, by a ValueError, what cannot be searched."""
    shapes = tuple(queries.shape), tuple(gallery.shape)
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(f'Queries and gallery are [m, D] and [n, D]; got {shapes}.')
    if not len(queries) or not len(gallery):
        raise ValueError(f'There is nothing to search: queries and gallery are {shapes}.')
