"""PCA, k-means and leading eigenvectors: the fits that two heads or more use."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROUNDING = 1e-14  # of the largest squared length: what may be left of a squared distance of zero
DISTANCES = 2**22  # held at a time: 32 MiB


def check_finite(rows: Tensor) -> None:
    """Raise ValueError if descriptors `[M, C]` hold a value that is not finite."""
    if not torch.isfinite(rows).all():
        raise ValueError(
            'The descriptors hold NaN or infinite values, so nothing can be fitted to them. Check '
            'the backbone: its weights, and whether it overflows in half precision.'
        )


def pca(rows: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Principal components `[dim, C]` of descriptors `[M, C]`, orthonormal rows in order of falling
    variance, each with its largest entry positive; and the mean `[C]`. Both float64.

    Raises:
        ValueError: `rows` holds a value that is not finite.
    """
    check_finite(rows)
    rows = rows.double()
    mean = rows.mean(0)
    centred = rows - mean
    components = None
    if dim < len(rows) < rows.shape[1]:
        # By way of the smaller side, if there are so many directions in which rows differ.
        variances, vectors = torch.linalg.eigh(centred @ centred.T)
        if variances[-dim] > ROUNDING * variances[-1]:
            components = F.normalize(vectors[:, -dim:].flip(1).T @ centred, dim=1)
    if components is None:
        _, vectors = torch.linalg.eigh(centred.T @ centred)
        components = vectors.flip(1).T[:dim]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return components * torch.where(largest < 0, -1.0, 1.0), mean


def leading_axes(
    chunks: Callable[[], Iterable[Tensor]], rank: int, *, iterations: int = 2
) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors and eigenvalues of the covariance of rows, which is never formed: by
    subspace iterations from random directions. A pass over n rows costs 4 n d r operations, and
    memory a few times d r and a chunk.

    Args:
        chunks: gives an iterator over the rows, in chunks `[M, d]`; called for each pass.
        rank: r, at most d.
        iterations: passes that improve the subspace, unless it is the whole space.

    Returns:
        Axes `[d, r]`, orthonormal, and variances `[r]`, falling, float64.

    Source: Halko, Martinsson and Tropp, SIAM Review 2011, algorithms 4.4 and 5.3.
    """
    count, mean = 0, torch.zeros(())
    for rows in chunks():
        count, mean = count + len(rows), mean + rows.sum(0, dtype=torch.float64)
    mean = mean / count
    d = len(mean)
    width = min(d, rank + max(20, rank // 10))  # more directions than asked for
    if width == d:
        basis, iterations = torch.eye(d, dtype=rows.dtype, device=rows.device), 0
    else:
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(d, width, generator=generator).to(rows)

    for _ in range(iterations):
        offset = (mean @ basis.double()).to(basis.dtype)
        image = torch.zeros_like(basis)
        for rows in chunks():
            image.addmm_(rows.T, rows @ basis - offset)
        basis = torch.linalg.qr(image).Q
    offset = (mean @ basis.double()).to(basis.dtype)
    covariance = torch.zeros(width, width, dtype=torch.float64, device=basis.device)
    for rows in chunks():
        inside = (rows @ basis - offset).double()
        covariance.addmm_(inside.T, inside)
    variances, rotation = torch.linalg.eigh(covariance / count)
    rotation = rotation.flip(1)[:, :rank].to(basis.dtype)
    return basis @ rotation, variances.flip(0)[:rank].clamp_min(0)


@torch.no_grad()
def start_reduction(reduce: nn.Linear, rows: Tensor) -> Tensor:
    """Start a reduction C -> d from the PCA of descriptors `[M, C]`, in place, scaled by one number
    such that the mean squared length of what it gives is 1, whatever the scale of the backbone. The
    bias removes the mean. Gives the reduced descriptors `[M, d]`, float64.

    Raises:
        ValueError: `rows` holds a value that is not finite.
    """
    components, mean = pca(rows, len(reduce.weight))
    y = (rows.double() - mean) @ components.T
    scale = y.square().sum(1).mean().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)  # all descriptors alike
    reduce.weight.copy_(components / scale)
    reduce.bias.copy_(-(components @ mean) / scale)
    return y / scale


def kmeans(rows: Tensor, clusters: int, *, seed: int = 0, iterations: int = 100) -> Tensor:
    """Centroids `[K, C]` of K-means, float64: greedy k-means++ seeds, then Lloyd's steps until the
    assignments settle.

    A cluster that loses all its rows takes the worst represented one. Where there are fewer
    different rows than clusters, the spare centroids lie close to rows, each at a small random
    offset, so that a fit that starts from them can tell them apart.

    Args:
        rows: descriptors `[M, C]`.
        clusters: K.
        seed: of the k-means++ draws.
        iterations: at most this many of Lloyd's steps.

    Raises:
        ValueError: `rows` holds a value that is not finite.

    Source: Arthur and Vassilvitskii, SODA 2007; several candidates per seed as in their code.
    """
    check_finite(rows)
    rows = rows.double()
    mean = rows.mean(0)
    rows = rows - mean  # |x|^2 - 2 x c + |c|^2 cancels badly far from the origin
    length = rows.square().sum(1)
    centroids = _kmeans_seeds(rows, length, clusters, seed)
    previous = None
    for _ in range(iterations):
        nearest, distance = _nearest(rows, length, centroids)
        if previous is not None and torch.equal(nearest, previous):
            break
        previous = nearest
        counts = nearest.bincount(minlength=clusters)
        # Unlike index_add, this adds in the same order each time, on a GPU too.
        grouped = rows[nearest.argsort(stable=True)]
        sums = torch.segment_reduce(grouped, 'sum', lengths=counts, axis=0)
        empty = counts == 0
        centroids = torch.where(empty[:, None], centroids, sums / counts.clamp_min(1)[:, None])
        worst = distance.topk(min(int(empty.sum()), len(rows)))
        worst_rows = worst.indices[worst.values > 0]
        centroids[empty.nonzero().flatten()[: len(worst_rows)]] = rows[worst_rows]
    return centroids + mean


def sharpness(rows: Tensor, centroids: Tensor) -> Tensor:
    """The alpha for which, in a softmax of `-alpha |x - c|^2`, the second nearest centroid weighs
    1/100 of the nearest at the mean gap, of rows `[M, C]` of about unit length; at most 4605."""
    nearest = torch.cdist(rows, centroids).square().sort(1).values[:, :2]
    # The gap is zero for centroids alike, or one; so floored, alpha is in the range of float16.
    return math.log(100) / (nearest[:, -1] - nearest[:, 0]).mean().clamp_min(1e-3)


def _kmeans_seeds(rows: Tensor, length: Tensor, clusters: int, seed: int) -> Tensor:
    """Greedy k-means++: of a few rows drawn by squared distance, the one that lowers most."""
    generator = torch.Generator().manual_seed(seed)
    trials = 2 + int(math.log(clusters))
    draws = torch.rand(clusters, trials, generator=generator, dtype=rows.dtype).to(rows.device)
    offsets = torch.randn(clusters, rows.shape[1], generator=generator, dtype=rows.dtype)
    offsets = 1e-3 * rows.square().mean().sqrt() * offsets.to(rows.device)
    distance = torch.ones_like(length)  # the first seed is drawn evenly
    seeds = torch.empty_like(offsets)
    for k in range(clusters):
        spare = ~distance.any()  # each row is a seed already
        weight = (distance + spare).cumsum(0)
        picks = torch.searchsorted(weight, draws[k] * weight[-1], right=True)
        candidates = rows[picks.clamp_max(len(rows) - 1)]
        apart = _squared_distances(rows, length, candidates)
        apart = torch.where(apart > ROUNDING * length.amax(), apart, 0.0)
        apart = apart if k == 0 else torch.minimum(apart, distance[:, None])
        best = apart.sum(0).argmin()
        seeds[k] = candidates[best] + spare * offsets[k]
        distance = apart[:, best]
    return seeds


def _nearest(rows: Tensor, length: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid `[M]` of each row, and the squared distance to it `[M]`."""
    size = max(1, DISTANCES // len(centroids))
    chunks = zip(rows.split(size), length.split(size), strict=True)
    parts = [_squared_distances(chunk, part, centroids).min(1) for chunk, part in chunks]
    distance, nearest = (torch.cat(values) for values in zip(*parts, strict=True))
    return nearest, torch.where(distance > ROUNDING * length.amax(), distance, 0.0)


def _squared_distances(rows: Tensor, length: Tensor, centroids: Tensor) -> Tensor:
    """`[M, K]`, up to rounding; `length` is |row|^2 `[M]`."""
    return torch.addmm(length[:, None], rows, centroids.T, alpha=-2) + centroids.square().sum(1)
