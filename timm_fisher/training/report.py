"""What a run reports: its command, its curve, its use of memory."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import torch
from accelerate import Accelerator

from timm_fisher.files import save_png
from timm_fisher.training.config import Config, Stage
from timm_fisher.training.data import (
    Cached,
    Images,
)

matplotlib.use('Agg')
import matplotlib.pyplot as plt

AnyDataset = Images | Cached



def _peak_memory(device: torch.device) -> int:
    """Bytes allocated on the GPU, or, on a CPU, resident of this process; 0 on Windows, which does
    not tell."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == 'win32':
        return 0
    import resource

    unit = 1 if sys.platform == 'darwin' else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _head_names(config: Config) -> str:
    if isinstance(config.head, str):
        return config.head
    return ' + '.join(each.get('name', '?') for each in config.head)


def command(config: Config, accelerator: Accelerator) -> str:
    """The command that repeats a run, with whatever configuration file it was started; PATH stands
    for the images, and a backbone's folder outside of the working directory has its name alone."""
    settings = asdict(config)
    for name, default in asdict(Config()).items():
        if settings[name] == default or name in ('output', 'resume', 'cache_dir'):
            del settings[name]
    settings['stages'] = {
        name: {key: value for key, value in asdict(stage).items() if value != getattr(Stage(), key)}
        for name, stage in config.stages.items()
    }
    if config.data_dir:
        settings['data_dir'] = 'PATH'
    source, _, folder = config.backbone.partition(':')
    if source == 'local-dir' and os.path.isabs(folder):
        settings['backbone'] = f'local-dir:{Path(folder).name}'
    settings['seed'] = config.seed
    if accelerator.mixed_precision != 'no':
        settings['mixed_precision'] = accelerator.mixed_precision
    parts = ['accelerate launch recipes/train.py']
    if accelerator.num_processes > 1:
        parts = [f'accelerate launch --num_processes {accelerator.num_processes} recipes/train.py']
    for name, value in settings.items():
        text = value if isinstance(value, str) else json.dumps(value)
        parts.append(f'--{name.replace("data_dir", "data-dir")} {shlex.quote(text)}')
    return ' \\\n    '.join(parts)


def _plot(history: list[dict[str, Any]], path: Path) -> None:
    """Losses and, if any stage is supervised, validation accuracy by epoch; the stages are set off
    by lines."""
    accuracies = [100 * row.get('val_accuracy', math.nan) for row in history]
    supervised = any(map(math.isfinite, accuracies))
    figure, axes = plt.subplots(1, 1 + supervised, figsize=(10, 4), squeeze=False)
    epochs = range(1, len(history) + 1)
    for key in ('train_loss', 'val_loss'):
        axes[0, 0].plot(epochs, [row[key] for row in history], label=key.replace('_', ' '))
    axes[0, 0].set(xlabel='epoch', ylabel='loss', yscale='log')
    axes[0, 0].legend()
    if supervised:
        axes[0, 1].plot(epochs, accuracies)
        axes[0, 1].set(xlabel='epoch', ylabel='validation accuracy (%)')
    for i, row in enumerate(history):
        if row['epoch'] == 1:
            for each in axes[0]:
                each.axvline(i + 0.5, color='grey', linewidth=0.8, linestyle=':')
            where = (i + 0.6, 0.02)
            axes[0, -1].annotate(row['stage'], where, xycoords=('data', 'axes fraction'))
    figure.tight_layout()
    save_png(figure, path)
