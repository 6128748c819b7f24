"""`fit(model, loader)`, and the fits that two heads or more use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from timm_fisher.stream import ModelStream

if TYPE_CHECKING:
    from timm_fisher.model import PooledModel


def fit(model: PooledModel, loader: DataLoader[Any], *, from_features: bool = False) -> None:
    """Start a model's pooling head from data (PCA, dictionary, ...), in place.

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
    model.head.fit(ModelStream(model, loader, from_features=from_features))


def pca(rows: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Principal components of descriptors, computed in float64.

    Args:
        rows: descriptors `[M, C]`.
        dim: how many components, at most C.

    Returns:
        Components `[dim, C]`, orthonormal rows in order of falling variance, each with its
        largest entry positive; and the mean `[C]`. Both float64.

    Raises:
        ValueError: `rows` holds a value that is not finite, or `dim` exceeds C.
    """
    if dim > rows.shape[1]:
        raise ValueError(f'PCA to {dim} dimensions asked of {rows.shape[1]}-dimensional rows.')
    if not torch.isfinite(rows).all():
        raise ValueError(
            'The descriptors hold NaN or infinite values, so nothing can be fitted to them. Check '
            'the backbone: its weights, and whether it overflows in half precision.'
        )
    rows = rows.double()
    mean = rows.mean(0)
    centred = rows - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    components = vectors.flip(1).T[:dim]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return components * torch.where(largest < 0, -1.0, 1.0), mean
