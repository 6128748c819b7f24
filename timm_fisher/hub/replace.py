"""Temporary."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from timm_fisher.errors import LoadError

SAVING = '.saving-'  # start of the name of a folder of files that are not in place yet


def check_whole(folder: Path) -> None:
    """Refuse a folder whose files may be of two models.

    Raises:
        LoadError: while the files of one model were replaced by those of another, the process was
            killed, or is still at it.
    """
    for beside in half_replaced(folder):
        raise LoadError(
            f"'{folder}' may hold files of two models: saving was cut off, or goes on. Save the "
            f"model again; or move the files '{beside}/NAME.old' to '{folder}/NAME', and delete "
            f"'{beside}'."
        )


def half_replaced(folder: Path) -> list[Path]:
    """Folders of earlier files, which `save_pretrained` deletes when all new ones are in place."""
    return _saving(folder, lambda beside: any(path.suffix == '.old' for path in beside.iterdir()))


def abandoned(folder: Path) -> list[Path]:
    """Folders that a killed process was writing into: nothing has changed there for an hour."""
    return _saving(folder, lambda beside: beside.stat().st_mtime < time.time() - 3600)


def _saving(folder: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    found = []
    for beside in folder.glob(f'{SAVING}*'):
        # Another process has just finished; or it is another user's, and closed.
        with contextlib.suppress(FileNotFoundError, PermissionError):
            if wanted(beside):
                found.append(beside)
    return found
