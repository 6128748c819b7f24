"""Slow, obvious float64 improved deep Fisher vector, and a Boltzmann machine by enumeration."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import numpy as np
from scipy.optimize import minimize


def logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def posteriors(state: dict[str, np.ndarray], v: np.ndarray, steps: int) -> list[np.ndarray]:
    """Mean field of each hidden layer for one visible vector `[C]`."""
    w1, b1 = state['weights.0'], state['biases.0']
    if 'weights.1' not in state:
        return [logistic(w1.T @ v + b1)]
    w2, b2 = state['weights.1'], state['biases.1']
    mu1 = logistic(2 * w1.T @ v + b1)
    mu2 = logistic(w2.T @ mu1 + b2)
    for _ in range(steps):
        mu1 = logistic(w1.T @ v + w2 @ mu2 + b1)
        mu2 = logistic(w2.T @ mu1 + b2)
    return [mu1, mu2]


def pool(
    state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any], improved: bool = True
) -> np.ndarray:
    """Pooled vectors of descriptors `[B, N, C]`."""
    rows = []
    for descriptors in x:
        v = descriptors.mean(0)
        if 'centre' in state:
            v = logistic((v - state['centre']) / state['deviation'])
        layers = [v, *posteriors(state, v, arguments['mean_field_steps'])]
        moments = [np.outer(a, b).ravel() for a, b in pairwise(layers)]
        low, high = state['low'], state['high']
        phi = np.clip((np.concatenate(moments) - low) / np.maximum(high - low, 1e-3), 0, 1)
        phi /= np.linalg.norm(phi)
        if arguments['whiten'] and improved:
            largest = state['variances'].max()
            rotated = state['axes'].T @ phi
            for k, variance in enumerate(state['variances'] + arguments['ridge'] * largest):
                kept = variance > np.finfo(np.float32).eps * largest
                rotated[k] = rotated[k] / np.sqrt(variance) if kept else 0.0
            phi = rotated
        rows.append(phi)
    return np.stack(rows)


def states(sizes: list[int]) -> list[np.ndarray]:
    """Every state of all layers: for each layer `[states, size]`."""
    every = np.array(list(product((0.0, 1.0), repeat=sum(sizes))))
    return np.split(every, np.cumsum(sizes)[:-1], axis=1)


def negative_energy(
    layers: list[np.ndarray], weights: list[np.ndarray], biases: list[np.ndarray]
) -> np.ndarray:
    """`[states]` of layers `[states, size]`."""
    total = sum(layer @ bias for layer, bias in zip(layers, biases, strict=True))
    for below, weight, above in zip(layers, weights, layers[1:], strict=False):
        total = total + ((below @ weight) * above).sum(1)
    return total


def log_likelihood(
    v: np.ndarray, weights: list[np.ndarray], biases: list[np.ndarray]
) -> np.ndarray:
    """log p(v) of visible vectors `[B, C]`, by summing over every state of the other units."""
    sizes = [len(bias) for bias in biases]
    hidden = states(sizes[1:])
    log_z = np.log(np.exp(negative_energy(states(sizes), weights, biases)).sum())
    rows = [
        np.log(
            np.exp(
                negative_energy([np.tile(row, (len(hidden[0]), 1)), *hidden], weights, biases)
            ).sum()
        )
        for row in v
    ]
    return np.array(rows) - log_z


def score(v: np.ndarray, weights: list[np.ndarray], biases: list[np.ndarray]) -> np.ndarray:
    """Gradient of log p(v) `[B, ...]` with respect to the weights, by central differences."""
    out = []
    for j, weight in enumerate(weights):
        for index in np.ndindex(weight.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [w.copy() for w in weights]
                moved[j][index] += step
                ends.append(log_likelihood(v, moved, biases))
            out.append((ends[0] - ends[1]) / 2e-5)
    return np.stack(out, 1)


def model_moments(weights: list[np.ndarray], biases: list[np.ndarray]) -> np.ndarray:
    """Expectations of v h1^T | h1 h2^T under the model."""
    every = states([len(bias) for bias in biases])
    chance = np.exp(negative_energy(every, weights, biases))
    chance /= chance.sum()
    return np.concatenate(
        [(chance[:, None] * below).T.dot(above).ravel() for below, above in pairwise(every)]
    )


def statistics(layers: list[np.ndarray]) -> np.ndarray:
    """What the parameters multiply: `v h1^T | h1 h2^T | v | h1 | h2` of layers `[n, size]`."""
    pairs = pairwise(layers)
    products = [(a[:, :, None] * b[:, None, :]).reshape(len(a), -1) for a, b in pairs]
    return np.concatenate([*products, *layers], 1)


def log_likelihood_and_gradient(
    parameters: np.ndarray, share: np.ndarray, every: np.ndarray
) -> tuple[float, np.ndarray]:
    """Mean log-likelihood of data that have each visible state with frequency `share`, and its
    gradient: the moments of the data, with exact posteriors, minus those of the model. `every`
    holds the statistics of all states."""
    joint = (every @ parameters).reshape(len(share), -1)  # by visible state and hidden state
    joint -= joint.max()
    visible = np.logaddexp.reduce(joint, 1)
    log_z = np.logaddexp.reduce(visible)
    clamped = share[:, None] * np.exp(joint - visible[:, None])
    gradient = (clamped - np.exp(joint - log_z)).ravel() @ every
    return float(share @ visible - log_z), gradient


def best_log_likelihood(share: np.ndarray, every: np.ndarray, starts: int = 4) -> float:
    """The largest mean log-likelihood that L-BFGS finds from several random starts."""

    def falling(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = log_likelihood_and_gradient(parameters, share, every)
        return -value, -gradient

    rng = np.random.default_rng(0)
    starts_at = rng.normal(size=(starts, every.shape[1]))
    ends = [minimize(falling, start, jac=True, method='L-BFGS-B') for start in starts_at]
    return -min(end.fun for end in ends)
