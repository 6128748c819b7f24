"""What `fit` reads: the descriptors of a whole training set, in chunks, shared out over ranks."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from timm_fisher.numerics.hashing import scatter
from timm_fisher.numerics.linalg import at_least_float32

if TYPE_CHECKING:
    from timm_fisher.model import PooledModel


class DescriptorStream(ABC):
    """The local descriptors of a set of images; re-iterable, in the same order on each pass.

    Memory does not grow with the number of images. They are shared out over ranks by whole batches,
    so that sums over ranks equal the sums of one process.

    Attributes:
        num_features: channels C of one descriptor.
        device: where this rank's part of a sum is added.
    """

    num_features: int
    device: torch.device

    @abstractmethod
    def __len__(self) -> int:
        """Number of images, over all ranks."""

    @abstractmethod
    def read(self, images: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor]]:
        """This rank's share of some images, whose indices ascend and are the same on every rank:
        positions in `images`, and the descriptors `[B, N, C]` of the images there."""

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

    def inputs(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """As `batches`, each with what else the head's `forward` asks for, by name."""
        for _, x in self.read(range(len(self))):
            yield x, {}

    def __iter__(self) -> Iterator[Tensor]:
        """This rank's descriptors without regard to images, in chunks `[M, C]`."""
        for x in self.batches():
            yield x.flatten(0, 1)

    def sample(self, n: int) -> Tensor:
        """The same random descriptors `[n, C]` on every rank, however many ranks there are; fewer
        if the images hold fewer. Reads at most `n` images, as few descriptors of each as suffice.
        """
        generator = torch.Generator().manual_seed(0)
        images = _choose(len(self), n, generator)
        per_image = math.ceil(n / len(images))

        def draw(numbers: Tensor, x: Tensor) -> Tensor:
            # By image: the choice must not depend on how images are shared out to batches.
            order = scatter(numbers, x.shape[1]).argsort(1)[:, :per_image].to(x.device)
            rows = x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
            # One channel more tells descriptors from what fills up images that hold fewer.
            rows = F.pad(rows.to(at_least_float32(x.dtype)), (0, 1), value=1.0)
            return F.pad(rows, (0, 0, 0, per_image - order.shape[1]))

        rows = self._collect(images, draw).flatten(0, 1)
        rows = rows[:, :-1][rows[:, -1] > 0]
        return rows[_choose(len(rows), n, generator).to(rows.device)] if len(rows) > n else rows

    def sample_images(self, n: int, pool: Callable[[Tensor], Tensor]) -> Tensor:
        """One vector for each of at most `n` random images, in their order, the same on every rank.
        For fits that pass over whole images many times; memory is that of the result.

        Args:
            n: how many images are wanted.
            pool: descriptors `[B, N, C]` -> vectors `[B, D]`, each image for itself, on any device.
        """
        images = _choose(len(self), n, torch.Generator().manual_seed(0))
        return self._collect(images, lambda _, x: pool(x))

    def _collect(self, images: Tensor, pool: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What `pool` makes of each image, from their numbers `[B]` and descriptors `[B, N, C]`."""
        rows: Tensor | None = None
        for positions, x in self.read(images.tolist()):
            places = torch.as_tensor(positions)
            values = pool(images[places], x)
            if rows is None:
                rows = values.new_zeros(len(images), *values.shape[1:])
            rows[places.to(rows.device)] = values
        if rows is None:  # a rank without a share
            like = pool(images[:1], torch.zeros(1, 1, self.num_features))
            rows = like.new_zeros(len(images), *like.shape[1:])
        return self.sum(rows)[0]


def _choose(number: int, n: int, generator: torch.Generator) -> Tensor:
    """At most `n` random ones of 0 ... number - 1, ascending."""
    return torch.randperm(number, generator=generator)[:n].sort().values


class ListStream(DescriptorStream):
    """Descriptors in memory: those of a mini-batch, or of a test.

    Under `torch.distributed` each rank passes its share: the images are those of the first rank,
    then those of the second, and so on. Ranks tell one another how many they have once `len`,
    `read`, `sample` or `sample_images` is called, on every rank.

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

    def __len__(self) -> int:
        return sum(self._counts)

    def inputs(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        # All of them: no rank has to ask another.
        yield from zip(self._batches, self._contexts, strict=True)

    def read(self, images: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor]]:
        position = {image: i for i, image in enumerate(images)}
        start = sum(self._counts[: _ranks()[1]])
        for x in self._batches:
            rows = [i for i in range(len(x)) if start + i in position]
            if rows:
                yield [position[start + i] for i in rows], x[rows]
            start += len(x)


class ModelStream(DescriptorStream):
    """What one head of a model pools of the images of a data loader, on this rank's device.

    The loader's data set is read in its own order, whatever the loader's sampler does; leave
    random augmentation out of it, or each pass sees other descriptors.

    Args:
        model: a `PooledModel`.
        loader: a torch `DataLoader` over a map-style data set of (image, ...) tuples or images, or
            one that accelerate has prepared. Its batch size, workers and collation are used.
        index: of the head, among `PooledModel.heads`.
        from_features: the data set holds what `model.forward_features` gives, not images.

    Raises:
        TypeError: the loader is not a `DataLoader` over a map-style data set.
        ValueError: the data set is empty.
    """

    def __init__(
        self,
        model: PooledModel,
        loader: DataLoader[Any],
        *,
        index: int = 0,
        from_features: bool = False,
    ) -> None:
        dataset: Any = getattr(loader, 'dataset', None)
        if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset):
            raise TypeError(
                'fit reads the data set several times and by index: it needs a torch DataLoader '
                f'over a map-style data set, got {type(loader).__name__} over '
                f'{type(dataset).__name__}. timm.data.create_loader gives one with '
                'use_prefetcher=False.'
            )
        if len(dataset) == 0:
            raise ValueError('fit needs at least one image; the data set of the loader is empty.')
        self.model, self.loader = model, loader
        self.head, self.place = model.heads[index]
        self.from_features = from_features
        self.descriptors = list(model.descriptors)[self.place]
        self.num_features = self.descriptors.num_features
        self.device = next(model.parameters()).device
        self.batch_size = (
            loader.batch_size or getattr(loader.batch_sampler, 'batch_size', None) or 32
        )

    def __len__(self) -> int:
        return len(self.loader.dataset)  # type: ignore[arg-type]

    def read(self, images: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor]]:
        for batch, features, _ in self._features(images):
            yield batch, self.descriptors(features)

    def inputs(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for _, features, size in self._features(range(len(self))):
            context = self.descriptors.context(self.head, self.model.backbone, features, size)
            yield self.descriptors(features), context

    def _of_batch(self, x: Any) -> Any:
        """The backbone's features of a batch of the loader."""
        if self.from_features:
            return (x[self.place] if isinstance(x, tuple | list) else x).to(self.device)
        return self.descriptors.features(self.model.backbone, x.to(self.device))

    @torch.no_grad()
    def _features(
        self, images: Sequence[int]
    ) -> Iterator[tuple[Sequence[int], Any, Sequence[int]]]:
        """As `read`, the backbone's features of images of a height and width."""
        world_size, rank = _ranks()
        starts = range(rank * self.batch_size, len(images), world_size * self.batch_size)
        batches = [range(start, min(start + self.batch_size, len(images))) for start in starts]
        loader = DataLoader(
            self.loader.dataset,
            batch_sampler=[[images[i] for i in batch] for batch in batches],
            num_workers=self.loader.num_workers,
            collate_fn=self.loader.collate_fn,
        )
        was_training = self.model.training
        self.model.eval()
        try:
            progress = tqdm(loader, 'fit: descriptors', leave=False, disable=rank > 0 or None)
            for batch, item in zip(batches, progress, strict=True):
                x: Any = item[0] if isinstance(item, tuple | list) else item
                if self.from_features:
                    size = self.model.pretrained_cfg['input_size'][1:]
                else:
                    size = x.shape[2:]
                yield batch, self._of_batch(x), size
        finally:
            self.model.train(was_training)


class PooledStream(ModelStream):
    """What all heads of a model together pool of the images of a data loader, before a projection:
    one vector `[B, 1, D]` for each. Arguments and errors are those of `ModelStream`."""

    def __init__(
        self, model: PooledModel, loader: DataLoader[Any], *, from_features: bool = False
    ) -> None:
        super().__init__(model, loader, from_features=from_features)
        projection: Any = model.projection
        self.num_features = getattr(projection, 'in_features', model.head_hidden_size)

    def read(self, images: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor]]:
        for batch, features, size in self._features(images):
            yield batch, self.model.pool_unprojected(features, size)[:, None]

    def _of_batch(self, x: Any) -> Any:
        if self.from_features:
            several = isinstance(x, tuple | list)
            return [one.to(self.device) for one in x] if several else x.to(self.device)
        return self.model.forward_features(x.to(self.device))


def _ranks() -> tuple[int, int]:
    """World size and rank, (1, 0) without `torch.distributed`."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    return 1, 0
