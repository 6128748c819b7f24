"""Slow, obvious float64 3G: one image at a time, always on the d x d side."""

from __future__ import annotations

from typing import Any

import numpy as np
from references.isqrt_cov import covariance, linear_norm, root


def shrunk_root(matrix: np.ndarray, shrinkage: float) -> np.ndarray:
    """Theorem 1, by the eigenvalues of the d x d matrix."""
    s, u = np.linalg.eigh(matrix)
    c = (1 - shrinkage) / (2 * shrinkage)
    return u @ np.diag(np.sqrt(c**2 + s / shrinkage) - c) @ u.T


def pool(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    """Lower triangles `[B, d (d + 1) / 2]` of descriptors `[B, N, C]`."""
    rows = []
    for descriptors in x:
        x0 = np.maximum(linear_norm(state, 'reduce', descriptors), 0)
        y = x0
        for block in range(arguments['blocks']):
            part = {
                key.removeprefix(f'blocks.{block}.'): value
                for key, value in state.items()
                if key.startswith(f'blocks.{block}.')
            }
            product = linear_norm(part, 'left', y) * linear_norm(part, 'right', y)
            z = np.maximum(product + linear_norm(part, 'skip', x0), 0)
            z = np.maximum(linear_norm(part, 'project_left', z), 0) * np.maximum(
                linear_norm(part, 'project_right', z), 0
            )
            score = np.maximum(linear_norm(part, 'squeeze', z), 0) @ part['score.weight'].T
            y = y / (1 + np.exp(-(1 + part['scale']) * score))
        matrix = covariance(y) + 1e-7 * np.eye(y.shape[1])
        if arguments['shrinkage'] == 1:
            matrix = root(matrix, arguments['iterations'])
        else:
            matrix = shrunk_root(matrix, arguments['shrinkage'])
        rows.append([matrix[i, j] for i in range(len(matrix)) for j in range(i + 1)])
    return np.array(rows)
