"""Slow, obvious float64 hybrid sparse-coding Fisher vector: one descriptor at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from references.sparse_fisher import lista


def codes(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> tuple:
    """Both codes of one descriptor `[C]`, and what they leave of it."""
    left = state['reduce.weight'] @ x / state['reduce.scale'] + state['reduce.bias']
    found = []
    for name in ('common', 'residual'):
        part = {
            key.removeprefix(f'{name}.'): value
            for key, value in state.items()
            if key.startswith(f'{name}.')
        }
        same = {'reduce.weight': np.eye(len(left)), 'reduce.scale': 1, 'reduce.bias': 0 * left}
        _, u = lista({**part, **same}, left, {'iterations': arguments['iterations']})
        left = left - part['dictionary'] @ u
        found.append(u)
    return *found, left


def pool(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    """Fisher vectors `[B, d * (m + n)]` of descriptors `[B, N, C]`."""
    rows = []
    for descriptors in x:
        common, residual = 0, 0
        for descriptor in descriptors:
            u, v, error = codes(state, descriptor, arguments)
            common = common + np.outer(error, u) / len(descriptors)
            residual = residual + np.outer(error, v) / len(descriptors)
        z = np.concatenate([common.ravel(), residual.ravel()])
        z = np.sign(z) * np.sqrt(np.abs(z))
        rows.append(z / np.linalg.norm(z))
    return np.stack(rows)


def loss(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> float:
    """Mean of `|e|^2 + sparsity (|u|_1 + |v|_1)` over all descriptors."""
    values = []
    for descriptor in x.reshape(-1, x.shape[-1]):
        u, v, error = codes(state, descriptor, arguments)
        values.append(error @ error + arguments['sparsity'] * (np.abs(u).sum() + np.abs(v).sum()))
    return float(np.mean(values))
