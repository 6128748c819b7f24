"""Slow, obvious float64 iSQRT-COV: one image at a time, always on the d x d side."""

from __future__ import annotations

from typing import Any

import numpy as np


def linear_norm(state: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    """Linear map and batch norm, in eval mode, of `[N, C]`."""
    y = x @ state[f'{name}.linear.weight'].T
    mean, variance = state[f'{name}.norm.running_mean'], state[f'{name}.norm.running_var']
    y = (y - mean) / np.sqrt(variance + 1e-5)
    return y * state[f'{name}.norm.weight'] + state[f'{name}.norm.bias']


def reduced(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    """Descriptors `[N, d]` of `[N, C]`, in eval mode."""
    if arguments['reduce_dim'] is None:
        return x
    return np.maximum(linear_norm(state, 'reduce', x), 0)


def triangle(matrix: np.ndarray) -> list[float]:
    """Upper triangle, row by row."""
    return [matrix[i, j] for i in range(len(matrix)) for j in range(i, len(matrix))]


def covariance(x: np.ndarray) -> np.ndarray:
    """Centred covariance of `[N, d]`."""
    total = np.zeros((x.shape[1], x.shape[1]))
    for row in x:
        total += np.outer(row - x.mean(0), row - x.mean(0)) / len(x)
    return total


def root(matrix: np.ndarray, iterations: int) -> np.ndarray:
    """Coupled Newton-Schulz iterations between the two compensations by the trace."""
    trace = np.trace(matrix)
    y, z, identity = matrix / trace, np.eye(len(matrix)), np.eye(len(matrix))
    for _ in range(iterations):
        y, z = y @ (3 * identity - z @ y) / 2, (3 * identity - z @ y) @ z / 2
    return y * np.sqrt(trace)


def pool(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    """Upper triangles `[B, d (d + 1) / 2]` of descriptors `[B, N, C]`."""
    rows = []
    for descriptors in x:
        y = reduced(state, descriptors, arguments)
        rows.append(triangle(root(covariance(y), arguments['iterations'])))
    return np.array(rows)
