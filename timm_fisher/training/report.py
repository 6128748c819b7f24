"""What a run says of itself: metrics.json, which may be published, so nothing in it tells of this
machine's folders; the command that repeats the run; the curve."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure

import timm_fisher
from timm_fisher import PooledModel
from timm_fisher.files import save_png
from timm_fisher.hub.card import installed_versions
from timm_fisher.hub.text import hide_paths
from timm_fisher.specification import parse_heads
from timm_fisher.training.benchmark import peak_resident
from timm_fisher.training.config import Config, Stage


def describe(config: Config, model: PooledModel, accelerator: Accelerator) -> dict[str, Any]:
    """What metrics.json says of a run, besides its results."""
    total, backbone = (sum(p.numel() for p in m.parameters()) for m in (model, model.backbone))
    device = accelerator.device
    on_gpu = device.type == 'cuda'
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else peak_resident()
    keys = ('head', 'head_kwargs', 'backbone', 'backbone_stage', 'dataset', 'seed')
    settings = {key: getattr(config, key) for key in keys}
    if config.dataset == 'npz':  # as of a folder: its name need not be the data set's
        settings['dataset'] = ''
    return {
        **hide_paths(settings),
        'out_features': model.head_hidden_size,
        'parameters': total,
        'head_parameters': total - backbone,
        'peak_memory_mb': round(peak / 2**20),
        'processes': accelerator.num_processes,
        'device': str(device),
        'command': command(config, accelerator.mixed_precision, accelerator.num_processes),
        'commit': COMMIT,
        'versions': installed_versions(),
    }


def head_names(config: Config) -> str:
    """`avg + sparse_fisher@-2`."""
    heads = parse_heads(config.head, config.head_kwargs, config.backbone_stage)
    return ' + '.join(map(str, heads))


def data_name(config: Config) -> str:
    """Name of the data set, or of its folder."""
    named = config.dataset not in ('', 'npz')
    name = config.dataset if named else Path(config.data_dir).resolve().name
    return str(hide_paths(name))


def _git(*arguments: str) -> str:
    folder = str(Path(__file__).parent)
    try:
        done = subprocess.run(
            ['git', '-C', folder, *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ''
    return done.stdout.strip()


def _commit() -> str:
    """Of the checkout that the package is in, `-dirty` if files differ from it; empty where the
    package is installed, be it inside the checkout of something else."""
    top = _git('rev-parse', '--show-toplevel')
    if not top or Path(top).resolve() != Path(timm_fisher.__file__).resolve().parents[1]:
        return ''
    return _git('describe', '--always', '--dirty', '--exclude', '*')


# As the code is imported: somebody may commit while it runs.
COMMIT = _commit()


def command(config: Config, mixed_precision: str, processes: int) -> str:
    """The command that repeats a run, without its configuration file; PATH stands for the images,
    and of other folders only the last name is left."""
    settings = _changed(config)
    for key in config.of_no_consequence:
        settings.pop(key, None)
    if config.data_dir:
        settings['data_dir'] = 'PATH'
    settings['stages'] = {name: _changed(stage) for name, stage in config.stages.items()}
    settings['seed'] = config.seed
    if mixed_precision != 'no':
        settings['mixed_precision'] = mixed_precision
    option = f' --num_processes {processes}' if processes > 1 else ''
    parts = [f'accelerate launch{option} recipes/train.py']
    for name, value in hide_paths(settings).items():
        text = value if isinstance(value, str) else json.dumps(value)
        parts.append(f'--{name.replace("data_dir", "data-dir")} {shlex.quote(text)}')
    return ' \\\n    '.join(parts)


def _changed(settings: Config | Stage) -> dict[str, Any]:
    default = asdict(type(settings)())
    return {key: value for key, value in asdict(settings).items() if value != default[key]}


def draw_curve(history: list[dict[str, Any]], path: Path) -> None:
    """Losses and, if any stage is supervised, validation accuracy by epoch, with the stages."""
    accuracies = [100 * row.get('val_accuracy', math.nan) for row in history]
    supervised = any(map(math.isfinite, accuracies))
    figure = Figure(figsize=(10, 4))
    axes = figure.subplots(1, 1 + supervised, squeeze=False)[0]
    epochs = range(1, len(history) + 1)
    for key in ('train_loss', 'val_loss'):
        axes[0].plot(epochs, [row[key] for row in history], label=key.replace('_', ' '))
    axes[0].set(xlabel='epoch', ylabel='loss', yscale='log')
    axes[0].legend()
    if supervised:
        axes[1].plot(epochs, accuracies)
        axes[1].set(xlabel='epoch', ylabel='validation accuracy (%)')
    for i, row in enumerate(history):
        if row['epoch'] == 1:
            for plot in axes:
                plot.axvline(i + 0.5, color='grey', linewidth=0.8, linestyle=':')
            axes[-1].annotate(row['stage'], (i + 0.6, 0.02), xycoords=('data', 'axes fraction'))
    figure.tight_layout()
    save_png(figure, path)


def one_line(results: dict[str, Any]) -> str:
    """Results as a text: `val loss 0.1234, val accuracy 98.76%`."""
    forms = {k: '.4g' if isinstance(v, float) else '' for k, v in results.items()}
    forms |= {k: '.2%' for k in forms if 'accuracy' in k or 'recall' in k}
    return ', '.join(f'{k.replace("_", " ")} {v:{forms[k]}}' for k, v in results.items())
