"""Files that are either old or new, never half written: for all recipes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import yaml
from matplotlib.figure import Figure


def write(path: Path, text: str) -> None:
    """Write beside, then rename."""
    beside = path.with_name(f'.{path.name}.partial')
    beside.write_text(text)
    os.replace(beside, path)


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Make a folder for results of these settings, or refuse to go on in one of others."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'config.yaml'
    if path.exists() and yaml.safe_load(path.read_text()) != settings:
        raise ValueError(f"'{folder}' holds results of other settings, see {path}. Give another.")
    write(path, yaml.safe_dump(settings, sort_keys=False))


def save_png(figure: Figure, path: Path) -> None:
    """Save beside, then rename; the figure is closed."""
    beside = path.with_name(f'.{path.name}')
    figure.savefig(beside, format='png', dpi=120)
    plt.close(figure)
    os.replace(beside, path)
