"""`fit(model, loader)`: start a model's heads, and its projection, from data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from timm_fisher.fitting.stream import ModelStream, PooledStream
from timm_fisher.layers import Projection

if TYPE_CHECKING:
    from timm_fisher.model import PooledModel


# Of the vectors that a projection is fitted to: half a gigabyte in float64.
MOST_VALUES = 2**26


def fit(
    model: PooledModel,
    loader: Iterable[Any],
    *,
    from_features: bool = False,
    whiten: float = 0.0,
    max_images: int | None = None,
) -> int:
    """Start a model's pooling heads from data (PCA, dictionary, ...), in place, one by one; then
    its projection, if it has one, from the principal components of what they give.

    The backbone runs in eval mode and is not changed. Under `torch.distributed` every rank must
    call it. Of a map-style data set, the same on all ranks, each reads its share; of anything else
    each reads its own loader, which gives a share. The fit is that of one process.

    Args:
        model: a `PooledModel`, on the device where the backbone is to run.
        loader: a torch `DataLoader`, or anything else that gives batches of (image, ...) each time
            it is iterated over; see `ModelStream`.
        from_features: the loader gives what `model.forward_features` gives, not images.
        whiten: strength of whitening by the projection, from 0, which keeps distances, to 1, which
            gives all components the same variance. Of vectors of D values 2^26 / D images are read
            at most, or one more than the projection has dimensions.
        max_images: pass over at most so many images; None for all.

    Returns:
        The images of the longest pass, over all ranks: 0 where nothing has to be fitted.

    Raises:
        TypeError: the loader can be iterated over once, or not at all.
        ValueError: no images, descriptors that are not finite, or fewer images than the projection
            has dimensions.
    """
    options: dict[str, Any] = {'from_features': from_features, 'max_images': max_images}
    streams = []
    for i, (head, _) in enumerate(model.heads):
        streams.append(ModelStream(model, loader, index=i, **options))
        head.fit(streams[-1])
    if isinstance(model.projection, Projection):
        streams.append(PooledStream(model, loader, **options))
        number = max(MOST_VALUES // streams[-1].num_features, model.projection.out_features + 1)
        vectors = streams[-1].sample_images(number, lambda x: x[:, 0])
        model.projection.fit(vectors, whiten)
    return max(int(stream.sum(torch.tensor(stream.seen))[0]) for stream in streams)
