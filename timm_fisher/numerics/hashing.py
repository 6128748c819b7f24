"""Pseudorandom numbers that are the same on every machine, whatever PyTorch's generators do."""

from __future__ import annotations

import torch
from torch import Tensor


def scatter(rows: Tensor, number: int) -> Tensor:
    """Pseudorandom int64 `[B, number]`, from 0 to 2^32 - 1, that depend on a row's number and on
    the column alone: the low 32 bits of MurmurHash3's finaliser. `rows` is int64 `[B]`."""
    keys = rows[:, None] * 0x9E3779B1 + torch.arange(number, device=rows.device)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        keys = keys & 0xFFFFFFFF
        keys = (keys ^ (keys >> shift)) * factor
    return keys & 0xFFFFFFFF
