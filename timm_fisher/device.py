"""Models on a device, from their creation on; on a CPU at the speed that it has."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

Model = TypeVar('Model', bound=nn.Module)
# Of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
INT_MAX = 2**31 - 1


def with_device_and_dtype(build: Callable[..., Model]) -> Callable[..., Model]:
    """Give a function that builds a model the arguments `device` and `dtype` of its tensors, as
    `timm.create_model` takes them."""

    @functools.wraps(build)
    def call(
        *args: Any,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **arguments: Any,
    ) -> Model:
        with nullcontext() if device is None else torch.device(device):
            model = build(*args, **arguments)
        return model if dtype is None else model.to(dtype=dtype)

    return call


def to_device(model: Model, device: torch.device | str) -> Model:
    """Move a model to a device.

    Its convolutions get the memory format channels_last, which their outputs then have, and on a
    CPU this process keeps the memory that it frees. A float32 result stays the same up to rounding.

    Args:
        model: is changed, and returned.
        device: cpu, cuda, cuda:1, ...
    """
    if torch.device(device).type == 'cpu':
        _keep_freed_memory()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return model.to(device)


@functools.cache
def _keep_freed_memory() -> None:
    """Tell glibc to keep the memory that this process frees, for good, and to use it again. By
    default it gives every large tensor back to the kernel, which clears its pages anew for the next
    one: half of the time of a small model. Loader workers inherit the setting. Other C libraries
    have no `mallopt`, or do not need it."""
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if mallopt is not None:
        # Before 2.35 the largest threshold was 32 MiB: then no memory is mapped for one tensor.
        if not mallopt(M_MMAP_THRESHOLD, INT_MAX):
            mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never
