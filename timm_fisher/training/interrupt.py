"""What SIGTERM and SIGINT (Ctrl-C) do to a run: they end it at its next step, with a sentence."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from timm_fisher.training.folder import latest_checkpoint


class Interrupted(KeyboardInterrupt):
    """A signal ended a run; the message says how to continue it."""


class Interruption:
    """A context in which signals end a run: at once, or, while it trains, at its next step, on all
    ranks, whichever of them got the signal. A second signal ends it at once.

    A checkpoint in the middle of an epoch could not be resumed exactly: workers have random numbers
    of their own, and read ahead. So a run goes on from the end of its last whole epoch.

    Args:
        accelerator: of the run.
        output: folder of the run.

    Raises:
        Interrupted: a signal has come.
    """

    def __init__(self, accelerator: Accelerator, output: Path) -> None:
        self._accelerator, self._output = accelerator, output
        self._previous: dict[int, Any] = {}
        self._received = self._at_steps = False

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        # A worker, or another rank, that the signal ended sooner.
        if self._received and isinstance(error, Exception):
            raise self._interrupted() from error

    @contextmanager
    def at_steps(self) -> Iterator[None]:
        """Meanwhile a signal waits for the next `check`."""
        self._at_steps = True
        yield
        self._at_steps = False
        self.check()

    def check(self) -> None:
        """End the run if a signal has come; every rank must call it."""
        if self._received:
            self._accelerator.set_trigger()
        if self._accelerator.check_trigger():
            raise self._interrupted()

    def _receive(self, number: int, frame: object) -> None:
        if self._received or not self._at_steps:
            raise self._interrupted()
        self._received = True

    def _interrupted(self) -> Interrupted:
        checkpoint = latest_checkpoint(self._output)
        place = 'starts again: there is no checkpoint yet'
        if checkpoint:
            place = f'continues from {checkpoint.name}, the end of its last whole epoch'
        return Interrupted(
            f"The run in '{self._output}' was stopped by a signal. With --resume true it {place}."
        )
