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
    """Refuse a folder whose files may be of two models.

    Raises:
        LoadError: while the files of one model were replaced by those of another, the process was
            killed, or is still running.
    """
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
    that `check_whole` refuses, until the next call succeeds.

    Args:
        folder: made if it does not exist.
        write: gets an empty folder, and writes the new files there.
        remove: names of files that the new ones make obsolete.
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
        marked = beside.rename(folder / beside.name.replace(_WRITING, _REPLACING, 1))
        try:
            _move(names, marked, folder)
        finally:
            marked.rename(beside)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    for path in interrupted:
        shutil.rmtree(path, ignore_errors=True)
    hour_ago = time.time() - 3600  # until then, another process may be writing there
    for path in folder.glob(f'{_WRITING}*'):
        with contextlib.suppress(FileNotFoundError):  # it has just finished
            if path.stat().st_mtime < hour_ago:
                shutil.rmtree(path, ignore_errors=True)


def _move(names: list[str], beside: Path, folder: Path) -> None:
    """Move new files into a folder, and delete those that are named but not new; or change none."""
    done = []
    try:
        for name in names:
            new, target, kept = beside / name, folder / name, beside / f'{name}.old'
            if target.exists():
                _link_or_copy(target, kept)
            done.append((target, kept))
            if new.exists():
                os.replace(new, target)
            else:
                target.unlink(missing_ok=True)
    except BaseException:
        for target, kept in done:
            if kept.exists():
                os.replace(kept, target)
            else:
                target.unlink(missing_ok=True)
        raise


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
