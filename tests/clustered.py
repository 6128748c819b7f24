"""Descriptors around six centres, for heads that cluster."""

from __future__ import annotations

import torch


def data(images: int = 20, number: int = 15, channels: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(6, channels, generator=torch.Generator().manual_seed(7))
    chosen = torch.randint(6, (images, number), generator=generator)
    return (centres[chosen] + torch.randn(images, number, channels, generator=generator)).double()
