"""Models on a device; on a CPU at the speed that it has."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from typing import TypeVar

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from timm_fisher.training.config import Config

Model = TypeVar('Model', bound=nn.Module)
# Of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
INT_MAX = 2**31 - 1


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


def create_accelerator(config: Config) -> Accelerator:
    """Accelerate, for the devices and the precision that the run was launched for.

    Raises:
        ValueError: it was launched to shard the model.
    """
    for name in ('FSDP', 'DEEPSPEED', 'MEGATRON_LM', 'PARALLELISM_CONFIG'):
        if os.environ.get(f'ACCELERATE_USE_{name}', '').lower() == 'true':
            raise ValueError(
                f'This run was launched with {name}: recipes keep the whole model on each device '
                '(DDP). Launch without it. A large backbone takes least memory frozen, or by lora.'
            )
    # An unsupervised loss need not depend on all that the stage trains.
    unsupervised = any(stage.unsupervised for stage in config.stages.values())
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.grad_accum_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unsupervised)],
    )
    # Checkpoints hold the weights in timm's form, once.
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
    use_all_cores(accelerator)
    return accelerator


def use_all_cores(accelerator: Accelerator) -> None:
    """On a CPU, share its cores out over the processes of this machine: `accelerate launch` gives
    each of them one thread unless it is told otherwise."""
    launched = 'ACCELERATE_MIXED_PRECISION' in os.environ
    if accelerator.device.type == 'cpu' and launched and os.environ.get('OMP_NUM_THREADS') == '1':
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        processes = int(os.environ.get('LOCAL_WORLD_SIZE', accelerator.num_processes))
        torch.set_num_threads(max(1, (cpus or 1) // processes))
