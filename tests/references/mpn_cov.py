"""Slow, obvious float64 MPN-COV: one image at a time, always on the d x d side."""

from __future__ import annotations

from typing import Any

import numpy as np
from references.isqrt_cov import covariance, reduced, triangle


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
        y = reduced(state, descriptors, arguments)
        matrix = normalize(covariance(y), arguments['power'], arguments['log'])
        rows.append(triangle(matrix))
    return np.array(rows)
