"""What `fit` reads: descriptors of a training set, or of a stream, in chunks, shared over ranks."""

from __future__ import annotations

import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from timm_fisher.head import cast_like, like
from timm_fisher.numerics.hashing import (
    numbers_of_contents,
    numbers_of_names,
    scatter,
    shuffle_key,
)
from timm_fisher.numerics.linalg import at_least_float32

if TYPE_CHECKING:
    from timm_fisher.model import PooledModel


class DescriptorStream(ABC):
    """The local descriptors of a set of images; re-iterable, in the same order on each pass.

    Memory does not grow with the number of images, which nobody needs to know. They are shared out
    over ranks, so that sums over ranks equal the sums of one process. Each has a number, which
    random choices depend on: whatever the order of the images, their batches and the ranks that
    read them, the choice is the same.

    Attributes:
        num_features: channels C of one descriptor.
        device: where this rank's part of a sum is added.
    """

    num_features: int
    device: torch.device

    @abstractmethod
    def images(self, n: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of images, among them the `n` whose numbers have the lowest
        `shuffle_key`: numbers `[B]`, int64, on the CPU, and descriptors `[B, N, C]`."""

    @abstractmethod
    def inputs(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """As `batches`, each with what else the head's `forward` asks for, by name."""

    def sum(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Each tensor added up over ranks; every rank must call it, with the same shapes."""
        if _ranks()[0] == 1:
            return tensors
        summed = [tensor.to(self.device, copy=True) for tensor in tensors]
        for tensor in summed:
            dist.all_reduce(tensor)
        return tuple(summed)

    def batches(self) -> Iterator[Tensor]:
        """This rank's descriptors image by image, `[B, N, C]`."""
        for x, _ in self.inputs():
            yield x

    def __iter__(self) -> Iterator[Tensor]:
        """This rank's descriptors without regard to images, in chunks `[M, C]`."""
        for x in self.batches():
            yield x.flatten(0, 1)

    def sample(self, n: int) -> Tensor:
        """The same random descriptors `[n, C]` on every rank; fewer if the images hold fewer. As
        few of each image as suffice: one of each of `n` images, or two of each of `n / 2`, ..."""

        def draw(numbers: Tensor, x: Tensor, most: int) -> Tensor:
            order = scatter(numbers, x.shape[1]).argsort(1)[:, :most].to(x.device)
            rows = x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
            return rows.to(at_least_float32(x.dtype))

        return self._first(n, draw)

    def sample_images(self, n: int, pool: Callable[[Tensor], Tensor]) -> Tensor:
        """One vector for each of at most `n` random images, the same on every rank. For fits that
        pass over whole images many times; memory is that of the result.

        Args:
            n: how many images are wanted.
            pool: descriptors `[B, N, C]` -> vectors `[B, D]`, each image for itself, on any device.
        """
        return self._first(n, lambda numbers, x, most: pool(x)[:, None])

    def _first(self, n: int, draw: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
        """The first `n` rows of all images and ranks: the first rows of all images come before
        their second ones, and so on; among them, images in the order of `shuffle_key`.

        Args:
            n: how many.
            draw: gives the first rows `[B, K, D]` of images, at most so many, from their numbers
                `[B]` and descriptors `[B, N, C]`.
        """
        keys, rows, most = [np.empty((0, 2), np.int64)], list[Tensor](), n
        for numbers, x in self.images(n):
            new = draw(numbers, x, most)
            shape = new.shape[:2]
            places = np.broadcast_to(np.arange(shape[1]), shape)
            of_images = np.broadcast_to(shuffle_key(numbers).numpy()[:, None], shape)
            keys.append(np.stack([places, of_images], 2).reshape(-1, 2))
            rows.append(new.flatten(0, 1))
            if sum(map(len, keys)) > 2 * n:
                kept, row = np.concatenate(keys), torch.cat(rows)
                order = _order(kept)[:n]
                keys, rows = [kept[order]], [row[torch.from_numpy(order).to(row.device)]]
                most = int(kept[order[-1], 0]) + 1  # the rows of an image after that come too late
        if not rows:  # a rank without a share
            like = draw(torch.zeros(1, dtype=torch.long), torch.zeros(1, 1, self.num_features), 1)
            rows = [like[0, :0].to(self.device)]
        return self._first_of_ranks(n, np.concatenate(keys), torch.cat(rows))

    def _first_of_ranks(self, n: int, keys: np.ndarray, rows: Tensor) -> Tensor:
        """The first `n` of all ranks' rows `[m, D]`, by their keys `[m, 2]`."""
        world_size, rank = _ranks()
        about = torch.zeros(world_size, 2, dtype=torch.long)
        if len(keys):
            about[rank] = torch.tensor([len(keys), rows.dtype == torch.float64])
        about = self.sum(about)[0].cpu()
        counts, double = about[:, 0], bool(about[:, 1].any())
        start, total = int(counts[:rank].sum()), int(counts.sum())
        if not total:
            raise ValueError('fit needs at least one image; the loader gives none.')
        rows = rows.to(torch.float64 if double else rows.dtype)  # of a rank without a share, too
        of_all = torch.zeros(total, 2, dtype=torch.long)
        of_all[start : start + len(keys)] = torch.from_numpy(keys)
        order = _order(self.sum(of_all)[0].cpu().numpy())[:n] - start
        own = np.flatnonzero((order >= 0) & (order < len(keys)))
        chosen = rows.new_zeros(len(order), rows.shape[1])
        chosen[own] = rows[torch.from_numpy(order[own]).to(rows.device)]
        return self.sum(chosen)[0]


def _order(keys: np.ndarray) -> np.ndarray:
    """Places of keys `[n, 2]`, sorted by the first, then by the second."""
    return np.lexsort((keys[:, 1], keys[:, 0]))


class ListStream(DescriptorStream):
    """Descriptors in memory: those of a mini-batch, or of a test.

    Under `torch.distributed` each rank passes its share: the images are those of the first rank,
    then those of the second, and so on. Ranks tell one another how many they have once `sample`
    or `sample_images` is called, on every rank.

    Args:
        batches: tensors `[B, N, C]`, or `[M, C]` for M images of one descriptor each.
        contexts: for each of them what else a head asks for, by name.

    Raises:
        ValueError: no descriptors, or of another shape.
    """

    def __init__(
        self, batches: Sequence[Tensor], contexts: Sequence[dict[str, Any]] | None = None
    ) -> None:
        self._contexts = contexts or [{} for _ in batches]
        self._batches = [x[:, None] if x.ndim == 2 else x for x in batches]
        if not sum(map(len, self._batches)) or any(x.ndim != 3 for x in self._batches):
            shapes = [tuple(x.shape) for x in batches]
            raise ValueError(
                f'ListStream takes descriptors [B, N, C] or [M, C], at least one; got {shapes}.'
            )
        self.num_features = self._batches[0].shape[2]
        self.device = self._batches[0].device

    @functools.cached_property
    def _counts(self) -> list[int]:
        """Images on each rank."""
        world_size, rank = _ranks()
        counts = torch.zeros(world_size, dtype=torch.long)
        counts[rank] = sum(map(len, self._batches))
        return self.sum(counts)[0].tolist()

    def inputs(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        yield from zip(self._batches, self._contexts, strict=True)

    def images(self, n: int) -> Iterator[tuple[Tensor, Tensor]]:
        start = sum(self._counts[: _ranks()[1]])
        for x in self._batches:
            yield torch.arange(start, start + len(x)), x
            start += len(x)


class ModelStream(DescriptorStream):
    """What one head of a model pools of the images of a data loader, on this rank's device.

    A map-style data set is read by index, in its own order, whatever the loader's sampler does, and
    shared out over ranks by whole batches; a sample reads the images that it needs alone. Anything
    else is read as it comes, to its end, on each pass, and every rank's loader gives a share of its
    own. Leave random augmentation out, or each pass sees other descriptors.

    An image's number is made of its name: one of `dataset.image_names` of a map-style data set, in
    the order of its images; the third item of what a batch of a stream consists of, a list of
    strings. Without names it is the index, or made of the image's bits.

    Args:
        model: a `PooledModel`.
        loader: a torch `DataLoader` over a map-style data set of (image, ...) tuples or images, or
            one that accelerate has prepared: its batch size, workers and collation are used. Or
            something that gives such batches each time it is iterated over, such as a `DataLoader`
            over an `IterableDataset`.
        index: of the head, among `PooledModel.heads`.
        from_features: the loader gives what `model.forward_features` gives, not images.
        max_images: pass over at most so many, over all ranks: those of a map-style data set whose
            numbers have the lowest `shuffle_key`, or the first ones of a stream, by equal shares.

    Attributes:
        seen: images of this rank's longest pass so far.

    Raises:
        TypeError: the loader can be iterated over once, or not at all.
        ValueError: there are no images, or `max_images` is less than one.
    """

    def __init__(
        self,
        model: PooledModel,
        loader: Iterable[Any],
        *,
        index: int = 0,
        from_features: bool = False,
        max_images: int | None = None,
    ) -> None:
        self.model, self.loader = model, loader
        self.head, self.place = model.heads[index]
        self.from_features, self.max_images = from_features, max_images
        self.descriptors = list(model.descriptors)[self.place]
        self.num_features = self.descriptors.num_features
        self.like = like(model)
        self.device = self.like['device']
        if max_images is not None and (type(max_images) is not int or max_images < 1):
            raise ValueError(f'{max_images=} is not a whole number from 1, or None for all images.')
        dataset: Any = getattr(loader, 'dataset', None)
        is_map_style = isinstance(loader, DataLoader) and not isinstance(dataset, IterableDataset)
        self.dataset: Any = dataset if is_map_style else None
        self.seen = 0
        if is_map_style and not len(dataset):
            raise ValueError('fit needs at least one image; the data set of the loader is empty.')
        if isinstance(loader, Iterator) or not isinstance(loader, Iterable):
            raise TypeError(
                'fit passes over the images several times: it needs a DataLoader, or something '
                'else that gives batches each time it is iterated over, not '
                f'{type(loader).__name__}.'
            )

    def images(self, n: int) -> Iterator[tuple[Tensor, Tensor]]:
        for numbers, features, _ in self._features(n):
            yield numbers, self.descriptors(features)

    def inputs(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for _, features, size in self._features():
            context = self.descriptors.context(self.head, self.model.backbone, features, size)
            yield self.descriptors(features), context

    def _of_batch(self, x: Any) -> Any:
        """The backbone's features of a batch of the loader."""
        if self.from_features:
            return (x[self.place] if isinstance(x, tuple | list) else x).to(self.device)
        return self.descriptors.features(self.model.backbone, cast_like(x, self.like))

    @torch.no_grad()
    def _features(self, n: int | None = None) -> Iterator[tuple[Tensor, Any, Sequence[int]]]:
        """Numbers of this rank's images, the backbone's features of them, and their height and
        width; at least of the `n` whose numbers come first."""
        was_training = self.model.training
        self.model.eval()
        try:
            count = 0
            for numbers, x in (
                self._read_stream() if self.dataset is None else self._read_by_index(n)
            ):
                count += len(numbers)
                self.seen = max(self.seen, count)
                if self.from_features:
                    size = self.model.pretrained_cfg['input_size'][1:]
                else:
                    size = x.shape[2:]
                yield numbers, self._of_batch(x), size
            is_short = self.dataset is None and count < self.seen
            if is_short or (not self.seen and _ranks()[0] == 1):
                raise ValueError(
                    f'The loader gave {count} images, and {self.seen} before: fit needs one that '
                    'gives the same images each time it is iterated over, at least one.'
                )
        finally:
            self.model.train(was_training)

    def _read_by_index(self, n: int | None) -> Iterator[tuple[Tensor, Any]]:
        loader: Any = self.loader
        batch_size = loader.batch_size or getattr(loader.batch_sampler, 'batch_size', None) or 32
        limits = [limit for limit in (n, self.max_images) if limit is not None]
        images = torch.arange(len(self._numbers))
        if limits and min(limits) < len(images):
            images = shuffle_key(self._numbers).argsort(stable=True)[: min(limits)].sort().values
        world_size, rank = _ranks()
        batches = images.split(batch_size)[rank::world_size]
        parts = DataLoader(
            self.dataset,
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
        )
        for batch, item in zip(batches, _progress(parts), strict=True):
            yield self._numbers[batch], item[0] if isinstance(item, tuple | list) else item

    @functools.cached_property
    def _numbers(self) -> Tensor:
        """Of the images of a map-style data set."""
        names = getattr(self.dataset, 'image_names', None)
        return torch.arange(len(self.dataset)) if names is None else numbers_of_names(names)

    def _read_stream(self) -> Iterator[tuple[Tensor, Any]]:
        world_size, rank = _ranks()
        left = sys.maxsize
        if self.max_images is not None:
            left = len(range(rank, self.max_images, world_size))
        for item in _progress(self.loader):
            x, *others = item if isinstance(item, tuple | list) else (item,)
            if isinstance(x, tuple | list):
                x = [part[:left] for part in x]
                of_images = x[0]
            else:
                x = of_images = x[:left]
            names = others[1] if len(others) > 1 else None
            if isinstance(names, tuple | list) and all(isinstance(name, str) for name in names):
                yield numbers_of_names(names[:left]), x
            else:
                yield numbers_of_contents(of_images), x
            left -= len(of_images)
            if left <= 0:
                return


class PooledStream(ModelStream):
    """What all heads of a model together pool of the images of a data loader, before a projection:
    one vector `[B, 1, D]` for each. Arguments and errors are those of `ModelStream`."""

    def __init__(self, model: PooledModel, loader: Iterable[Any], **options: Any) -> None:
        super().__init__(model, loader, **options)
        projection: Any = model.projection
        self.num_features = getattr(projection, 'in_features', model.head_hidden_size)

    def images(self, n: int) -> Iterator[tuple[Tensor, Tensor]]:
        for numbers, features, size in self._features(n):
            yield numbers, self.model.pool_unprojected(features, size)[:, None]

    def _of_batch(self, x: Any) -> Any:
        if self.from_features:
            several = isinstance(x, tuple | list)
            return [one.to(self.device) for one in x] if several else x.to(self.device)
        return self.model.forward_features(cast_like(x, self.like))


def _progress(loader: Any) -> Any:
    """A bar on the first rank's terminal."""
    return tqdm(loader, 'fit: descriptors', leave=False, disable=_ranks()[1] > 0 or None)


def _ranks() -> tuple[int, int]:
    """World size and rank, (1, 0) without `torch.distributed`."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    return 1, 0
