"""`fit(model, loader)`: start a model's heads from data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from timm_fisher.fitting.stream import ModelStream

if TYPE_CHECKING:
    from timm_fisher.model import PooledModel


def fit(model: PooledModel, loader: DataLoader[Any], *, from_features: bool = False) -> None:
    """Start a model's pooling heads from data (PCA, dictionary, ...), in place, one by one.

    The backbone runs in eval mode and is not changed. Under `torch.distributed` every rank must
    call it with the same data set; each reads its share, and the fit is that of one process.

    Args:
        model: a `PooledModel`, on the device where the backbone is to run.
        loader: a torch `DataLoader` over a map-style data set; see `ModelStream`.
        from_features: the data set holds what `model.forward_features` gives, not images.

    Raises:
        TypeError: the loader is not a `DataLoader` over a map-style data set.
        ValueError: an empty data set, or descriptors that are not finite.
    """
    for i, (head, _) in enumerate(model.heads):
        head.fit(ModelStream(model, loader, index=i, from_features=from_features))
