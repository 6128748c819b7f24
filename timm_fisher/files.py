"""Files that are either old or new, never half written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor


@contextmanager
def replacing(path: Path, ending: str = '') -> Iterator[Path]:
    """A file beside `path`, to write to, which then takes its place; on an error it is deleted. Its
    name is that of `path` with an ending."""
    beside = path.with_name(f'.{path.name}{ending}.partial')
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write(path: Path, text: str) -> None:
    """A text, as a whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding='utf-8')


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Make a folder for results of these settings; ValueError if it holds results of others."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'config.yaml'
    if path.exists() and yaml.safe_load(path.read_text(encoding='utf-8')) != settings:
        raise ValueError(f"'{folder}' holds results of other settings, see {path}. Give another.")
    write(path, yaml.safe_dump(settings, sort_keys=False))


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Safetensors with texts in its header, as a whole or not at all."""
    from safetensors.torch import save_file

    with replacing(path) as beside:
        beside.touch()
        mode = beside.stat().st_mode  # what the user wants; safetensors makes its file private
        save_file(tensors, beside, metadata)
        beside.chmod(mode)


def save_png(figure: Figure, path: Path) -> None:
    """A figure, as a whole or not at all."""
    with replacing(path) as beside:
        figure.savefig(beside, format='png', dpi=120)
