"""Fisher vectors of a data set by a Boltzmann machine, with the rank and the ridge of their Fisher
information chosen afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from scipy import sparse
from sklearn.preprocessing import normalize
from torch import Tensor

from timm_fisher import PooledModel
from timm_fisher.heads.dbm_idfk import DBMFisher
from timm_fisher.training.config import Config
from timm_fisher.training.embeddings import create_embedder, fit_once, outputs
from timm_fisher.training.features import Cached

SATURATION_IMAGES = 1024


class BoltzmannKernel:
    """A `dbm_idfk` model, fitted to features of the split 'train' and kept in a folder, if there is
    one; and the Fisher vectors of several splits.

    Attributes:
        model: the fitted model, without classifier.
        head: its `DBMFisher`.
        seconds: that the fit took.
        vectors: phi of unit length, without Fisher information (DFK; FK of an RBM): CSR `[n, d]`
            float32 of each split; sparse, for where a pixel is off, its products are zero.
        saturated: share of posteriors within 0.05 of 0 or 1, for each layer, over 1024 images.
    """

    def __init__(self, config: Config, features: Mapping[str, Cached], folder: Path | None) -> None:
        self._config = config
        self.model = model = create_embedder(config)
        self.head = head = cast(DBMFisher, model.head)
        self.seconds = fit_once(model, features['train'], folder, config)

        def vectors(x: list[Tensor]) -> Tensor:
            return head.normalized_score(model.descriptors(x)[0])

        def saturated(x: list[Tensor]) -> Tensor:
            layers = head.posteriors(model.descriptors(x)[0])
            return torch.stack([((mu - 0.5).abs() > 0.45).float().mean() for mu in layers])

        self.vectors = {}
        for split, part in features.items():
            parts = [sparse.csr_matrix(x.cpu().numpy()) for x in outputs(model, part, vectors)]
            self.vectors[split] = sparse.vstack(parts, format='csr')
        first = outputs(model, features['train'], saturated, batch_size=SATURATION_IMAGES)
        self.saturated: list[float] = next(first).tolist()

    @cached_property
    def _along_axes(self) -> dict[str, np.ndarray]:
        """Coordinates `[n, rank]` along the axes of the Fisher information, off the mean."""
        axes = self.head.axes.cpu().numpy()
        mean = np.asarray(self.vectors['train'].mean(0)) @ axes
        return {split: phi @ axes - mean for split, phi in self.vectors.items()}

    def whitened(self, rank: int, ridge: float) -> dict[str, np.ndarray]:
        """IDFK: vectors `[n, rank]` of unit length with the leading axes of the Fisher information,
        at most as many as the head's, the training mean taken off. The head's ridge becomes this
        one."""
        self.head.ridge = ridge
        scale = self.head.inverse_root(torch.float32).cpu().numpy()[:rank]
        return {split: normalize(z[:, :rank] * scale) for split, z in self._along_axes.items()}

    def truncated(self, rank: int, ridge: float) -> PooledModel:
        """The model with a smaller rank and another ridge."""
        model = create_embedder(self._config, rank=rank, ridge=ridge)
        state = self.model.state_dict()
        state['head.axes'] = state['head.axes'][:, :rank]
        state['head.variances'] = state['head.variances'][:rank]
        model.load_state_dict(state)
        return model
