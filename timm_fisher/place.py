"""Device and dtype at the creation of a model, as `timm.create_model` takes them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

Model = TypeVar('Model', bound=nn.Module)


def with_place(build: Callable[..., Model]) -> Callable[..., Model]:
    """Give a function that builds a model the arguments `device` and `dtype` of its tensors."""

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
