"""Slow, obvious float64 average pooling."""

from __future__ import annotations

from typing import Any

import numpy as np


def pool(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    """Pooled vectors `[B, C]` of descriptors `[B, N, C]`."""
    rows = []
    for descriptors in x:
        z = sum(descriptors) / len(descriptors)
        if arguments.get('normalize'):
            z = np.array([np.sign(value) * np.sqrt(abs(value)) for value in z])
            z = z / np.sqrt(sum(z**2))
        rows.append(z)
    return np.stack(rows)
