"""Slow, obvious float64 SALAD: Sinkhorn on probabilities, one row and one column at a time."""

from __future__ import annotations

from typing import Any

import numpy as np


def perceptron(state: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    """Output of a two-layer perceptron for one vector `[C]`."""
    hidden = state[f'{name}.0.weight'] @ x + state[f'{name}.0.bias']
    return state[f'{name}.3.weight'] @ np.maximum(hidden, 0) + state.get(f'{name}.3.bias', 0)


def transport(scores: np.ndarray, iterations: int) -> np.ndarray:
    """Masses `[N, m]` for scores `[N, m]`, with a dustbin for N - m of N."""
    n, m = scores.shape
    p = np.exp(np.column_stack([scores, np.zeros(n)]))
    mass = [1.0] * m + [n - m]
    for _ in range(iterations):
        for k in range(m + 1):
            p[:, k] *= mass[k] / p[:, k].sum()
        for i in range(n):
            p[i] /= p[i].sum()
    return p[:, :m]


def unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v)


def pool(
    state: dict[str, np.ndarray],
    x: np.ndarray,
    arguments: dict[str, Any],
    class_token: np.ndarray | None = None,
) -> np.ndarray:
    """Pooled vectors `[B, t + l m]` of descriptors `[B, N, C]` and class tokens `[B, C]`."""
    rows = []
    for image, descriptors in enumerate(x):
        scores = np.stack([perceptron(state, 'score', descriptor) for descriptor in descriptors])
        features = [perceptron(state, 'features', descriptor) for descriptor in descriptors]
        p = transport(scores, arguments['iterations'])
        clusters = []
        for k in range(arguments['clusters']):
            clusters.append(unit(sum(p[i, k] * feature for i, feature in enumerate(features))))
        token = descriptors.mean(0) if class_token is None else class_token[image]
        g = unit(perceptron(state, 'token', token))
        rows.append(unit(np.concatenate([g, np.column_stack(clusters).ravel()])))
    return np.stack(rows)
