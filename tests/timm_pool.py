"""Heads that hold a pool of timm's, `head.pool`, against that pool itself."""

from __future__ import annotations

import torch
from torch import nn


def check_equals_timm(head: nn.Module, dtype: torch.dtype) -> None:
    """Output and gradients, with the same weights; for 24 channels."""
    x = torch.randn(3, 10, 24, dtype=dtype)
    results = []
    for module in (head, head.pool):
        head.zero_grad()
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        (out * torch.linspace(-1, 1, out.shape[1], dtype=dtype)).sum().backward()
        results.append([out, leaf.grad, *(parameter.grad for parameter in head.parameters())])
    (ours, *our_gradients), (theirs, *their_gradients) = results
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(our_gradients, their_gradients, rtol=tolerance, atol=tolerance)
