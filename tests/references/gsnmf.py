"""Slow, obvious float64 group-sparse non-negative matrix factorization: one image at a time."""

from __future__ import annotations

from typing import Any

import numpy as np


def features(x: np.ndarray, signed: str) -> np.ndarray:
    """Non-negative features of unit length for the descriptors `[N, C]` of one image."""
    if signed == 'relu':
        parts = np.maximum(x, 0)
    elif signed == 'softplus':
        parts = np.log1p(np.exp(x))
    else:
        parts = np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)], axis=1)
    pooled = parts.mean(0)
    return pooled / np.linalg.norm(pooled)


def code(w: np.ndarray, x: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    """Code `[L]` of features, by multiplicative updates (eq. 6)."""
    h = np.full(w.shape[1], w.shape[1] ** -0.5)
    for _ in range(arguments['updates']):
        below = w.T @ (w @ h) + arguments['l2_penalty'] * h + arguments['l1_penalty']
        h = h * (w.T @ x) / below
    return h


def objective(w: np.ndarray, x: np.ndarray, h: np.ndarray, l2: float, l1: float) -> float:
    """Eq. 2 for one image."""
    return float(0.5 * np.sum((x - w @ h) ** 2) + 0.5 * l2 * np.sum(h**2) + l1 * np.sum(h))


def pool(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    """Codes `[B, L]` of descriptors `[B, N, C]`."""
    w = state['basis']
    return np.stack([code(w, features(image, arguments['signed']), arguments) for image in x])


def loss(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> float:
    """Mean of eq. 2 over images."""
    w, values = state['basis'], []
    for image in x:
        f = features(image, arguments['signed'])
        h = code(w, f, arguments)
        values.append(objective(w, f, h, arguments['l2_penalty'], arguments['l1_penalty']))
    return float(np.mean(values))


def update(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    """The basis after one round of eq. 6 on a mini-batch `[B, N, C]`, with unit columns."""
    w = state['basis']
    rows = np.stack([features(image, arguments['signed']) for image in x]).T  # X of the paper
    h = pool(state, x, arguments).T
    w = w * (rows @ h.T) / (w @ h @ h.T)
    return w / np.linalg.norm(w, axis=0)
