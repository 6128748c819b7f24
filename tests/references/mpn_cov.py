"""Slow, obvious float64 MPN-COV: one image at a time, always on the d x d side."""

from __future__ import annotations

from typing import Any

import numpy as np
from references.isqrt_cov import covariance, linear_norm


def normalize(matrix: np.ndarray, power: float, log: bool) -> np.ndarray:
    """Power, or logarithm, of a covariance."""
    s, u = np.linalg.eigh(matrix)
    s = np.maximum(s, 0)
    values = np.log(s + 1e-5 * np.trace(matrix)) if log else s**power
    return u @ np.diag(values) @ u.T


def pool(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    """Upper triangles `[B, d (d + 1) / 2]` of descriptors `[B, N, C]`."""
    rows = []
    for descriptors in x:
        y = descriptors
        if arguments['reduce_dim'] is not None:
            y = np.maximum(linear_norm(state, 'reduce', y), 0)
        matrix = normalize(covariance(y), arguments['power'], arguments['log'])
        rows.append([matrix[i, j] for i in range(len(matrix)) for j in range(i, len(matrix))])
    return np.array(rows)
