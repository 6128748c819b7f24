"""Slow, obvious float64 SimPool: every key is computed, one head at a time."""

from __future__ import annotations

from typing import Any

import numpy as np


def norm(state: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    """Layer norm of one vector."""
    normed = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
    return normed * state[f'{name}.weight'] + state[f'{name}.bias']


def softmax(scores: np.ndarray) -> np.ndarray:
    a = np.exp(scores - scores.max())
    return a / a.sum()


def pool(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    """Pooled vectors `[B, C]` of descriptors `[B, N, C]`."""
    gamma = arguments['gamma']
    rows = []
    for descriptors in x:
        y = np.stack([norm(state, 'pool.norm', descriptor) for descriptor in descriptors])
        query = state['pool.q.weight'] @ descriptors.mean(0) + state.get('pool.q.bias', 0)
        all_keys = [state['pool.k.weight'] @ row + state.get('pool.k.bias', 0) for row in y]
        parts = []
        for head in np.split(np.arange(x.shape[2]), arguments['num_heads']):
            q, keys = query[head], [key[head] for key in all_keys]
            if arguments['qk_norm']:
                q = norm(state, 'pool.q_norm', q)
                keys = [norm(state, 'pool.k_norm', key) for key in keys]
            a = softmax(np.array([q @ key for key in keys]) / np.sqrt(len(head)))
            values = y[:, head]
            if gamma is not None:
                values = (values - values.min(0) + 1e-6) ** gamma
            mean = sum(weight * value for weight, value in zip(a, values, strict=True))
            parts.append(mean if gamma is None else mean ** (1 / gamma))
        rows.append(np.concatenate(parts))
    return np.stack(rows)
