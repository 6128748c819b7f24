"""`fit(model, loader)`: start a model's heads, and its projection, from data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from timm_fisher.fitting.stream import ModelStream, PooledStream
from timm_fisher.layers import Projection

if TYPE_CHECKING:
    from timm_fisher.model import PooledModel


# Of the vectors that a projection is fitted to: half a gigabyte in float64.
MOST_VALUES = 2**26


def fit(
    model: PooledModel,
    loader: DataLoader[Any],
    *,
    from_features: bool = False,
    whiten: float = 0.0,
) -> None:
    """Start a model's pooling heads from data (PCA, dictionary, ...), in place, one by one; then
    its projection, if it has one, from the principal components of what they give.

    The backbone runs in eval mode and is not changed. Under `torch.distributed` every rank must
    call it with the same data set; each reads its share, and the fit is that of one process.

    Args:
        model: a `PooledModel`, on the device where the backbone is to run.
        loader: a torch `DataLoader` over a map-style data set; see `ModelStream`.
        from_features: the data set holds what `model.forward_features` gives, not images.
        whiten: strength of whitening by the projection, from 0, which keeps distances, to 1, which
            gives all components the same variance. Of vectors of D values 2^26 / D images are read
            at most, or one more than the projection has dimensions.

    Raises:
        TypeError: the loader is not a `DataLoader` over a map-style data set.
        ValueError: an empty data set, descriptors that are not finite, or fewer images than the
            projection has dimensions.
    """
    for i, (head, _) in enumerate(model.heads):
        head.fit(ModelStream(model, loader, index=i, from_features=from_features))
    if isinstance(model.projection, Projection):
        stream = PooledStream(model, loader, from_features=from_features)
        number = max(MOST_VALUES // stream.num_features, model.projection.out_features + 1)
        vectors = stream.sample_images(number, lambda x: x[:, 0])
        model.projection.fit(vectors, whiten)
