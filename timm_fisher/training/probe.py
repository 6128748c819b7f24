"""Many heads and settings, trained side by side on the features of one frozen backbone.

The backbone runs once over the images (`cache_features`), and every epoch reads its features once
for all probes, so that a grid of heads and learning rates does not cost a pass for each. A head
that is only fitted gives its pooled vectors once, and its classifiers are trained on those.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm, trange

import timm_fisher
from timm_fisher import PooledModel
from timm_fisher.device import to_device
from timm_fisher.specification import HeadSpec, parse_heads
from timm_fisher.training.benchmark import timed
from timm_fisher.training.config import Config, Stage
from timm_fisher.training.data import Gives, create_datasets, load_splits, preprocessing
from timm_fisher.training.evaluate import accuracies
from timm_fisher.training.features import Cached, cache_features, cache_pooled
from timm_fisher.training.report import describe
from timm_fisher.training.run import create_model
from timm_fisher.training.stages import (
    Objective,
    create_objective,
    create_optimizer,
    create_scheduler,
    freeze,
)

# What the probes of a call may have of their own.
OWN = (
    'output',
    'head',
    'head_kwargs',
    'backbone_stage',
    'projection',
    'whiten',
    'pre_norm',
    'drop_rate',
    'stages',
)
LATER = ('output', 'stages')  # of no consequence for the model that is fitted
NEIGHBOURS = (1, 5, 20)  # numbers that validation images choose from


class Sources(Dataset[tuple[dict[str, list[Tensor]], int]]):
    """The same images in several forms by name, features and pooled vectors, and their labels."""

    def __init__(self, sources: Mapping[str, Cached]) -> None:
        self.sources = dict(sources)
        self.labels = next(iter(sources.values())).labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[dict[str, list[Tensor]], int]:
        return {name: cached[i][0] for name, cached in self.sources.items()}, int(self.labels[i])


@dataclass
class Probe:
    """One head with its classifier, while it is trained."""

    config: Config
    model: PooledModel
    places: list[int]  # of its stages among the cached ones
    source: str  # of what it is trained on
    objective: Objective
    optimizer: torch.optim.Optimizer
    scheduler: Any
    fit_seconds: float
    seconds: float = 0.0
    steps: int = 0
    diverged: bool = False
    best: dict[str, Any] = field(default_factory=lambda: {'val_accuracy': 0.0, 'epoch': 0})
    state: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._keep()

    @property
    def stage(self) -> Stage:
        """The only one."""
        return next(iter(self.config.stages.values()))

    def input(self, sources: dict[str, list[Tensor]]) -> list[Tensor]:
        """What it takes of a batch."""
        tensors = sources[self.source]
        return [tensors[place] for place in self.places] if self.source == 'features' else tensors

    def logits(self, sources: dict[str, list[Tensor]]) -> Tensor:
        """Of a batch."""
        x, model = self.input(sources), self.model
        if self.source != 'features':
            return model.classify(x[0])
        return model.forward_head(x)

    def step(self, sources: dict[str, list[Tensor]], labels: Tensor) -> None:
        """A step of the optimizer; a loss that is not finite ends the training."""
        # By the step, so that dropout does not depend on the other probes.
        torch.manual_seed(1_000_003 * self.config.seed + self.steps)
        try:
            loss = self.objective(self.input(sources), labels)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # an eigendecomposition of NaN
            self.diverged = True
            return
        self.diverged = not loss.isfinite().item()
        if self.diverged:
            return
        loss.backward()
        if self.stage.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.objective.parameters(), self.stage.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.project_()
        self.steps += 1
        self.scheduler.step_update(self.steps)

    def keep_best(self, accuracy: float, epoch: int) -> None:
        """Keep the parameters if the validation accuracy is the best so far."""
        if accuracy > self.best['val_accuracy']:
            self.best = {'val_accuracy': accuracy, 'epoch': epoch + 1}
            self._keep()

    def _keep(self) -> None:
        state = self.model.state_dict()
        own = {key: state[key] for key in state if not key.startswith('backbone.')}
        self.state = copy.deepcopy(own)


def train_probes(configs: Mapping[str, Config]) -> dict[str, dict[str, Any]]:
    """Fit, train and evaluate heads on cached features, all in one pass an epoch, in one process.

    Each configuration has one stage that trains a classifier, or head and classifier, and they
    share all but the head, its settings and the stage's. The epoch of the best validation accuracy
    is evaluated. Images come in the same order for all. Models are not saved.

    Returns:
        For each name what a run's metrics.json says; `knn`, for a head that is only fitted, is the
        accuracy of its nearest neighbours by cosine similarity. `diverged` is true if a loss was
        not finite; what validated best before counts then.

    Raises:
        ValueError: configurations that cannot share a pass; the message names them.
    """
    common = _check(configs)
    accelerator = Accelerator(mixed_precision=common.mixed_precision)
    set_seed(common.seed)
    splits, classes = load_splits(common)
    stages = sorted({head.stage for config in configs.values() for head in _heads(config)})
    readers: list[dict[str, Any]] = [{'name': 'avg', 'stage': stage} for stage in stages]
    reader = create_model(
        replace(common, head=readers, head_kwargs={}, backbone_stage=-1), len(classes)
    )
    to_device(reader, accelerator.device)
    images = create_datasets(common, splits, preprocessing(reader, common))
    features = {name: cache_features(reader, images[name], common, accelerator) for name in splits}
    with TemporaryDirectory(dir=common.cache_dir) as folder:
        pool = Pool(reader, stages, len(classes), features, Path(folder), accelerator)
        probes = {
            name: pool.create(config) for name, config in tqdm(configs.items(), 'fit', disable=None)
        }
        _train(probes, pool, common)
        return _measure(probes, pool)


@dataclass
class Pool:
    """What probes share: the backbone, its cached features, and what is made of these."""

    reader: PooledModel
    stages: list[int]  # that the features are of
    classes: int
    features: dict[str, Cached]
    folder: Path
    accelerator: Accelerator
    fitted: dict[str, tuple[PooledModel, float]] = field(default_factory=dict)
    pooled: dict[str, dict[str, Cached]] = field(default_factory=dict)

    def create(self, config: Config) -> Probe:
        """A probe with its head fitted."""
        name, stage = next(iter(config.stages.items()))
        key = json.dumps([getattr(config, option) for option in OWN if option not in LATER])
        if key not in self.fitted:
            self.fitted[key] = self._fit(config)
        fitted, seconds = self.fitted[key]
        model = copy.deepcopy(fitted, {id(self.reader.backbone): self.reader.backbone})
        set_seed(config.seed)
        model.reset_classifier(self.classes)
        places = [self.stages.index(reader.stage) for reader in model.descriptors]
        source = 'features'
        if stage.train == 'classifier' and not stage.head_loss:
            source = key
            if key not in self.pooled:
                self.pooled[key] = self._pool(model, places, config)
        freeze(model, name, stage)
        gives: Gives = 'features' if source == 'features' else 'pooled'
        objective = create_objective(model, stage, gives, self.classes)
        optimizer = create_optimizer(objective, stage)
        steps = -(-len(self.features['train']) // config.batch_size)
        scheduler = create_scheduler(optimizer, stage, steps)
        return Probe(config, model, places, source, objective, optimizer, scheduler, seconds)

    def _fit(self, config: Config) -> tuple[PooledModel, float]:
        """A model with its head fitted, over the common backbone, and the seconds of the fit."""
        set_seed(config.seed)
        model = create_model(replace(config, pretrained=False), self.classes)
        model.backbone = self.reader.backbone
        to_device(model, self.accelerator.device)
        places = [self.stages.index(reader.stage) for reader in model.descriptors]
        loader = DataLoader(self.features['train'].select(places), config.batch_size)
        options: Any = {'whiten': config.whiten, 'max_images': config.max_fit}
        fit = partial(timm_fisher.fit, model, loader, from_features=True, **options)
        return model, timed(fit, str(self.accelerator.device))[0]

    def _pool(self, model: PooledModel, places: list[int], config: Config) -> dict[str, Cached]:
        """Pooled vectors of all images, in files."""
        made = {}
        for split, features in self.features.items():
            path = self.folder / f'{len(self.pooled)}-{split}.npy'
            chosen = features.select(places)
            made[split] = cache_pooled(model, chosen, path, config, self.accelerator)
        return made

    def sources(self, split: str, probes: Iterable[Probe]) -> Sources:
        """The images of a split in the forms that some probes take."""
        every = {'features': self.features, **self.pooled}
        return Sources({name: every[name][split] for name in {probe.source for probe in probes}})


def _heads(config: Config) -> list[HeadSpec]:
    return parse_heads(config.head, config.head_kwargs, config.backbone_stage)


def _check(configs: Mapping[str, Config]) -> Config:
    """The first configuration, if all can share a pass with it."""
    first = next(iter(configs.values()))
    for name, config in configs.items():
        stages = list(config.stages.values())
        stage = stages[0]
        if len(stages) > 1 or not config.caches(stage) or not config.classifies:
            raise ValueError(
                f"'{name}' is no probe: it takes one stage, that trains a classifier or a head on "
                'cached features, without augmentation.'
            )
        fp16, accumulates = config.mixed_precision == 'fp16', config.grad_accum_steps > 1
        if stage.sched == 'plateau' or fp16 or accumulates or stage.per_class:
            raise ValueError(
                f"'{name}': probes know neither sched: plateau, mixed_precision: fp16, "
                'grad_accum_steps nor per_class.'
            )
        mine, theirs = asdict(config), asdict(first)
        changed = [key for key in mine if key not in OWN and mine[key] != theirs[key]]
        if changed:
            raise ValueError(
                f"'{name}' has {changed[0]}={mine[changed[0]]!r}, others "
                f'{theirs[changed[0]]!r}: heads that share a pass must share it.'
            )
    return first


def _train(probes: dict[str, Probe], pool: Pool, config: Config) -> None:
    generator = torch.Generator().manual_seed(config.seed)
    device = pool.accelerator.device
    epochs = max(probe.stage.epochs for probe in probes.values())
    for epoch in (bar := trange(epochs, desc=f'{len(probes)} probes', disable=None)):
        running = [
            probe for probe in probes.values() if epoch < probe.stage.epochs and not probe.diverged
        ]
        if not running:
            break
        for probe in running:
            probe.objective.train()
        sources = pool.sources('train', running)
        loader = DataLoader(sources, config.batch_size, shuffle=True, generator=generator)
        for batch in loader:
            x, y = send_to_device(batch, device)
            for probe in (probe for probe in running if not probe.diverged):
                with pool.accelerator.autocast():
                    probe.seconds += timed(partial(probe.step, x, y), str(device))[0]
        running = [probe for probe in running if not probe.diverged]
        results = _accuracies(running, pool, 'val')
        for probe, result in zip(running, results, strict=True):
            probe.keep_best(result['accuracy'], epoch)
        best = max(probe.best['val_accuracy'] for probe in probes.values())
        bar.set_postfix_str(f'best {best:.2%}')


@torch.no_grad()
def _accuracies(probes: list[Probe], pool: Pool, split: str) -> list[dict[str, Any]]:
    """`accuracies` of each probe on a split, which is read once."""
    if not probes:
        return []
    sources = pool.sources(split, probes)
    batch_size = max(probe.config.batch_size for probe in probes)
    for probe in probes:
        probe.objective.eval()
    predicted: list[list[int]] = [[] for _ in probes]
    for batch in DataLoader(sources, batch_size):
        x, _ = send_to_device(batch, pool.accelerator.device)
        with pool.accelerator.autocast():
            for probe, rows in zip(probes, predicted, strict=True):
                rows += probe.logits(x).argmax(1).tolist()
    return [accuracies(sources.labels.tolist(), rows) for rows in predicted]


def _measure(probes: dict[str, Probe], pool: Pool) -> dict[str, dict[str, Any]]:
    """Metrics of the best epoch of each probe."""
    split = 'test' if 'test' in pool.features else 'val'
    for probe in probes.values():
        probe.model.load_state_dict(probe.state, strict=False)
    results = _accuracies(list(probes.values()), pool, split)
    neighbours = {name: nearest_neighbours(pooled, split) for name, pooled in pool.pooled.items()}
    measured: dict[str, dict[str, Any]] = {}
    for (name, probe), result in zip(probes.items(), results, strict=True):
        measured[name] = {
            split: result,
            'best': probe.best,
            'diverged': probe.diverged,
            **describe(probe.config, probe.model, pool.accelerator),
            'steps': probe.steps,
            'seconds': {'fit': probe.fit_seconds, 'train': probe.seconds},
        }
        if probe.source in neighbours:
            measured[name]['knn'] = neighbours[probe.source]
    return measured


def nearest_neighbours(pooled: Mapping[str, Cached], split: str) -> dict[str, Any]:
    """`accuracy` on a split of the labels of the k training vectors that are nearest by cosine,
    nearer ones with more weight, and `k`, which validation images choose."""
    vectors = {name: np.asarray(cached.arrays[0]) for name, cached in pooled.items()}
    models = [
        KNeighborsClassifier(k, metric='cosine', weights='distance').fit(
            vectors['train'], pooled['train'].labels
        )
        for k in NEIGHBOURS
        if k <= len(vectors['train'])
    ]
    # The first of equals.
    best = max(models, key=lambda model: model.score(vectors['val'], pooled['val'].labels))
    accuracy = best.score(vectors[split], pooled[split].labels)
    return {'k': best.n_neighbors, 'accuracy': float(accuracy)}
