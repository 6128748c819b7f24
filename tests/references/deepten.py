"""Slow, obvious float64 Deep TEN: one descriptor and one code at a time."""

from __future__ import annotations

from typing import Any

import numpy as np


def weights(state: dict[str, np.ndarray], y: np.ndarray) -> np.ndarray:
    """Weights `[K]` of the codes for y."""
    s = np.exp(state['log_smoothing'])
    logits = np.array([-s[k] * np.sum((y - c) ** 2) for k, c in enumerate(state['codes'])])
    a = np.exp(logits - logits.max())
    return a / a.sum()


def pool(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    """Pooled vectors `[B, K * d]` of descriptors `[B, N, C]`."""
    rows = []
    for descriptors in x:
        e = np.zeros_like(state['codes'])
        for descriptor in descriptors:
            y = state['reduce.weight'] @ descriptor + state['reduce.bias']
            a = weights(state, y)
            for k, c in enumerate(state['codes']):
                e[k] += a[k] * (y - c) / len(descriptors)
        rows.append(e.ravel() / np.linalg.norm(e))
    return np.stack(rows)
