"""Differentiable pieces that two heads or more use."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

POWER_EPS = 1e-6


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: half precision is raised to float32, float64 stays float64."""
    return torch.promote_types(dtype, torch.float32)


def power_l2(z: Tensor) -> Tensor:
    """Signed square root, then L2 norm: `z' = sign(z) sqrt(|z|)`, `z' / ||z'||`.

    The gradient of the square root is infinite at zero, so `sign(z) sqrt(|z|)` becomes
    `z / sqrt(|z| + eps max|z|)`: the floor is relative to the vector's own scale, which the
    L2 norm then removes. A zero vector stays zero.

    Args:
        z: vectors `[..., D]`, float32 or better.

    Returns:
        Vectors `[..., D]` of unit length.

    Source: Perronnin, Sanchez and Mensink, ECCV 2010, sections 3.1 and 3.2.
    """
    # The result does not depend on the scale of z, so taking it out as a constant leaves the
    # gradient as it is, and keeps 1e-12 as well as 1e12 within the range of float32.
    scale = z.detach().abs().amax(-1, keepdim=True)
    z = z / torch.where(scale > 0, scale, 1.0)
    z = z * torch.rsqrt(z.abs() + POWER_EPS)
    # Unless z is zero its largest entry is 1 by now, so this floor only ever meets a zero vector.
    length: Tensor = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return z / length.clamp_min(0.5)


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A context in which autocast does not touch mathematics on the device of `x`."""
    # torch.autocast knows no 'meta' device, where nothing is computed anyway.
    return (
        nullcontext() if x.device.type == 'meta' else torch.autocast(x.device.type, enabled=False)
    )
