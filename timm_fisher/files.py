"""Files that are either old or new, never half written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor


def write(path: Path, text: str) -> None:
    """Write beside, then rename."""
    beside = path.with_name(f'.{path.name}.partial')
    beside.write_text(text, encoding='utf-8')
    os.replace(beside, path)


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Make a folder for results of these settings; ValueError if it holds results of others."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'config.yaml'
    if path.exists() and yaml.safe_load(path.read_text(encoding='utf-8')) != settings:
        raise ValueError(f"'{folder}' holds results of other settings, see {path}. Give another.")
    write(path, yaml.safe_dump(settings, sort_keys=False))


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Save beside, then rename, as safetensors with texts in its header."""
    from safetensors.torch import save_file

    beside = path.with_name(f'.{path.name}.partial')
    beside.touch()
    mode = beside.stat().st_mode  # what the user wants; safetensors makes its file private
    save_file(tensors, beside, metadata)
    beside.chmod(mode)
    os.replace(beside, path)


def save_png(figure: Figure, path: Path) -> None:
    """Save beside, then rename; the figure is closed."""
    import matplotlib.pyplot as plt

    beside = path.with_name(f'.{path.name}')
    figure.savefig(beside, format='png', dpi=120)
    plt.close(figure)
    os.replace(beside, path)
