"""Slow, obvious float64 compact bilinear pooling: the count sketch of `x x^T`, entry by entry."""

from __future__ import annotations

from typing import Any

import numpy as np

MASK = 0xFFFFFFFF


def hashed(row: int, column: int) -> int:
    """MurmurHash3's finaliser of a key of 32 bits."""
    key = (row * 0x9E3779B1 + column) & MASK
    key = ((key ^ (key >> 16)) * 0x85EBCA6B) & MASK
    key = ((key ^ (key >> 13)) * 0xC2B2AE35) & MASK
    return key ^ (key >> 16)


def sketch(x: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    """Of descriptors `[N, C]`, the mean of the count sketches `[D]`."""
    d, seed = arguments['sketch_dim'], arguments['seed']
    z = np.zeros(d)
    for i in range(x.shape[1]):
        for j in range(x.shape[1]):
            place = (hashed(4 * seed, i) % d + hashed(4 * seed + 1, j) % d) % d
            signs = [
                -1 if hashed(4 * seed + 2 + k, c) >= 2**31 else 1 for k, c in enumerate((i, j))
            ]
            z[place] += signs[0] * signs[1] * np.mean(x[:, i] * x[:, j])
    return z


def pool(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    """Pooled vectors `[B, D]` of descriptors `[B, N, C]`."""
    rows = []
    for descriptors in x:
        z = sketch(descriptors, arguments)
        z = np.sign(z) * np.sqrt(np.abs(z))
        rows.append(z / np.linalg.norm(z))
    return np.stack(rows)
