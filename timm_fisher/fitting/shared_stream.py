"""Fits of several heads in common passes over the data: the backbone runs once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from timm_fisher.fitting.stream import DescriptorStream, ModelStream
from timm_fisher.head import PoolingHead


def fit_together(placed: Iterable[tuple[PoolingHead, int]], stream: ModelStream) -> None:
    """Fit several heads, in place, each to the descriptors of its stage.

    A fit reads its stream whenever it likes, so each runs in a thread of its own; but only one at a
    time, in a fixed order. When all have asked for descriptors or ended, the data is read once, and
    each batch goes to all who wait for it. The result is that of separate fits. Under
    `torch.distributed`, and within one pass, a fit must read to the end.

    Args:
        placed: each head, and which of the stages that the model reads it pools.
        stream: the training set.

    Raises:
        Exception: the first that a fit raises; the others are stopped.
    """
    lanes = [_Lane(head, place, stream) for head, place in placed]
    wanted: dict[_Lane, Sequence[int]] = {}
    try:
        for lane in lanes:
            lane.thread.start()
            lane.note(lane.outbox.get(), wanted)
        while wanted:
            asked, wanted = wanted, {}
            _read_once(stream, asked, wanted)
    finally:
        for lane in lanes:
            lane.stop()


def _read_once(
    stream: ModelStream, asked: dict[_Lane, Sequence[int]], wanted: dict[_Lane, Sequence[int]]
) -> None:
    """One pass over the images that any lane asked for; what they ask for next goes to `wanted`."""
    images = sorted(set().union(*asked.values()))
    positions = {lane: {image: i for i, image in enumerate(its)} for lane, its in asked.items()}
    reading = list(asked)
    for batch, stages in stream.read_stages(images):
        if not reading:
            break
        numbers = [images[i] for i in batch]
        for lane in list(reading):
            rows = [row for row, number in enumerate(numbers) if number in positions[lane]]
            if not rows:
                continue
            x = stages[lane.place]
            x = x if len(rows) == len(x) else x[rows]
            reply = lane.resume(([positions[lane][numbers[row]] for row in rows], x))
            if reply is not _NEXT:  # it left its loop before the end
                reading.remove(lane)
                lane.note(reply, wanted)
    for lane in reading:
        lane.note(lane.resume(_END), wanted)


_NEXT, _END, _DONE, _STOP = object(), object(), object(), object()


class _Stopped(BaseException):
    """Ends the thread of a fit that nobody waits for any more."""


class _Lane(DescriptorStream):
    """The stream that one fit sees. Its thread and the reader's run in turns."""

    def __init__(self, head: PoolingHead, place: int, stream: ModelStream) -> None:
        self.head = head
        self.place = place
        self.stream = stream
        self.num_features = head.in_features
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self.outbox: SimpleQueue[Any] = SimpleQueue()
        self.error: BaseException | None = None
        self.reads = 0
        self.grad_enabled = torch.is_grad_enabled()  # which is a thread's own
        self.thread = Thread(target=self._run, name=f'fit {type(head).__name__}', daemon=True)

    # In the thread of the fit

    def _run(self) -> None:
        try:
            with torch.set_grad_enabled(self.grad_enabled):
                self.head.fit(self)
        except BaseException as error:
            self.error = error
        self.outbox.put(_DONE)

    def __len__(self) -> int:
        return len(self.stream)

    def sum(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.stream.sum(*tensors)

    def read(self, images: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor]]:
        self.reads += 1
        current = self.reads
        item = self._ask(images)
        while item is not _END:
            yield item
            if current != self.reads:
                raise RuntimeError('A fit reads one pass after another, not two at the same time.')
            item = self._ask(_NEXT)

    def _ask(self, message: Any) -> Any:
        self.outbox.put(message)
        item = self.inbox.get()
        if item is _STOP:
            raise _Stopped
        return item

    # In the reader's thread

    def resume(self, item: Any) -> Any:
        """Give a batch, or the end; the fit's next message."""
        self.inbox.put(item)
        return self.outbox.get()

    def note(self, message: Any, wanted: dict[_Lane, Sequence[int]]) -> None:
        """A fit has asked for images, or ended."""
        if message is not _DONE:
            wanted[self] = message
        elif self.error is not None:
            raise self.error

    def stop(self) -> None:
        if self.thread.is_alive():
            self.inbox.put(_STOP)
        if self.thread.ident is not None:
            self.thread.join()
