"""Slow, obvious float64 DropCov: the covariance, and what is dropped in training."""

from __future__ import annotations

from typing import Any

import numpy as np
from references.isqrt_cov import covariance, reduced, triangle


def pool(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    """Upper triangles `[B, d (d + 1) / 2]` of descriptors `[B, N, C]`, in evaluation."""
    rows = []
    for descriptors in x:
        rows.append(triangle(covariance(reduced(state, descriptors, arguments))))
    return np.array(rows)


def importance(filter: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Importance `[d]` of the channels of one image `[N, d]`."""
    mean = np.concatenate([[0], y.mean(0), [0]])
    filtered = np.array([filter @ mean[i : i + 3] for i in range(y.shape[1])])
    a = np.exp(filtered - filtered.max())
    return a / a.sum()


def training(filter: np.ndarray, images: np.ndarray, random: np.ndarray) -> tuple:
    """Upper triangles of reduced descriptors `[B, N, d]` in training, for random numbers `[B, d]`
    from 0 to 1, and the probability."""
    weights = [importance(filter, y) for y in images]
    weighted = [y * (1 + a) for y, a in zip(images, weights, strict=True)]
    cosines = []
    for y, a in zip(weighted, weights, strict=True):
        q = covariance(y).sum(1)
        cosines.append(q @ a / np.linalg.norm(q) / np.linalg.norm(a))
    p = 1 - 10 / np.log2(images.shape[2]) * np.mean(cosines)
    p = min(max(p, 0), 0.9)
    kept = (random >= p) / (1 - p)
    return np.array([triangle(covariance(y * k)) for y, k in zip(weighted, kept, strict=True)]), p
