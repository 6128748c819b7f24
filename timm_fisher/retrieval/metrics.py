"""How good a search is, where the classes of the images are known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from timm_fisher.retrieval.search import check_sizes, chunks


def evaluate_retrieval(
    queries: Tensor,
    labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Search each query in the gallery, and count the images of its class that come first.

    The gallery is ordered by dot products, and images that are equally similar by their places. A
    query of a class that the gallery lacks is left out, and counted.

    Args:
        queries: vectors `[m, D]`, of unit length as `timm_fisher.embed` gives them.
        labels: their classes `[m]`.
        gallery: vectors `[n, D]`; None for the queries themselves, each without itself.
        gallery_labels: their classes `[n]`.
        ks: of recall@k.

    Returns:
        `recall_at_K`, the share of queries with an image of their class among the first K;
        `map`, the mean average precision over the whole gallery; `map_at_r`, that over the first R,
        R being how many images of its class there are; `queries`, and `queries_without_match`.

    Raises:
        ValueError: sizes that do not fit, or no query of a class that the gallery has.

    Source: Musgrave, Belongie and Lim, "A Metric Learning Reality Check", ECCV 2020, for MAP@R.
    pytorch-metric-learning has all of these but recall@k; it computes in float32, and leaves the
    order of equally similar images open.
    """
    leave_one_out = gallery is None
    if (gallery is None) != (gallery_labels is None):
        raise ValueError('gallery and gallery_labels belong together: give both, or none.')
    if gallery is None or gallery_labels is None:
        gallery, gallery_labels = queries, labels
    check_sizes(queries, gallery)
    if len(labels) != len(queries) or len(gallery_labels) != len(gallery):
        raise ValueError(
            f'{len(queries)} queries have {len(labels)} labels, {len(gallery)} vectors of the '
            f'gallery {len(gallery_labels)}; give one for each.'
        )
    if not ks or min(ks) < 1:
        raise ValueError(f'ks is {list(ks)}; give numbers, each 1 or more.')
    ranks = torch.arange(1, len(gallery) + 1, device=queries.device, dtype=torch.float64)
    sums: dict[str, float] = dict.fromkeys([*(f'recall_at_{k}' for k in ks), 'map', 'map_at_r'], 0)
    start, counted = 0, 0
    for similarities in chunks(queries, gallery):
        rows = torch.arange(start, start + len(similarities), device=queries.device)
        start += len(similarities)
        if leave_one_out:
            similarities[rows - rows[0], rows] = -torch.inf  # at the end, and of no class
        order = similarities.argsort(dim=1, descending=True, stable=True)
        right = gallery_labels[order] == labels[rows, None]
        if leave_one_out:
            right &= order != rows[:, None]
        number = right.sum(1, keepdim=True)
        right, number = right[number[:, 0] > 0], number[number > 0].view(-1, 1)
        counted += len(right)
        precision = right.cumsum(1) / ranks * right
        sums['map'] += (precision.sum(1) / number[:, 0]).sum().item()
        among = precision * (ranks <= number)
        sums['map_at_r'] += (among.sum(1) / number[:, 0]).sum().item()
        for k in ks:
            sums[f'recall_at_{k}'] += right[:, :k].any(1).sum().item()
    if not counted:
        raise ValueError(
            f'None of the {len(queries)} queries has another image of its class in the gallery.'
        )
    means = {name: total / counted for name, total in sums.items()}
    return {**means, 'queries': counted, 'queries_without_match': len(queries) - counted}
