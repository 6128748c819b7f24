"""`embed(model, images)`: images as vectors, for search and clustering."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from timm_fisher.head import cast_like, like
from timm_fisher.images import convert, read_image
from timm_fisher.model import PooledModel


@torch.no_grad()
def embed(
    model: PooledModel,
    images: Tensor | Sequence[str | Path | Image.Image] | Iterable[Any],
    *,
    batch_size: int = 32,
    workers: int = 2,
    progress: bool | None = None,
) -> Tensor:
    """Pooled vectors of images, of unit length: `[n, D]`, float32, on the CPU, D being
    `model.head_hidden_size`. A classifier, and the batch norm before it, have no say.

    Args:
        model: a `PooledModel`, with or without a classifier, on any device, of any dtype; its mode
            stays.
        images: files or PIL images, which are prepared as the model wants them; a tensor
            `[n, C, H, W]` of images that are; or a loader, whose batches are tensors
            `[B, C, H, W]`, or tuples that begin with one.
        batch_size: images at a time, of files, PIL images or a tensor.
        workers: processes that read files.
        progress: show a bar; None for only on a terminal.

    Raises:
        TypeError: one file or image instead of a list, or something else that gives no batches.
        ValueError: no images, a file that cannot be read as an image, or an image whose vector is
            NaN or infinite.
    """
    where = like(model)
    batches, count = _batches(model, images, batch_size, workers)
    bar = tqdm(
        total=count, desc='embed', unit='image', disable=None if progress is None else not progress
    )
    was_training = model.training
    model.eval()
    vectors: list[Tensor] = []
    try:
        for x in batches:
            pooled = model.pool(model.forward_features(cast_like(x, where)), x.shape[2:]).float()
            bad = (~pooled.isfinite().all(1)).nonzero().flatten().tolist()
            if bad:
                done = sum(map(len, vectors))
                raise ValueError(
                    f'The vector of image {done + bad[0]} is NaN or infinite. If nothing is wrong '
                    'with the image, the model or its half precision is at fault.'
                )
            vectors.append(F.normalize(pooled, dim=1).cpu())
            bar.update(len(x))
    finally:
        model.train(was_training)
        bar.close()
    if not any(map(len, vectors)):
        raise ValueError('There are no images to embed.')
    return torch.cat(vectors)


def _batches(
    model: PooledModel, images: Any, batch_size: int, workers: int
) -> tuple[Iterator[Tensor], int | None]:
    """Batches `[B, C, H, W]`, and how many images they hold, if that is known."""
    if isinstance(images, str | Path | Image.Image):
        raise TypeError(f'images is {images!r}; give a list of files or images.')
    if isinstance(images, Tensor):
        return iter(images.split(batch_size)), len(images)
    if isinstance(images, Sequence):
        prepared = Prepared(images, model)
        return iter(DataLoader(prepared, batch_size, num_workers=workers)), len(images)
    return _first_of_each(images), None


def _first_of_each(loader: Iterable[Any]) -> Iterator[Tensor]:
    """Images of the batches of a loader."""
    for batch in loader:
        x = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(x, Tensor):
            raise TypeError(
                f'images gives {x!r:.200}, which is no batch of a loader. Of files give a list, as '
                'in list(folder.glob(...)).'
            )
        yield x


class Prepared(Dataset[Tensor]):
    """Files and PIL images as a model wants them."""

    def __init__(self, images: Sequence[str | Path | Image.Image], model: PooledModel) -> None:
        data = timm.data.resolve_model_data_config(model)
        self.images, self.channels = images, data['input_size'][0]
        self.transform = timm.data.create_transform(**data)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.prepare(self.images[i])

    def prepare(self, image: str | Path | Image.Image) -> Tensor:
        """`[C, H, W]`; a ValueError that names a file that cannot be read."""
        if isinstance(image, Image.Image):
            opened = convert(image, 'L' if self.channels == 1 else 'RGB')
        else:
            opened = read_image(image, self.channels)
        prepared: Tensor = self.transform(opened)
        return prepared
