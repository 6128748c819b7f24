"""Slow, obvious float64 efficient probing: every descriptor is projected, one query at a time."""

from __future__ import annotations

from typing import Any

import numpy as np


def attention(query: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Weights `[N]` of descriptors `[N, C]` for one query."""
    scores = np.array([query @ descriptor for descriptor in x]) / np.sqrt(x.shape[1])
    a = np.exp(scores - scores.max())
    return a / a.sum()


def pool(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    """Pooled vectors `[B, C / d]` of descriptors `[B, N, C]`."""
    rows = []
    for descriptors in x:
        values = [state['value.weight'] @ descriptor for descriptor in descriptors]
        width = len(values[0]) // arguments['queries']
        row = []
        for j, query in enumerate(state['queries']):
            a = attention(query, descriptors)
            part = slice(j * width, (j + 1) * width)
            row.append(sum(weight * value[part] for weight, value in zip(a, values, strict=True)))
        rows.append(np.concatenate(row))
    return np.stack(rows)
