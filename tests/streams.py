"""Data sets of the same images: by index, and as a stream of shards."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset


class Shards(IterableDataset):
    """Images, labels and, perhaps, names, one shard after the other."""

    def __init__(self, images: Tensor, shards: Sequence[Sequence[int]], named: bool) -> None:
        self.images, self.shards, self.named = images, shards, named

    def __iter__(self) -> Iterator[Any]:
        for i in itertools.chain(*self.shards):
            yield (self.images[i], 0, f'class/{i}') if self.named else (self.images[i], 0)


class Named(TensorDataset):
    @property
    def image_names(self) -> list[str]:
        return [f'class/{i}' for i in range(len(self))]
