"""Accelerate, for the devices and the precision that a recipe was launched for."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedDataParallelKwargs

from timm_fisher.training.config import Config


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
