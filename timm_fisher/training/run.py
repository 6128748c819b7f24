"""Train a pooling head on a timm backbone, in stages.

`train` leaves in `config.output`: model/ (best on the validation split) and last/, both loadable by
`timm.create_model('local-dir:...', pretrained=True)`; metrics.json, log.jsonl, curve.png,
config.yaml, and the checkpoint that `resume` continues from exactly.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedDataParallelKwargs, broadcast, send_to_device, set_seed
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

import timm_fisher
from timm_fisher import PooledModel
from timm_fisher.files import write
from timm_fisher.training.checkpoint import Checkpoints, Progress
from timm_fisher.training.config import Config, Stage
from timm_fisher.training.data import Images, create_datasets, load_splits
from timm_fisher.training.features import Cached, cache_features, cache_pooled
from timm_fisher.training.folder import open_folder
from timm_fisher.training.interrupt import Interruption
from timm_fisher.training.loop import Trainer, refuse_non_finite
from timm_fisher.training.report import describe, head_names
from timm_fisher.training.stages import Objective, create_objective, freeze


def train(config: Config) -> dict[str, Any]:
    """Fit, train in stages, evaluate and save, as a configuration says.

    Returns:
        The content of metrics.json.

    Raises:
        ValueError: settings or data that do not fit; the message says what to do.
        FloatingPointError: a loss is not finite.
        Interrupted: a signal ended the run.
    """
    accelerator = _create_accelerator(config)
    set_seed(config.seed)
    say = accelerator.print
    with (
        open_folder(config, accelerator) as output,
        Interruption(accelerator, output) as interruption,
    ):
        # Data
        splits, classes = load_splits(config)
        if config.unsupervised:
            classes = []  # an untrained classifier would mislead

        # Model
        model = create_model(config, len(classes)).to(memory_format=torch.channels_last)
        for name, stage in config.stages.items():
            freeze(model, name, stage)  # refuses what does not fit before anything is computed
        model.requires_grad_(True)
        requested = {'img_size': config.img_size, 'crop_pct': config.crop_pct}
        data_config = timm.data.resolve_input_data_config(model, requested)
        images = create_datasets(config, splits, data_config)
        sizes = ', '.join(f'{len(split.indices)} {name}' for name, split in splits.items())
        say(f'{len(classes)} classes; {sizes} images at {data_config["input_size"]}')
        say(f'{head_names(config)} on {config.backbone}: {model.head_hidden_size} pooled features')

        # Fit
        run = Run(config, accelerator, model, images, classes, data_config, interruption)
        checkpoint = run.checkpoints.latest
        if checkpoint is None:
            run.fit()
            say(f'fit: {run.progress.seconds["fit"]:.1f} s')
        else:
            run.progress = run.checkpoints.load_progress(checkpoint)
            say(f'resuming after {checkpoint.name}')

        # Stages
        for name, stage in config.stages.items():
            if name not in run.progress.finished:
                run.train_stage(name, stage)

        # Evaluate the best epoch
        split = 'test' if 'test' in images else 'val'
        result = run.evaluate_best(split)

        # Save
        metrics = run.save_metrics(split, result)
        say(f'{split} {_summary(result)} of {result["samples"]} images -> {output}')
    accelerator.end_training()
    return metrics


def create_model(config: Config, num_classes: int) -> PooledModel:
    """The model that a configuration asks for, untrained but for a pretrained backbone."""
    return timm_fisher.create_model(
        config.backbone,
        config.head,
        pretrained=config.pretrained,
        num_classes=num_classes,
        head_kwargs=config.head_kwargs,
        backbone_kwargs=config.backbone_kwargs,
        img_size=config.img_size,
        drop_rate=config.drop_rate,
        stage=config.backbone_stage,
        class_token=config.class_token,
        last_stride=config.last_stride,
    )


class Run:
    """Model, data and progress of a run, and the steps of which `train` consists.

    Args:
        config: its settings.
        accelerator: where it computes.
        model: what it trains.
        images: from `create_datasets`.
        classes: their names, which are saved with the model; none without a classifier.
        data_config: of the images, likewise.
        interruption: the context of signals that it is in.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        model: PooledModel,
        images: dict[str, Images],
        classes: list[str],
        data_config: dict[str, Any],
        interruption: Interruption,
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.model, self.images = model, images
        self.classes, self.data_config = classes, data_config
        self.interruption = interruption
        self.output = Path(config.output)
        self.progress = Progress()
        self.checkpoints = Checkpoints(self.output, accelerator, model, self._save_model)

    def fit(self) -> None:
        """Start the heads from data."""
        dataset = self._datasets(next(iter(self.config.stages.values())))['train']
        self.model.to(self.accelerator.device)
        with self._timed('fit'):
            from_features = dataset.gives == 'features'
            timm_fisher.fit(self.model, self._loader(dataset), from_features=from_features)

    def train_stage(self, name: str, stage: Stage) -> None:
        """Train one stage, from its beginning or from the checkpoint inside it."""
        config, accelerator = self.config, self.accelerator
        datasets = self._datasets(stage)
        freeze(self.model, name, stage)
        if stage.train == 'classifier' and config.caches(stage) and not stage.head_loss:
            datasets = self._pooled(datasets)
        # Seeded by the stage, so that resuming at its beginning is exact; and by the rank, so that
        # the ranks draw different augmentation and dropout.
        number = list(config.stages).index(name)
        set_seed(config.seed + 1000 * (number + 1), device_specific=True)
        objective = create_objective(self.model, stage, datasets['train'].gives)
        enough = config.batch_size * accelerator.num_processes <= len(datasets['train'])
        drop_last = objective.whole_batches and enough
        loader = self._loader(datasets['augmented'], shuffle=True, drop_last=drop_last)
        trainer = Trainer(config, accelerator, self.interruption, name, objective, loader)

        done = 0  # epochs of this stage
        history, checkpoint = self.progress.history, self.checkpoints.latest
        if checkpoint is not None and history and history[-1]['stage'] == name:
            done = history[-1]['epoch']
            self.checkpoints.load_state(checkpoint, trainer.scheduler)
        with self.interruption.at_steps():
            for epoch in range(done, stage.epochs):
                self._run_epoch(trainer, objective, epoch, datasets['val'])
            if accelerator.is_main_process:
                shutil.rmtree(self.output / 'pooled', ignore_errors=True)
        accelerator.free_memory()

    def _run_epoch(
        self, trainer: Trainer, objective: Objective, epoch: int, val: Images | Cached
    ) -> None:
        """Train, validate, report, keep the model if it is the best, and write the checkpoint."""
        start, steps = time.perf_counter(), len(trainer.loader)
        rate = trainer.learning_rate
        with self._timed('train'):
            loss = trainer.train_epoch(epoch)
            result = self._evaluate(objective, val, 'val')
        val_loss: float = result[objective.loss_name]
        refuse_non_finite(val_loss, f'{trainer.name}, validation of epoch {epoch + 1}', self.output)
        if trainer.plateau:
            trainer.scheduler.step(loss)
        row: dict[str, Any] = {
            'stage': trainer.name,
            'epoch': epoch + 1,
            'lr': rate,
            'train_loss': loss,
            'val_loss': val_loss,
        }
        accuracy = ''
        if 'accuracy' in result:
            row['val_accuracy'] = result['accuracy']
            accuracy = f'val accuracy {result["accuracy"]:.2%}, '
        row['seconds'] = round(time.perf_counter() - start, 2)
        self.accelerator.print(
            f'{trainer.name} {epoch + 1}: lr {rate:.2g}, train loss {loss:.4f}, val loss '
            f'{val_loss:.4f}, {accuracy}{row["seconds"]:.1f} s'
        )
        self.progress.steps += steps
        ends_stage = epoch + 1 == trainer.stage.epochs
        if self.progress.add(row, ends_stage=ends_stage) and self.accelerator.is_main_process:
            self._save_model(self.output / 'model')
        self.checkpoints.save(self.progress, trainer.scheduler, ends_stage=ends_stage)

    def evaluate_best(self, split: str) -> dict[str, Any]:
        """The results of the epoch that validated best, which the model becomes."""
        stage = self.config.stages[self.progress.best['stage']]
        self.checkpoints.load_weights(self.output / 'model')
        dataset = self._datasets(stage)[split]
        return self._evaluate(create_objective(self.model, stage, dataset.gives), dataset, split)

    def save_metrics(self, split: str, result: dict[str, Any]) -> dict[str, Any]:
        """Write last/ and metrics.json; its content."""
        progress = self.progress
        metrics = {
            split: result,
            'best': progress.best,
            **describe(self.config, self.model, self.accelerator),
            'img_size': self.data_config['input_size'][-1],
            'steps': progress.steps,
            'seconds': {key: round(value, 2) for key, value in progress.seconds.items()},
        }
        if self.accelerator.is_main_process:
            last = self.checkpoints.latest
            if last is not None:
                shutil.rmtree(self.output / 'last', ignore_errors=True)
                shutil.copytree(last / 'model', self.output / 'last')
            write(self.output / 'metrics.json', json.dumps(metrics, indent=2) + '\n')
        return metrics

    def _datasets(self, stage: Stage) -> dict[str, Images] | dict[str, Cached]:
        """Images, or features of the backbone as it is now where the stage works on those."""
        if not self.config.caches(stage):
            return self.images
        arguments = (self.config, self.accelerator)
        with self._timed('features'):
            features = {
                name: cache_features(self.model, images, *arguments)
                for name, images in self.images.items()
                if name != 'augmented'
            }
        return {**features, 'augmented': features['train']}

    def _pooled(self, features: dict[str, Any]) -> dict[str, Cached]:
        """Pooled vectors of features, for a stage that trains the classifier alone."""
        arguments = (self.config, self.accelerator)
        with self._timed('features'):
            pooled = {
                name: cache_pooled(self.model, features[name], name, *arguments)
                for name in ('train', 'val')
            }
        return {**pooled, 'augmented': pooled['train']}

    def _loader(
        self, dataset: Dataset[Any], *, shuffle: bool = False, drop_last: bool = False
    ) -> DataLoader[Any]:
        """A loader over a data set, before accelerate prepares it."""
        # Cached features come from a memory map: workers would only copy them once more.
        whole: Any = dataset.dataset if isinstance(dataset, Subset) else dataset
        return DataLoader(
            dataset,
            self.config.batch_size,
            shuffle=shuffle,
            num_workers=self.config.workers if whole.gives == 'images' else 0,
            drop_last=drop_last,
        )

    def _evaluate(
        self, objective: Objective, dataset: Images | Cached, name: str
    ) -> dict[str, Any]:
        """Results of an objective on a data set, each image counted once, on all ranks."""
        accelerator = self.accelerator
        objective.to(accelerator.device).eval()
        # DDP gives rank 0's batch-norm statistics to the others only at its next step.
        broadcast([*self.model.buffers()])
        with accelerator.autocast():
            return objective.evaluate(self._batches(dataset, name))

    def _batches(self, dataset: Images | Cached, name: str) -> Iterator[tuple[Any, Tensor]]:
        """This rank's share of a data set."""
        accelerator = self.accelerator
        share = range(accelerator.process_index, len(dataset), accelerator.num_processes)
        loader = self._loader(Subset(dataset, share))
        for batch in tqdm(
            loader, name, leave=False, disable=not accelerator.is_main_process or None
        ):
            x, y = send_to_device(batch, accelerator.device)
            yield x, y

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.progress.seconds[what] += time.perf_counter() - start

    def _save_model(self, folder: Path) -> None:
        timm_fisher.save_model(
            self.model,
            folder,
            label_names=self.classes or None,
            data_config=self.data_config,
        )


def _summary(result: dict[str, Any]) -> str:
    if 'accuracy' in result:
        return f'accuracy {result["accuracy"]:.2%}'
    return f'unsupervised loss {result["unsupervised_loss"]:.4g}'


def _create_accelerator(config: Config) -> Accelerator:
    # An unsupervised loss need not depend on all that the stage trains.
    unsupervised = any(stage.unsupervised for stage in config.stages.values())
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.grad_accum_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unsupervised)],
    )
    launched = 'ACCELERATE_MIXED_PRECISION' in os.environ
    if accelerator.device.type == 'cpu' and launched and os.environ.get('OMP_NUM_THREADS') == '1':
        # `accelerate launch` sets one thread per process unless it is told otherwise.
        torch.set_num_threads(max(1, _cpu_count() // accelerator.num_processes))
    return accelerator


def _cpu_count() -> int:
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
