"""Exact nearest neighbours by cosine similarity.

Similarities are exact numbers, not sums that depend on their order: coordinates are rounded to
multiples of 2^-25, about what float32 keeps of them, so that their products are multiples of 2^-50,
which float64 adds without error. Equal similarities are then equal on every machine, and are
ordered by the index.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from timm_fisher.numerics.linalg import without_autocast

SCALE = 2.0**25
BLOCK = 2**24  # values that are worked on at a time


def fixed_point(vectors: Tensor) -> Tensor:
    """Coordinates of unit vectors as multiples of 2^-25: whole numbers, in float64. A dot product
    of two, exact, is their cosine similarity times `SCALE` squared."""
    return (vectors.double() * SCALE).round_()


def check_vectors(vectors: Tensor, what: str) -> Tensor:
    """The same in float32; a ValueError, which calls them `what`, unless they are `[n, D]`, n >= 1,
    of unit length."""
    if vectors.ndim != 2 or not vectors.is_floating_point() or not len(vectors):
        raise ValueError(
            f'{what} are {vectors.dtype} of shape {tuple(vectors.shape)}; give one or more rows of '
            'floating point.'
        )
    vectors = vectors.detach().float()
    lengths = torch.linalg.vector_norm(vectors, dim=1)
    bad = (~((lengths - 1).abs() < 1e-3)).nonzero().flatten().tolist()  # NaN, too
    if bad:
        raise ValueError(
            f'{what}: the length of vector {bad[0]} is {lengths[bad[0]]:.4g}, not 1. '
            'timm_fisher.embed gives vectors of unit length.'
        )
    return vectors


class Search:
    """Nearest neighbours among vectors that are prepared once.

    The product of matrices in float32 finds candidates: all that can be among the nearest, given
    the bound of its rounding errors (Higham, Accuracy and Stability of Numerical Algorithms, 3.1).
    Their similarities are then computed exactly. The result is the same for both backends.

    Args:
        vectors: `[n, D]`, of unit length, on any device.
        backend: 'torch', or 'faiss' for `faiss.IndexFlatIP`, which is exact, too, on the CPU.

    Raises:
        ValueError: vectors of another shape or length, or an unknown backend.
        ModuleNotFoundError: faiss is not installed.
    """

    def __init__(self, vectors: Tensor, *, backend: Literal['torch', 'faiss'] = 'torch') -> None:
        if backend not in ('torch', 'faiss'):
            raise ValueError(f"{backend=} is neither 'torch' nor 'faiss'.")
        self.vectors = check_vectors(vectors, 'The vectors to search')
        dim = vectors.shape[1]
        # Twice the error of a similarity: of sums in float32, and of multiples of 2^-25.
        self.margin = 2 * (1.1 * dim + dim**0.5) * 2**-24
        self.faiss = _create_faiss(self.vectors) if backend == 'faiss' else None

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest vectors of each query, nearest first, those that are equally near by
        ascending index; all of them if there are fewer.

        Args:
            queries: `[q, D]`, of unit length, on the device of the vectors.
            k: neighbours of each.

        Returns:
            Similarities `[q, k]`, float64, -1 to 1, and indices `[q, k]`.

        Raises:
            ValueError: queries of another shape or length, or no k.
        """
        queries = check_vectors(queries, 'The queries')
        if queries.shape[1] != self.vectors.shape[1]:
            raise ValueError(
                f'The queries have {queries.shape[1]} dimensions, the vectors to search '
                f'{self.vectors.shape[1]}. Embed both by the same model.'
            )
        if k < 1:
            raise ValueError(f'k is {k}; give 1 or more.')
        k = min(k, len(self.vectors))
        parts = queries.split(max(1, BLOCK // len(self.vectors)))
        nearest = [self._rank(part, *self._candidates(part, k), k) for part in parts]
        similarities, indices = zip(*nearest, strict=True)
        return torch.cat(similarities), torch.cat(indices)

    def _candidates(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Pairs of a query and a vector that may be among its k nearest."""
        if self.faiss is None:
            with without_autocast(queries):  # the margin is that of float32
                similar = queries @ self.vectors.T
            least = similar.topk(k).values[:, -1:] - self.margin
            rows, columns = (similar >= least).nonzero(as_tuple=True)
            return rows, columns
        number = k
        while True:
            number = min(2 * number, len(self.vectors))
            values, indices = map(torch.from_numpy, self.faiss.search(queries.numpy(), number))
            least = values[:, k - 1 : k] - self.margin
            if number == len(self.vectors) or (values[:, -1:] < least).all():
                near = values >= least
                return near.nonzero()[:, 0], indices[near]

    def _rank(
        self, queries: Tensor, rows: Tensor, columns: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Of each query the k nearest among its candidates."""
        size = max(1, BLOCK // queries.shape[1])
        parts = [
            (fixed_point(queries[row]) * fixed_point(self.vectors[column])).sum(1)
            for row, column in zip(rows.split(size), columns.split(size), strict=True)
        ]
        similarities = torch.cat(parts) / SCALE**2
        order = columns.argsort()
        for key in (-similarities, rows):
            order = order[key[order].argsort(stable=True)]
        number = rows.bincount(minlength=len(queries))
        first = number.cumsum(0) - number
        chosen = order[first[:, None] + torch.arange(k, device=order.device)]
        return similarities[chosen], columns[chosen]


def _create_faiss(vectors: Tensor) -> Any:
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'faiss is not installed: pip install "timm_fisher[retrieval]", or search by torch.'
        ) from error
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors.numpy())
    return index
