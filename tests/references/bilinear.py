"""Slow, obvious float64 bilinear pooling: the full matrix, one entry at a time."""

from __future__ import annotations

from typing import Any

import numpy as np


def full(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    """Full matrices `[B, d, d]` of descriptors `[B, N, C]`, normalised as `arguments` say."""
    matrices = []
    for descriptors in x:
        matrix = 0
        for descriptor in descriptors:
            y = state['reduce.weight'] @ descriptor if 'reduce.weight' in state else descriptor
            matrix = matrix + np.outer(y, y) / len(descriptors)
        if arguments.get('normalize', True):
            matrix = np.sign(matrix) * np.sqrt(np.abs(matrix))
            matrix = matrix / np.sqrt((matrix**2).sum())
        matrices.append(matrix)
    return np.stack(matrices)


def pool(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    """Upper triangles `[B, d (d + 1) / 2]` whose inner products are those of the matrices."""
    rows = []
    for matrix in full(state, x, arguments):
        row = []
        for i in range(len(matrix)):
            row.append(matrix[i, i])
            row += [np.sqrt(2) * matrix[i, j] for j in range(i + 1, len(matrix))]
        rows.append(np.array(row))
    return np.stack(rows)
