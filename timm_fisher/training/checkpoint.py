"""What keeps a run safe: a folder of its own, a checkpoint after each epoch, and signals that end
it with a sentence."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from filelock import FileLock, Timeout

from timm_fisher.files import write
from timm_fisher.training.config import Config

if TYPE_CHECKING:  # slow to import, for whoever launches runs
    from accelerate import Accelerator


@contextmanager
def open_folder(config: Config, accelerator: Accelerator) -> Iterator[Path]:
    """The folder `config.output`, with its config.yaml, while no other run may write there.
    ValueError if one does, or if `config.resume` and the settings do not fit what is there."""
    output = Path(config.output)
    # The system takes it back when the process ends, however it does.
    lock, owner = FileLock(output / '.lock', timeout=0), output / '.owner'
    try:
        with accelerator.main_process_first():
            if config.resume and not (output / 'config.yaml').exists():
                raise ValueError(f"--resume: '{output}' holds no run (no config.yaml).")
            if accelerator.is_main_process:
                output.mkdir(parents=True, exist_ok=True)
                try:
                    lock.acquire()
                except Timeout as error:
                    raise ValueError(
                        f"Another run is writing to '{output}'{_read(owner)}. Wait for its end, or "
                        'give another --output.'
                    ) from error
                started = time.strftime('%Y-%m-%d %H:%M:%S')
                write(owner, f': process {os.getpid()} on {platform.node()}, since {started}')
            if latest_checkpoint(output):
                check_settings(output, config)
            elif (output / 'metrics.json').exists():
                raise ValueError(
                    f"'{output}' holds a finished run without its checkpoint. Delete the folder to "
                    'run it again, or give another --output.'
                )
            elif accelerator.is_main_process:
                write(output / 'config.yaml', config.to_yaml())
        yield output
    finally:
        if lock.is_locked:
            owner.unlink(missing_ok=True)
        lock.release()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:  # another run makes it after the lock, and removes it before
        return ''


def check_settings(output: Path, config: Config) -> None:
    """Refuse, by a ValueError, to write over a run, or to resume one with other settings."""
    if not config.resume:
        raise ValueError(
            f"'{output}' holds a run already. Add --resume true to continue it, or give another "
            '--output.'
        )
    old = yaml.safe_load((output / 'config.yaml').read_text())
    new = yaml.safe_load(config.to_yaml())
    matter = [key for key in new if key not in config.of_no_consequence]
    orders = [list(each['stages']) for each in (old, new)]
    if orders[0] != orders[1] or any(new[key] != old.get(key) for key in matter):
        was, now = (dict(_dotted({key: each.get(key) for key in matter})) for each in (old, new))
        changed = [key for key in {**now, **was} if now.get(key) != was.get(key)]
        changes = [
            f'{key} was {was.get(key, "not there")}, is {now.get(key, "not there")}'
            for key in changed
        ] or [f'the order of stages was {orders[0]}, is {orders[1]}']
        raise ValueError(
            f"'{output}' holds a run with other settings: {'; '.join(changes)}. Keep them to "
            'continue it, or give another --output.'
        )


def _dotted(options: dict[str, Any], prefix: str = '') -> Iterator[tuple[str, str]]:
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _dotted(value, f'{prefix}{key}.')
        else:
            yield prefix + key, repr(value)


def latest_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint in the folder of a run, if there is one."""
    numbers = {path.name.removeprefix('checkpoint-'): path for path in output.glob('checkpoint-*')}
    newest = max(filter(str.isdigit, numbers), key=int, default='')
    return numbers.get(newest)


@dataclass
class Progress:
    """How far a run has come."""

    setting: dict[str, Any]  # what the launcher decides, and an exact resume needs again
    history: list[dict[str, Any]] = field(default_factory=list)  # a row for each epoch
    best: dict[str, Any] = field(default_factory=dict)  # the epoch of model/, and its metric
    seconds: dict[str, float] = field(default_factory=dict)
    steps: int = 0  # of training, on one process
    scheduler: dict[str, Any] = field(default_factory=dict)  # its state

    def add(self, row: dict[str, Any]) -> None:
        """Take in an epoch. The best has the highest accuracy; if no stage classifies, the highest
        recall; without either it is the last: unsupervised losses of different features cannot be
        compared."""
        self.history.append(row)
        for metric in ('val_accuracy', 'val_recall_at_1', 'val_loss'):
            best = self.best.get(metric)
            if metric in row and (best is None or metric == 'val_loss' or row[metric] > best):
                self.best = {key: row[key] for key in ('stage', 'epoch', metric)}
            if metric in row or best is not None:
                return

    @property
    def latest_is_best(self) -> bool:
        """Whether the last epoch is the best."""
        return self.best.items() <= self.history[-1].items()


def save_checkpoint(
    output: Path,
    progress: Progress,
    accelerator: Accelerator,
    save_model: Callable[[Path], None],
) -> None:
    """Write log and checkpoint, whole or not at all; then delete older checkpoints."""
    final = output / f'checkpoint-{len(progress.history):04d}'
    partial = output / f'{final.name}.partial'
    main = accelerator.is_main_process
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        save_model(partial / 'model')
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if main:
        write(output / 'log.jsonl', ''.join(json.dumps(row) + '\n' for row in progress.history))
        write(partial / 'progress.json', json.dumps(asdict(progress)))
        os.replace(partial, final)
        for old in output.glob('checkpoint-*'):
            if old != final:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


class Interruption:
    """A context in which SIGTERM and SIGINT (Ctrl-C) end a run with a KeyboardInterrupt that says
    how to continue it: at once, or, while it `waits`, at the next `check`, on all ranks. A second
    signal ends it at once.

    A checkpoint in the middle of an epoch could not be resumed exactly: workers have random numbers
    of their own, and read ahead. So a run goes on from the end of its last whole epoch.
    """

    waits = False
    _received = False

    def __init__(self, accelerator: Accelerator, output: Path) -> None:
        self._accelerator, self._output = accelerator, output
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        with suppress(ValueError):  # only the main thread may set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        # A worker, or another rank, that the signal ended sooner.
        if self._received and isinstance(error, Exception):
            raise self._interrupted() from error
        if isinstance(error, RuntimeError) and _is_of_another_rank(error):
            raise ConnectionError(
                'Another process of this run has ended, or does not answer: see its output. '
                f'{self._continues()}'
            ) from error

    def check(self) -> None:
        """End the run if a signal has come; every rank must call it."""
        if self._received:
            self._accelerator.set_trigger()
        if self._accelerator.check_trigger():
            raise self._interrupted()

    def _receive(self, number: int, frame: object) -> None:
        if self._received or not self.waits:
            raise self._interrupted()
        self._received = True

    def _interrupted(self) -> KeyboardInterrupt:
        return KeyboardInterrupt(
            f"The run in '{self._output}' was stopped by a signal. {self._continues()}"
        )

    def _continues(self) -> str:
        checkpoint = latest_checkpoint(self._output)
        place = 'starts again: there is no checkpoint yet'
        if checkpoint:
            place = f'continues from {checkpoint.name}, the end of its last whole epoch'
        return f'With --resume true it {place}.'


def _is_of_another_rank(error: RuntimeError) -> bool:
    """Whether an error is one of communication; gloo's have no class of their own."""
    return isinstance(error, torch.distributed.DistError) or '/gloo/' in str(error)
