"""Slow, obvious float64 SMSO: one direction and one descriptor at a time."""

from __future__ import annotations

from typing import Any

import numpy as np


def pool(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    """Pooled vectors `[B, features]` of descriptors `[B, N, C]`."""
    rows = []
    for descriptors in x:
        z = []
        for j, w in enumerate(state['directions.weight']):
            v = np.mean([(w @ descriptor) ** 2 for descriptor in descriptors])
            z.append(state['scale'][j] * np.sqrt(v) + state['offset'][j])
        rows.append(z)
    return np.array(rows)
