"""How good nearest neighbours are, where images have labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timm_fisher.retrieval.search import BLOCK, check_vectors, fixed_point

Labels = Sequence[Any] | np.ndarray | Tensor


def evaluate_retrieval(
    queries: Tensor,
    labels: Labels,
    gallery: Tensor | None = None,
    gallery_labels: Labels | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recall, mean average precision and mAP@R of a ranking of the gallery for each query, by
    cosine similarity, equal ones by ascending index.

    Similarities are exact, see `timm_fisher.retrieval.search`, so that ties are the same on every
    machine. pytorch-metric-learning has the same metrics, which the tests compare with, but ranks
    in float32, leaves the order of ties open, and keeps several tables of all pairs in memory.

    Args:
        queries: `[q, D]`, of unit length.
        labels: of the queries: texts, numbers, anything that is hashable.
        gallery: `[n, D]`, of unit length; None for the queries themselves, each of which is then
            ranked against all others.
        gallery_labels: of the gallery.
        ks: how many neighbours recall looks at.

    Returns:
        Means over the queries that have a match, an image of the same label, in the gallery:
        `recall_at_K`, the share of queries with a match among the first K, as metric learning has
        it; `map`, the mean over the matches of the precision at their ranks; `map_at_r`, the same
        of the first R ranks alone, R being the number of matches (Musgrave et al., A Metric
        Learning Reality Check, 2020). Also `queries`, the number of those, and
        `queries_without_match`, the number of the others.

    Raises:
        ValueError: vectors of another shape or length, labels of another number, a k below 1, or no
            query has a match.
    """
    if (gallery is None) != (gallery_labels is None):
        raise ValueError('Give gallery and gallery_labels, or neither.')
    if not all(k >= 1 for k in ks):
        raise ValueError(f'ks is {ks}; give 1 or more for each.')
    leave_one_out = gallery is None
    queries = check_vectors(queries, 'The queries')
    gallery = queries if gallery is None else check_vectors(gallery, 'The gallery')
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(
            f'The queries have {queries.shape[1]} dimensions, the gallery {gallery.shape[1]}. '
            'Embed both by the same model.'
        )
    numbers: dict[Any, int] = {}
    wanted = _numbered(labels, numbers, queries, 'queries')
    given = wanted if leave_one_out else _numbered(gallery_labels, numbers, gallery, 'gallery')
    matches = given.bincount(minlength=len(numbers))[wanted] - int(leave_one_out)
    with_match = (matches > 0).nonzero().flatten()
    if not len(with_match):
        raise ValueError('No query has an image of the same label in the gallery.')

    ranked = fixed_point(gallery).T
    ranks = torch.arange(1, len(gallery) + 1, device=gallery.device)
    sums = {f'recall_at_{k}': 0.0 for k in ks} | {'map': 0.0, 'map_at_r': 0.0}
    for rows in with_match.split(max(1, BLOCK // 4 // len(gallery))):
        similar = fixed_point(queries[rows]) @ ranked
        if leave_one_out:  # an image comes last in its own ranking, and counts for nothing
            similar.scatter_(1, rows[:, None], -torch.inf)
        order = similar.argsort(dim=1, descending=True, stable=True)
        right = given[order] == wanted[rows, None]
        if leave_one_out:
            right[:, -1] = False
        number = matches[rows, None]
        precision = right * right.cumsum(1) / ranks.double()
        sums['map'] += (precision / number).sum().item()
        sums['map_at_r'] += (precision * (ranks <= number) / number).sum().item()
        for k in ks:
            sums[f'recall_at_{k}'] += right[:, :k].any(1).sum().item()
    means = {name: value / len(with_match) for name, value in sums.items()}
    counted = len(with_match)
    return {**means, 'queries': counted, 'queries_without_match': len(queries) - counted}


def _numbered(
    labels: Labels | None,
    numbers: dict[Any, int],
    vectors: Tensor,
    what: str,
) -> Tensor:
    """Labels as numbers `[n]`, which are added to `numbers`."""
    if isinstance(labels, np.ndarray | Tensor):
        labels = labels.tolist()
    values = [] if labels is None else list(labels)
    if len(values) != len(vectors):
        raise ValueError(f'{len(values)} labels of the {what} do not fit {len(vectors)} vectors.')
    found = [numbers.setdefault(value, len(numbers)) for value in values]
    return torch.tensor(found, device=vectors.device)
