"""Slow, obvious float64 sparse-coding Fisher vector: one descriptor at a time."""

from __future__ import annotations

from typing import Any

import numpy as np


def soft_threshold(v: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    return np.sign(v) * np.maximum(np.abs(v) - threshold, 0)


def lista(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> tuple:
    """Reduced descriptor `[d]` and its code `[m]`, for one descriptor `[C]`."""
    y = state['reduce.weight'] @ x / state['reduce.scale'] + state['reduce.bias']
    dictionary = state['dictionary']
    if arguments.get('tied'):
        step = 1 / (2 * np.linalg.eigvalsh(dictionary.T @ dictionary).max())
        w = 2 * step * dictionary.T
        s = np.eye(dictionary.shape[1]) - 2 * step * dictionary.T @ dictionary
        threshold = arguments['sparsity'] * step
    else:
        w, s = state['encoder'], state['lateral']
        threshold = np.exp(state['log_threshold'])
    u = soft_threshold(w @ y, threshold)
    for _ in range(arguments['iterations']):
        u = soft_threshold(s @ u + w @ y, threshold)
    return y, u


def pool(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    """Fisher vectors `[B, d * m]` of descriptors `[B, N, C]` (eq. 4)."""
    rows = []
    for descriptors in x:
        g = 0
        for descriptor in descriptors:
            y, u = lista(state, descriptor, arguments)
            g = g + np.outer(y - state['dictionary'] @ u, u) / len(descriptors)
        z = g.ravel()
        if arguments.get('normalize', True):
            z = np.sign(z) * np.sqrt(np.abs(z))
            z = z / np.linalg.norm(z)
        rows.append(z)
    return np.stack(rows)


def loss(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> float:
    """Mean of `|y - B u|^2 + sparsity |u|_1` over all descriptors (eq. 1)."""
    values = []
    for descriptor in x.reshape(-1, x.shape[-1]):
        y, u = lista(state, descriptor, arguments)
        error = y - state['dictionary'] @ u
        values.append(error @ error + arguments['sparsity'] * np.abs(u).sum())
    return float(np.mean(values))
