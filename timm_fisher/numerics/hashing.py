"""Pseudorandom numbers that are the same on every machine, whatever PyTorch's generators do."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

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


def shuffle_key(numbers: Tensor) -> Tensor:
    """Pseudorandom int64, different for different numbers: the finaliser of SplitMix64, with
    arithmetic modulo 2^64. To sort by it is to shuffle."""
    keys = numbers + _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        keys = (keys ^ ((keys >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return keys


def numbers_of_names(names: Iterable[str]) -> Tensor:
    """An int64 for each name, from 8 bytes of its BLAKE2 digest."""
    digests = [
        hashlib.blake2b(n.encode(errors='surrogateescape'), digest_size=8).digest() for n in names
    ]
    return torch.tensor([int.from_bytes(d, 'little', signed=True) for d in digests])


def numbers_of_contents(x: Tensor) -> Tensor:
    """An int64 for each row of `x` `[B, ...]`, on the CPU, that depends on its bits alone."""
    bits = x.flatten(1).contiguous().view(torch.uint8 if x.element_size() == 1 else torch.int16)
    weights = shuffle_key(torch.arange(bits.shape[1], device=x.device))
    return torch.stack([(row.long() * weights).sum() for row in bits]).cpu()


def _signed(number: int) -> int:
    """Of 64 bits, as int64 has it."""
    return number - (1 << 64) if number >= 1 << 63 else number
