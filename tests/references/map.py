"""Slow, obvious float64 MAP: every key and value is computed, one latent and head at a time."""

from __future__ import annotations

from math import erf
from typing import Any

import numpy as np


def linear(state: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    """The layer of this name, of one vector; x itself where there is no such layer."""
    if f'{name}.weight' not in state:
        return x
    return state[f'{name}.weight'] @ x + state.get(f'{name}.bias', 0)


def norm(state: dict[str, np.ndarray], name: str, kind: str, x: np.ndarray) -> np.ndarray:
    """timm's norm of one vector."""
    if kind == '':
        return x
    weight = state[f'{name}.weight']
    if kind == 'rmsnorm':
        return x / np.sqrt((x**2).mean() + 1e-6) * weight
    eps = 1e-5 if kind == 'torch' else 1e-6
    return (x - x.mean()) / np.sqrt(x.var() + eps) * weight + state[f'{name}.bias']


def gelu(x: np.ndarray) -> np.ndarray:
    return np.array([value * (1 + erf(value / np.sqrt(2))) / 2 for value in x])


def softmax(scores: np.ndarray) -> np.ndarray:
    a = np.exp(scores - scores.max())
    return a / a.sum()


def attend(
    state: dict[str, np.ndarray], latent: np.ndarray, x: np.ndarray, arguments: dict[str, Any]
) -> np.ndarray:
    """The heads' means of the values `[C]`, side by side, for descriptors `[N, C]`."""
    channels, heads = x.shape[1], arguments['num_heads']
    kv = [linear(state, 'pool.kv', descriptor) for descriptor in x]
    query = linear(state, 'pool.q', latent)
    out = []
    for head in np.split(np.arange(channels), heads):
        q, keys = query[head], [row[head] for row in kv]
        values = [row[channels + head] for row in kv]
        if arguments['qk_norm']:
            kind = arguments['norm_layer'] or 'torch'
            q = norm(state, 'pool.q_norm', kind, q)
            keys = [norm(state, 'pool.k_norm', kind, key) for key in keys]
        a = softmax(np.array([q @ key for key in keys]) / np.sqrt(len(head)))
        out.append(sum(weight * value for weight, value in zip(a, values, strict=True)))
    return np.concatenate(out)


def pool(state: dict[str, np.ndarray], x: np.ndarray, arguments: dict[str, Any]) -> np.ndarray:
    """Pooled vectors `[B, out_features]` of descriptors `[B, N, C]`."""
    rows = []
    for descriptors in x:
        results = []
        for latent in state['pool.latent'][0]:
            y = linear(state, 'pool.proj', attend(state, latent, descriptors, arguments))
            if arguments['out_features'] != 0:
                normed = norm(state, 'pool.norm', arguments['norm_layer'], y)
                hidden = gelu(linear(state, 'pool.mlp.fc1', normed))
                y = y + linear(state, 'pool.mlp.fc2', hidden)
            results.append(y)
        rows.append(results[0] if arguments['pool_type'] == 'token' else np.mean(results, axis=0))
    return np.stack(rows)
