"""Slow, obvious float64 NetVLAD: one descriptor and one cluster at a time."""

from __future__ import annotations

from typing import Any

import numpy as np


def describe(state: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Reduced descriptor `[d]` of length 1, for one descriptor `[C]`."""
    if 'reduce.weight' in state:
        x = state['reduce.weight'] @ x + state['reduce.bias']
    return x / np.linalg.norm(x)


def soft(state: dict[str, np.ndarray], y: np.ndarray) -> np.ndarray:
    """Weights `[K]` of the clusters for y."""
    logits = state['assign.weight'] @ y + state['assign.bias']
    a = np.exp(logits - logits.max())
    return a / a.sum()


def hard(state: dict[str, np.ndarray], y: np.ndarray) -> np.ndarray:
    """1 for the nearest centroid, 0 for the others."""
    distances = [np.linalg.norm(y - c) for c in state['centroids']]
    return np.eye(len(distances))[np.argmin(distances)]


def pool(
    state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any], assign: Any = soft
) -> np.ndarray:
    """Pooled vectors `[B, K * d]` of descriptors `[B, N, C]`."""
    rows = []
    for descriptors in x:
        v = np.zeros_like(state['centroids'])
        for descriptor in descriptors:
            y = describe(state, descriptor)
            a = assign(state, y)
            for k, c in enumerate(state['centroids']):
                v[k] += a[k] * (y - c) / len(descriptors)
        # A cluster with less than 1e-6, in units of the descriptors' length, stays short.
        v = np.stack([residual / max(np.linalg.norm(residual), 1e-6) for residual in v])
        rows.append(v.ravel() / np.linalg.norm(v))
    return np.stack(rows)
