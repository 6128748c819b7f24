"""Numbers that random choices depend on."""

from __future__ import annotations

import pytest
import torch

from timm_fisher.numerics.hashing import numbers_of_contents, numbers_of_names, shuffle_key


def test_shuffle_key_is_splitmix64():
    """The generator's published numbers from the state 1234567; its states are 0x9E37... apart."""
    gamma = 0x9E3779B97F4A7C15 - 2**64
    states = 1234567 + gamma * torch.arange(5)
    keys = [key % 2**64 for key in shuffle_key(states).tolist()]
    assert keys == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
        16408922859458223821,
    ]  # fmt: skip


def test_names():
    numbers = numbers_of_names([f'class/{i}' for i in range(1000)])
    assert len(numbers.unique()) == 1000
    assert torch.equal(numbers_of_names(['class/7', 'class/3']), numbers[[7, 3]])


@pytest.mark.parametrize('dtype', [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_contents(dtype):
    """Not what else is in the batch, or how it lies in memory."""
    x = torch.randint(0, 255, (50, 3, 5, 7), generator=torch.Generator().manual_seed(0)).to(dtype)
    numbers = numbers_of_contents(x)
    assert len(numbers.unique()) == 50
    assert torch.equal(numbers_of_contents(x[[4, 2]]), numbers[[4, 2]])
    as_channels_last = x.to(memory_format=torch.channels_last)
    assert torch.equal(numbers_of_contents(as_channels_last), numbers)
    x[0, 2, 4, 6] += 1
    assert (numbers_of_contents(x) == numbers).tolist() == [False, *[True] * 49]
