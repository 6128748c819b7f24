"""Data sets of the same images: by index, and as a stream of shards."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
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


def write_shards(images: Path, folder: Path, **counts: Sequence[int]) -> Path:
    """`folder/SPLIT-0.tar`, ...: shards as webdataset has them of `images/SPLIT/CLASS/`, of so many
    images each, by split, or one of all."""
    folder.mkdir(exist_ok=True)
    classes = sorted(path.name for path in (images / 'train').iterdir())
    for split in sorted(path.name for path in images.iterdir()):
        paths = iter(sorted((images / split).glob('*/*')))
        for i, count in enumerate(counts.get(split, [10**6])):
            with tarfile.open(folder / f'{split}-{i}.tar', 'w') as file:
                for path in itertools.islice(paths, count):
                    name = path.relative_to(images / split).with_suffix('')
                    label = str(classes.index(path.parent.name)).encode()
                    parts = {path.suffix.removeprefix('.'): path.read_bytes(), 'cls': label}
                    for ending, content in parts.items():
                        info = tarfile.TarInfo(f'{name.as_posix()}.{ending}')
                        info.size = len(content)
                        file.addfile(info, io.BytesIO(content))
    return folder
