"""The folder of a run: of one run with one set of settings, and of one process at a time."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml
from accelerate import Accelerator

from timm_fisher.files import write
from timm_fisher.training.config import Config


@contextmanager
def open_folder(config: Config, accelerator: Accelerator) -> Iterator[Path]:
    """The folder `config.output`, with its config.yaml, while no other run may write there.

    Raises:
        ValueError: another run is writing there, it holds a run that is not to be resumed, or one
            with other settings, or none that could be resumed.
    """
    output = Path(config.output)
    with ExitStack() as stack:
        with accelerator.main_process_first():
            if config.resume and not (output / 'config.yaml').exists():
                raise ValueError(f"--resume: '{output}' holds no run (no config.yaml).")
            if accelerator.is_main_process:
                output.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock(output))
            started = latest_checkpoint(output) is not None
            if started:
                _check_settings(output, config)
            elif accelerator.is_main_process:
                write(output / 'config.yaml', config.to_yaml())
        yield output


def latest_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint in the folder of a run, if there is one."""
    checkpoints = sorted(output.glob('checkpoint-????'))
    return checkpoints[-1] if checkpoints else None


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder. The system takes the lock back when the process ends,
    however it does.

    Raises:
        ValueError: another process has the lock.
    """
    with open(folder / '.lock', 'a') as file:
        try:
            if sys.platform == 'win32':
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                # Unlike flock's, it is not passed on to workers that may outlive the process.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise ValueError(
                    f"Another run is writing to '{folder}'. Wait for its end, or give another "
                    '--output.'
                ) from None
            # A file system without locks: nothing can be kept out.
        yield


def _check_settings(output: Path, config: Config) -> None:
    """Refuse to write over a run, or to resume one with other settings."""
    if not config.resume:
        raise ValueError(
            f"'{output}' holds a run already. Add --resume true to continue it, or give another "
            '--output.'
        )
    old = yaml.safe_load((output / 'config.yaml').read_text())
    new = yaml.safe_load(config.to_yaml())
    free = {'resume', 'output', 'workers', 'cache_dir'}
    changed = [key for key in new if key not in free and new[key] != old.get(key)]
    if changed:
        text = '; '.join(f'{key} was {old.get(key)!r}, is {new[key]!r}' for key in changed)
        raise ValueError(f"--resume must keep the settings of '{output}': {text}.")
