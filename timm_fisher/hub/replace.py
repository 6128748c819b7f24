"""Replacing the files of a saved model: all of them, or none."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from timm_fisher.errors import LoadError

# Starts of the names of folders inside the saved one: new files that are still being written there,
# and, from the first rename to the last, earlier files that have been replaced, as NAME.old.
_WRITING, _REPLACING = '.saving-', '.replacing-'


def check_whole(folder: Path) -> None:
    """Refuse a folder whose files may be of two models, by a LoadError: while they were replaced,
    the process was killed, or is still running."""
    for beside in folder.glob(f'{_REPLACING}*'):
        raise LoadError(
            f"'{folder}' may hold files of two models: a save was interrupted or is still running. "
            f"Save the model again; or move the files '{beside}/NAME.old' to '{folder}/NAME', and "
            f"delete '{beside}'."
        )


def replace_files(
    folder: Path, write: Callable[[Path], Any], *, remove: Collection[str] = ()
) -> None:
    """Write files into a folder beside, then move all of them into place.

    An error leaves what was there. A process that is killed while files are moved leaves a folder
    that `check_whole` refuses, until the next call succeeds. `write` gets an empty folder for the
    new files; `remove` names those that they make obsolete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    interrupted = list(folder.glob(f'{_REPLACING}*'))
    beside = Path(tempfile.mkdtemp(dir=folder, prefix=_WRITING))
    try:
        write(beside)
        for path in beside.iterdir():
            with open(path, 'rb') as file:
                os.fsync(file.fileno())
        names = sorted({*remove, *(path.name for path in beside.iterdir())}, reverse=True)
        _exchange(names, beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    for path in interrupted:
        shutil.rmtree(path, ignore_errors=True)
    hour_ago = time.time() - 3600  # until then, another process may be writing there
    for path in folder.glob(f'{_WRITING}*'):
        with contextlib.suppress(FileNotFoundError):  # it has just finished
            if path.stat().st_mtime < hour_ago:
                shutil.rmtree(path, ignore_errors=True)


def _exchange(names: list[str], beside: Path, folder: Path) -> None:
    """Move the files of these names out of a folder, and new ones in; or move none."""
    marked = beside.rename(folder / beside.name.replace(_WRITING, _REPLACING, 1))
    moves: list[tuple[Path, Path]] = []
    try:
        for name in names:
            place = folder / name
            for now, then in ((place, marked / f'{name}.old'), (marked / name, place)):
                if now.exists():
                    moves.append((now, then))
                    os.replace(now, then)
    except BaseException:
        for now, then in reversed(moves):
            if then.exists():  # the last may not have been moved
                os.replace(then, now)
        marked.rename(beside)
        raise
    marked.rename(beside)
