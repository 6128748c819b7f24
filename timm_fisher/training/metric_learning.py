"""Stages that train for search: losses, miners and batches of metric learning.

The losses and miners are those of pytorch-metric-learning, by the names of their classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.utils.data import Sampler

from timm_fisher import PooledModel
from timm_fisher.numerics.linalg import without_autocast
from timm_fisher.registry import check_arguments, nearest
from timm_fisher.retrieval import evaluate_retrieval
from timm_fisher.training.config import Stage
from timm_fisher.training.data import Gives

LOSS = 'loss.safetensors'  # in a checkpoint


class MetricLearning(nn.Module):
    """A loss of pytorch-metric-learning on pooled vectors of unit length, gathered over ranks: two
    of them train as one process would with batches of twice the size.

    Args:
        model: its vectors are those after the projection; its classifier is not used.
        stage: with a `loss`, and perhaps a `miner`.
        gives: what a data set gives.
        classes: how many.

    Raises:
        ValueError: an unknown loss or miner, or one that does not take these numbers.
        TypeError: an unknown argument of it.
        ModuleNotFoundError: pytorch-metric-learning is not installed.
    """

    whole_batches = True
    weight = 1.0  # of the loss in the gradient
    loss_name = 'missing_map_at_r'  # in the results of `evaluate`

    def __init__(self, model: PooledModel, stage: Stage, gives: Gives, classes: int) -> None:
        super().__init__()
        self.model, self.gives = model, gives
        known = {'num_classes': classes, 'embedding_size': model.head_hidden_size}
        self.loss = _create('losses', stage.loss, known)
        self.miner = _create('miners', stage.miner, {}) if stage.miner else None

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """The loss of images `[B, 3, H, W]`, a list of features or one of pooled vectors, and
        labels `[B]`, together with those of other ranks."""
        vectors, labels = self._vectors(x), y
        if dist.is_initialized() and self.training:
            # Each rank has the whole loss, and gets the gradients of all: their mean, which DDP
            # takes, is that of one process.
            vectors, labels = torch.cat(all_gather(vectors)), torch.cat(all_gather(y))
        with without_autocast(vectors):
            pairs = None if self.miner is None else self.miner(vectors, labels)
            loss: Tensor = self.loss(vectors, labels, pairs)
        return loss

    @torch.no_grad()
    def evaluate(self, batches: Any) -> dict[str, Any]:
        """`recall_at_1` and `map_at_r` of a data set, each image searched among the others, and
        what MAP@R lacks of 1; the classes may be others than those of training. `batches` are this
        rank's share of it."""
        rows: list[tuple[np.ndarray, int]] = []
        for x, y in batches:
            rows += zip(self._vectors(x).cpu().numpy(), y.tolist(), strict=True)
        vectors, labels = zip(*gather_object(rows), strict=True)
        found = evaluate_retrieval(
            torch.from_numpy(np.stack(vectors)), torch.tensor(labels), ks=(1,)
        )
        return {
            'recall_at_1': found['recall_at_1'],
            'map_at_r': found['map_at_r'],
            self.loss_name: 1 - found['map_at_r'],
            'samples': len(labels),
        }

    def save_loss(self, folder: Path) -> None:
        """Write what the loss has learned itself, such as proxies of the classes."""
        save_file(self.loss.state_dict(), folder / LOSS)

    def load_loss(self, folder: Path) -> None:
        """Take it back."""
        self.loss.load_state_dict(load_file(folder / LOSS))

    def _vectors(self, x: Any) -> Tensor:
        model = self.model
        if self.gives == 'pooled':
            pooled = x[0]
        elif self.gives == 'features':
            pooled = model.pool(x)
        else:
            pooled = model.pool(model.forward_features(x), x.shape[2:])
        return F.normalize(pooled.float(), dim=1)


def _create(kind: str, wanted: dict[str, Any], known: dict[str, Any]) -> nn.Module:
    """A loss or miner from its `name` and arguments; what the run knows is added."""
    try:
        import pytorch_metric_learning.losses
        import pytorch_metric_learning.miners
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'Losses of metric learning need pip install "timm_fisher[retrieval]".'
        ) from None
    module = getattr(pytorch_metric_learning, kind)
    names = [name for name, value in vars(module).items() if inspect.isclass(value)]
    arguments = dict(wanted)
    name = arguments.pop('name', None)
    if name not in names:
        raise ValueError(
            f"pytorch-metric-learning has no '{name}' among its {kind}.{nearest(str(name), names)}"
        )
    made = getattr(module, name)
    # A class with **kwargs passes them to that after it.
    takes = {
        key for parent in made.__mro__ for key in inspect.signature(parent.__init__).parameters
    }
    added = {key: value for key, value in known.items() if key in takes}
    check_arguments(name, made, arguments, given=list(added))
    try:
        result: nn.Module = made(**added, **arguments)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{name} does not take {arguments}: {error}') from error
    return result


class PerClassSampler(Sampler[int]):
    """Images in the order of batches that hold several of a class.

    Classes follow each other in random order, each with `per_class` images, until all have had
    their turn; and so on. The images of a class come in random order, and again once all have come.
    An epoch has as many whole batches as the images make, at least one. All follows from the seed
    and the epoch, on every rank.

    Args:
        labels: classes of the images.
        per_class: images of a class at a time.
        batch_size: a multiple of it.
        seed: of the order.
    """

    def __init__(
        self, labels: Sequence[int] | np.ndarray, per_class: int, batch_size: int, seed: int
    ) -> None:
        self.places = [np.flatnonzero(labels == c) for c in np.unique(labels)]
        self.per_class, self.seed, self.epoch = per_class, seed, 0
        self.length = max(1, len(labels) // batch_size) * batch_size

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Another order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        queues = [iter(self._forever(places, random)) for places in self.places]
        classes = self._forever(np.arange(len(queues)), random)
        for _ in range(self.length // self.per_class):
            queue = queues[next(classes)]
            yield from (next(queue) for _ in range(self.per_class))

    @staticmethod
    def _forever(places: np.ndarray, random: np.random.Generator) -> Iterator[int]:
        while True:
            yield from random.permutation(places).tolist()
