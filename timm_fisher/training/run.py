"""Train a pooling head on a timm backbone, in stages.

`train` leaves in `config.output`: model/ (best on the validation split) and last/, both loadable by
`timm.create_model('local-dir:...', pretrained=True)`; metrics.json, log.jsonl, curve.png,
config.yaml, and the checkpoint that `resume` continues from exactly.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, send_to_device, set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm.auto import tqdm

import timm_fisher
from timm_fisher import PooledModel
from timm_fisher.device import to_device
from timm_fisher.files import write
from timm_fisher.training.accelerator import create_accelerator
from timm_fisher.training.checkpoint import (
    Interruption,
    Progress,
    latest_checkpoint,
    open_folder,
    save_checkpoint,
)
from timm_fisher.training.config import Config, Stage
from timm_fisher.training.data import Images, create_datasets, load_splits, preprocessing
from timm_fisher.training.features import (
    Cached,
    cache_features,
    cache_pooled,
    create_loader,
    has_room,
)
from timm_fisher.training.metric_learning import MetricLearning, PerClassSampler
from timm_fisher.training.report import describe, draw_curve, head_names, one_line
from timm_fisher.training.stages import (
    Objective,
    create_objective,
    create_optimizer,
    create_scheduler,
    freeze,
    set_training_mode,
)
from timm_fisher.training.streams import StreamImages, create_streams, load_streams


def train(config: Config) -> dict[str, Any]:
    """Fit, train in stages, evaluate and save, as a configuration says; returns metrics.json.

    Raises:
        ValueError: settings or data that do not fit; the message says what to do.
        FloatingPointError: a loss is not finite.
        KeyboardInterrupt: a signal ended the run.
    """
    accelerator = create_accelerator(config)
    set_seed(config.seed)
    say = accelerator.print
    with (
        open_folder(config, accelerator) as output,
        Interruption(accelerator, output) as interruption,
    ):
        # Data
        splits: Any
        splits, classes = (load_streams if config.streamed else load_splits)(config)
        if config.unsupervised:
            classes = []  # an untrained classifier would mislead

        # Model
        number = len(classes) if config.classifies else 0
        model = to_device(create_model(config, number), accelerator.device)
        for name, stage in config.stages.items():
            # Refuse what does not fit before anything is computed.
            freeze(model, name, stage)
            create_optimizer(create_objective(model, stage, 'images', len(classes)), stage)
        model.requires_grad_(True)
        data_config = preprocessing(model, config)
        create = create_streams if config.streamed else create_datasets
        images: Any = create(config, splits, data_config)
        sizes = ', '.join(f'{len(images[name])} {name}' for name in splits)
        say(f'{len(classes)} classes; {sizes} images at {data_config["input_size"]}')
        weights = '' if config.pretrained else ', from random weights'
        size = model.head_hidden_size
        say(f'{head_names(config)} on {config.backbone}{weights}: {size} pooled features')

        # Fit
        precision = accelerator.mixed_precision
        progress = Progress({'processes': accelerator.num_processes, 'mixed_precision': precision})
        run = Run(
            config, accelerator, interruption, progress, output, model, images, classes, data_config
        )
        checkpoint = latest_checkpoint(output)
        if checkpoint is None:
            seen = run.fit()
            say(f'fit: {seen} images seen, {run.progress.seconds["fit"]:.1f} s')
        else:
            run.resume(checkpoint)
            say(f'resuming after {checkpoint.name}')

        # Stages
        for name, stage in config.stages.items():
            run.train_stage(name, stage)
        if accelerator.is_main_process:
            run.save_model(output / 'last')

        # Evaluate
        metrics = run.evaluate_best()
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
        lora=config.lora,
        img_size=config.img_size,
        projection=config.projection,
        pre_norm=config.pre_norm,
        drop_rate=config.drop_rate,
        stage=config.backbone_stage,
        class_token=config.class_token,
        last_stride=config.last_stride,
    )


def load_weights(model: PooledModel, folder: Path) -> None:
    """Weights of a saved model into one of the same configuration, all or none."""
    model.load_state_dict(safetensors.torch.load_file(folder / 'model.safetensors'))


Data = Images | Cached | StreamImages


@dataclass
class Training:
    """A stage while it is trained, with what accelerate made of it."""

    name: str
    stage: Stage
    val: Data
    objective: Objective
    module: nn.Module  # the objective, wrapped by DDP
    optimizer: Any
    loader: Any
    scheduler: Any
    sampler: PerClassSampler | None


@dataclass
class Run:
    """Model, data and progress of a run, and the steps of which `train` consists."""

    config: Config
    accelerator: Accelerator
    interruption: Interruption
    progress: Progress
    output: Path
    model: PooledModel
    images: dict[str, Any]  # `Data` by split
    classes: list[str]  # none without a classifier
    data_config: dict[str, Any]

    def fit(self) -> int:
        """Start the heads from data; how many images they saw."""
        dataset = self._datasets(next(iter(self.config.stages.values())))['train']
        if isinstance(dataset, StreamImages):
            dataset = replace(dataset, named=True)
        loader = create_loader(dataset, self.config)
        with self._timed('fit'):
            return timm_fisher.fit(
                self.model,
                loader,
                from_features=dataset.gives == 'features',
                whiten=self.config.whiten,
                max_images=self.config.max_fit,
            )

    def resume(self, checkpoint: Path) -> None:
        """Go back to a checkpoint; `train_stage` takes the rest of its state."""
        before = Progress(**json.loads((checkpoint / 'progress.json').read_text()))
        now = self.progress.setting
        if before.setting != now:
            raise ValueError(f'--resume must keep {before.setting}; this is {now}.')
        self.progress = before
        load_weights(self.model, checkpoint / 'model')
        self.accelerator.load_state(str(checkpoint))  # the scaler of fp16
        if not (self.output / 'metrics.json').exists():  # later model/ is its user's
            self._keep_best()

    def train_stage(self, name: str, stage: Stage) -> None:
        """Train one stage, or what is left of it after a checkpoint."""
        accelerator = self.accelerator
        done = sum(row['stage'] == name for row in self.progress.history)
        if done < stage.epochs:
            training = self._prepare(name, stage)
            if done:
                checkpoint = cast(Path, latest_checkpoint(self.output))
                accelerator.load_state(str(checkpoint))
                if isinstance(training.objective, MetricLearning):
                    training.objective.load_loss(checkpoint)
                training.scheduler.load_state_dict(self.progress.scheduler)
            self.interruption.waits = True
            for epoch in range(done, stage.epochs):
                self._run_epoch(training, epoch)
            self.interruption.waits = False
            self.interruption.check()
            accelerator.free_memory()
        if accelerator.is_main_process:
            shutil.rmtree(self.output / 'pooled', ignore_errors=True)
            draw_curve(self.progress.history, self.output / 'curve.png')

    def _prepare(self, name: str, stage: Stage) -> Training:
        config, accelerator = self.config, self.accelerator
        datasets = self._datasets(stage, pool=True)
        augmented = datasets.get('augmented', datasets['train'])
        freeze(self.model, name, stage)
        # By the stage, so that resuming at its beginning is exact; and by the rank, so that ranks
        # draw different augmentation and dropout.
        number = list(config.stages).index(name)
        set_seed(config.seed + 1000 * (number + 1), device_specific=True)
        objective = create_objective(self.model, stage, augmented.gives, len(self.classes))
        enough = config.batch_size * accelerator.num_processes <= len(augmented)
        drop_last = objective.whole_batches and enough
        sampler = None
        if stage.per_class:
            options = (stage.per_class, config.batch_size, config.seed)
            sampler = PerClassSampler(augmented.labels, *options)
        module, optimizer = accelerator.prepare(objective, create_optimizer(objective, stage))
        if isinstance(augmented, StreamImages):
            loader = create_loader(augmented, config)
        else:
            order: dict[str, Any] = {'sampler': sampler} if sampler else {'shuffle': True}
            loader = accelerator.prepare(
                create_loader(augmented, config, drop_last=drop_last, **order)
            )
        updates = math.ceil(len(loader) / config.grad_accum_steps)
        scheduler = create_scheduler(optimizer.optimizer, stage, updates)
        val = datasets['val']
        return Training(name, stage, val, objective, module, optimizer, loader, scheduler, sampler)

    def _run_epoch(self, training: Training, epoch: int) -> None:
        """Train, validate, report, write the checkpoint, and keep the model if it is the best."""
        progress, scheduler = self.progress, training.scheduler
        start = time.perf_counter()
        row: dict[str, Any] = {'stage': training.name, 'epoch': epoch + 1}
        row['lr'] = max(group['lr'] for group in training.optimizer.param_groups)
        with self._timed('train'):
            row['train_loss'] = self._train_epoch(training, epoch)
            result = self._evaluate(training.objective, training.val, 'val')
        row['val_loss'] = result[training.objective.loss_name]
        where = f'{training.name}, validation of epoch {epoch + 1}'
        self._refuse_non_finite(row['val_loss'], where, training.objective, training.val)
        for metric in ('accuracy', 'recall_at_1'):
            if metric in result:
                row[f'val_{metric}'] = result[metric]
        row['seconds'] = round(time.perf_counter() - start, 2)
        self.accelerator.print(one_line(row))
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(row['train_loss'])
        progress.steps += len(training.loader)
        progress.scheduler = scheduler.state_dict()
        progress.add(row)

        def save(folder: Path) -> None:
            self.save_model(folder)
            if isinstance(training.objective, MetricLearning):
                training.objective.save_loss(folder.parent)

        save_checkpoint(self.output, progress, self.accelerator, save)
        self._keep_best()

    def _keep_best(self) -> None:
        """Write model/ if the model is the best now: after the checkpoint, from which `resume` does
        it again if a run was killed between the two."""
        if self.progress.latest_is_best and self.accelerator.is_main_process:
            self.save_model(self.output / 'model')
        self.accelerator.wait_for_everyone()

    def _train_epoch(self, training: Training, epoch: int) -> float:
        """One pass over the training set, put in order by `epoch`; the mean loss of all ranks."""
        accelerator, loader, stage = self.accelerator, training.loader, training.stage
        loader.set_epoch(epoch)
        if training.sampler is not None:
            training.sampler.set_epoch(epoch)
        training.module.train()
        set_training_mode(self.model, stage)
        update = epoch * math.ceil(len(loader) / self.config.grad_accum_steps)
        total, count = 0.0, 0
        progress = self._progress_bar(loader, f'{training.name} {epoch + 1}/{stage.epochs}')
        for step, (x, y) in enumerate(progress):
            self.interruption.check()
            with accelerator.accumulate(training.module):
                loss = training.module(x, y)
                value = loss.item()
                where = f'{training.name}, epoch {epoch + 1}, step {step + 1}'
                self._refuse_non_finite(value, where, training.objective, loader.dataset)
                if not loss.requires_grad:
                    raise ValueError(
                        f"Stage '{training.name}' trains nothing: the unsupervised loss of "
                        f'{head_names(self.config)} is zero or does not depend on what train: '
                        f'{stage.train} trains.'
                    )
                update += accelerator.sync_gradients
                self._step(training, loss, update)
            total += value * len(y)
            count += len(y)
            progress.set_postfix(loss=f'{value:.3f}')
        sums = accelerator.reduce(torch.tensor([total, count], device=accelerator.device))
        mean: float = (sums[0] / sums[1]).item()
        return mean

    def _step(self, training: Training, loss: Tensor, update: int) -> None:
        """Add to the gradient, and, if it is complete, change the model."""
        accelerator, optimizer, stage = self.accelerator, training.optimizer, training.stage
        accelerator.backward(training.objective.weight * loss)
        if accelerator.sync_gradients and stage.clip_grad is not None:
            parameters = [p for group in optimizer.param_groups for p in group['params']]
            accelerator.clip_grad_norm_(parameters, stage.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        if accelerator.sync_gradients:
            self.model.project_()
            if not isinstance(training.scheduler, ReduceLROnPlateau):
                training.scheduler.step_update(update)

    def _refuse_non_finite(
        self, loss: float, where: str, objective: Objective, dataset: Data
    ) -> None:
        if not math.isfinite(loss):
            place = self._first_non_finite(objective, dataset)
            image = (
                ''
                if place is None
                else f"With these weights '{dataset.name(place)}' is the first such image. "
            )
            raise FloatingPointError(
                f'The loss is {loss} in stage {where}. {image}Last good checkpoint: '
                f'{latest_checkpoint(self.output) or "none"}. Try a lower learning rate, '
                'clip_grad, or mixed_precision no or bf16.'
            )

    @torch.no_grad()
    def _first_non_finite(self, objective: Objective, dataset: Data) -> int | None:
        """The place of the first image whose loss alone is not finite, for which the data set is
        read once more; None if there is none, or if weights are not finite themselves."""
        if not all(parameter.isfinite().all() for parameter in objective.parameters()):
            return None
        objective.eval()
        for place, batch in enumerate(create_loader(dataset, self.config, batch_size=1)):
            with self.accelerator.autocast():
                if not objective(*send_to_device(batch, self.accelerator.device)).isfinite():
                    return place
        return None

    def evaluate_best(self) -> dict[str, Any]:
        """Evaluate the epoch that validated best, which the model becomes, on the test split or, if
        there is none, on the validation split; what is written to metrics.json."""
        progress, split = self.progress, 'test' if 'test' in self.images else 'val'
        stage = self.config.stages[progress.best['stage']]
        load_weights(self.model, self.output / 'model')
        dataset = self._datasets(stage)[split]
        objective = create_objective(self.model, stage, dataset.gives, len(self.classes))
        result = self._evaluate(objective, dataset, split)
        seconds = {key: progress.seconds.get(key, 0.0) for key in ('features', 'fit', 'train')}
        metrics = {
            split: result,
            'best': progress.best,
            **describe(self.config, self.model, self.accelerator),
            'img_size': self.data_config['input_size'][-1],
            'steps': progress.steps,
            'seconds': {key: round(value, 2) for key, value in seconds.items()},
        }
        if self.accelerator.is_main_process:
            write(self.output / 'metrics.json', json.dumps(metrics, indent=2) + '\n')
        self.accelerator.print(f'{split}: {one_line(result)} -> {self.output}')
        return metrics

    def _datasets(self, stage: Stage, *, pool: bool = False) -> dict[str, Any]:
        """Images, or, with a frozen backbone, features of the model as it is now or, to `pool`, its
        pooled vectors where the classifier alone is trained. For that no features need be kept."""
        model, config, accelerator = self.model, self.config, self.accelerator
        if not config.caches(stage):
            return self.images
        data: dict[str, Any] = {k: self.images[k] for k in self.images if k != 'augmented'}
        classifier_alone = stage.train == 'classifier' and not stage.head_loss
        with self._timed('features'):
            if not classifier_alone or has_room(model, [*data.values()], config, accelerator):
                data = {k: cache_features(model, data[k], config, accelerator) for k in data}
            for name in data if pool and classifier_alone else ():
                if name != 'test':
                    path = self.output / 'pooled' / f'{name}.npy'
                    data[name] = cache_pooled(model, data[name], path, config, accelerator)
        return data

    def _evaluate(self, objective: Objective, dataset: Data, name: str) -> dict[str, Any]:
        """Results of an objective on a data set, each image counted once, on all ranks."""
        accelerator = self.accelerator
        objective.to(accelerator.device).eval()
        # DDP gives rank 0's batch-norm statistics to the others only at its next step.
        broadcast([*self.model.buffers()])
        share: dict[str, Any] = {}
        if not isinstance(dataset, StreamImages):  # which is a share
            share['sampler'] = range(
                accelerator.process_index, len(dataset), accelerator.num_processes
            )
        batches = self._progress_bar(create_loader(dataset, self.config, **share), name)
        with accelerator.autocast():
            return objective.evaluate(
                send_to_device(batch, accelerator.device) for batch in batches
            )

    def _progress_bar(self, loader: Any, title: str) -> Any:
        hidden = not self.accelerator.is_main_process or None  # None: shown on a terminal
        return tqdm(loader, title, leave=False, disable=hidden)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        taken = time.perf_counter() - start
        self.progress.seconds[what] = self.progress.seconds.get(what, 0.0) + taken

    def save_model(self, folder: Path) -> None:
        """Write the model as it is now."""
        label_names = self.classes if self.model.num_classes else None
        data_config = self.data_config
        timm_fisher.save_model(self.model, folder, label_names=label_names, data_config=data_config)
