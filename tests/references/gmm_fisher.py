"""Slow, obvious float64 Fisher vector of a Gaussian mixture: one descriptor at a time."""

from __future__ import annotations

from typing import Any

import numpy as np


def parameters(state: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """pi `[K]`, mu `[K, D]` and sigma `[K, D]`."""
    weights = np.exp(state['log_weights'] - state['log_weights'].max())
    return weights / weights.sum(), state['means'], np.exp(state['log_stds'])


def densities(state: dict[str, np.ndarray], y: np.ndarray) -> np.ndarray:
    """`log(pi_k) + log N(y; mu_k, sigma_k)` `[K]` of one reduced descriptor `[D]`."""
    pi, mu, sigma = parameters(state)
    gaussians = -0.5 * ((y - mu) / sigma) ** 2 - np.log(sigma) - 0.5 * np.log(2 * np.pi)
    return np.log(pi) + gaussians.sum(1)


def reduced(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    """y `[D]` of one descriptor `[C]`."""
    if arguments['l2_descriptors']:
        x = x / np.linalg.norm(x)
    return state['reduce.weight'] @ x + state['reduce.bias']


def pool(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    """Fisher vectors `[B, 2 K D]` of descriptors `[B, N, C]` (eqs. 1 to 3)."""
    pi, mu, sigma = parameters(state)
    rows = []
    for descriptors in x:
        f, g = 0, 0
        for descriptor in descriptors:
            y = reduced(state, descriptor, arguments)
            log_density = densities(state, y)
            gamma = np.exp(log_density - log_density.max())
            gamma = (gamma / gamma.sum())[:, None]
            alpha = (y - mu) / sigma
            f = f + gamma * alpha / np.sqrt(pi)[:, None] / len(descriptors)
            g = g + gamma * (alpha**2 - 1) / np.sqrt(2 * pi)[:, None] / len(descriptors)
        psi = np.concatenate([f.ravel(), g.ravel()])
        if arguments['normalize']:
            psi = np.sign(psi) * np.sqrt(np.abs(psi)) / np.sqrt(np.abs(psi).sum())
        rows.append(psi)
    return np.stack(rows)
