"""Train a pooling head on a timm backbone, in stages.

    accelerate launch recipes/train.py --config recipes/configs/trashnet.yaml \
        --head sparse_fisher --data-dir PATH

Leaves in `--output`: model/ (best on the validation split) and last/, both loadable by
`timm.create_model('local-dir:...', pretrained=True)`; metrics.json, log.jsonl, curve.png,
config.yaml, and the checkpoint that `--resume` continues from exactly.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedDataParallelKwargs, send_to_device, set_seed
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

import timm_fisher
from timm_fisher import PooledModel
from timm_fisher.files import write
from timm_fisher.hub.card import installed_versions
from timm_fisher.training.config import Config, Stage
from timm_fisher.training.data import (
    Cached,
    Images,
    cache_features,
    cache_pooled,
    create_datasets,
    load_splits,
)

matplotlib.use('Agg')

AnyDataset = Images | Cached


def train(config: Config) -> None:
    """Fit, train in stages, evaluate and save, as a configuration says."""
    # A head's own loss need not depend on all that the stage trains.
    own_loss_alone = any(stage.unsupervised for stage in config.stages.values())
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.grad_accum_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=own_loss_alone)],
    )
    launched = 'ACCELERATE_MIXED_PRECISION' in os.environ
    if accelerator.device.type == 'cpu' and launched and os.environ.get('OMP_NUM_THREADS') == '1':
        # `accelerate launch` sets one thread per process unless it is told otherwise.
        torch.set_num_threads(max(1, _cpu_count() // accelerator.num_processes))
    set_seed(config.seed)
    say = accelerator.print
    output = Path(config.output)
    with accelerator.main_process_first():
        _prepare_output(output, config, accelerator.is_main_process)

    # Data and model
    splits, classes = load_splits(config)
    if config.unsupervised:
        classes = []  # an untrained classifier would mislead
    model = create_model(config, len(classes)).to(memory_format=torch.channels_last)
    for name, stage in config.stages.items():
        _freeze(model, name, stage)  # refuses what does not fit before anything is computed
    model.requires_grad_(True)
    requested = {'img_size': config.img_size, 'crop_pct': config.crop_pct}
    data_config = timm.data.resolve_input_data_config(model, requested)
    datasets: dict[str, AnyDataset] = dict(create_datasets(config, splits, data_config))
    sizes = ', '.join(f'{len(split.indices)} {name}' for name, split in splits.items())
    say(f'{len(classes)} classes; {sizes} images at {data_config["input_size"]}')
    say(f'{_head_names(config)} on {config.backbone}: {model.head_hidden_size} pooled features')

    def cached() -> dict[str, AnyDataset]:
        names = ['train', *(name for name in ('val', 'test') if name in datasets)]
        found = {name: cache_features(model, datasets[name], config, accelerator) for name in names}
        return {**found, 'augmented': found['train']}

    run = Run(config, accelerator, model, classes, data_config)
    checkpoint = run.latest_checkpoint()
    first = next(iter(config.stages.values()))

    # Fit
    if checkpoint is None:
        start = time.perf_counter()
        use = cached() if config.caches(first) else datasets
        run.seconds['features'] = time.perf_counter() - start
        model.to(accelerator.device)
        start = time.perf_counter()
        timm_fisher.fit(model, run.loader(use['train']), from_features=config.caches(first))
        run.seconds['fit'] = time.perf_counter() - start
        say(f'fit: {run.seconds["fit"]:.1f} s')
    else:
        run.load_progress(checkpoint)
        say(f'resuming after {checkpoint.name}')

    # Stages
    for name, stage in config.stages.items():
        if name not in run.finished:
            start = time.perf_counter()
            use = cached() if config.caches(stage) else datasets
            run.seconds['features'] += time.perf_counter() - start
            run.train_stage(name, stage, use)

    # Evaluate the best epoch, and save
    run.load_weights(output / 'model')
    final = 'test' if 'test' in datasets else 'val'
    on_features = config.caches(config.stages[run.best['stage']])
    dataset = (cached() if on_features else datasets)[final]
    if config.unsupervised:
        result = run.evaluate_own_loss(dataset, final)
        found = f'own loss {result["own_loss"]:.4g}'
    else:
        result = run.evaluate_on(dataset, final)
        found = f'accuracy {result["accuracy"]:.2%}'
    run.finish(final, result)
    say(f'{final} {found} of {result["samples"]} images -> {output}')
    accelerator.end_training()


class Run:
    """What a run carries from stage to stage, and from an interruption to its resumption."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        model: PooledModel,
        classes: list[str],
        data_config: dict[str, Any],
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.model = model
        self.classes = classes
        self.data_config = data_config
        self.output = Path(config.output)
        self.history: list[dict[str, Any]] = []
        self.finished: list[str] = []
        self.best: dict[str, Any] = {}
        self.steps = 0  # of training, on this process
        self.seconds: dict[str, float] = {'features': 0.0, 'fit': 0.0, 'train': 0.0}
        # Weights are written once, in timm's form, instead of accelerate's.
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def train_stage(self, name: str, stage: Stage, datasets: dict[str, AnyDataset]) -> None:
        """Train one stage, from its beginning or from the checkpoint inside it."""
        config, accelerator, model = self.config, self.accelerator, self.model
        # Seeded by the stage, so that resuming at its beginning is exact; and by the rank, so that
        # the ranks draw different augmentation and dropout.
        number = list(config.stages).index(name)
        set_seed(config.seed + 1000 * (number + 1), device_specific=True)
        _freeze(model, name, stage)
        pool_once = stage.train == 'classifier' and isinstance(datasets['train'], Cached)
        if pool_once and not stage.head_loss:
            start = time.perf_counter()
            pooled = {
                split: cache_pooled(model, datasets[split], split, config, accelerator)
                for split in ('train', 'val')
            }
            datasets = {**pooled, 'augmented': pooled['train']}
            self.seconds['features'] += time.perf_counter() - start
        if stage.unsupervised:
            module: nn.Module = Unsupervised(model, isinstance(datasets['train'], Cached))
        else:
            module = self._module(datasets['train'])
        # A head's own rule takes every batch at full weight: a few images left over would undo what
        # the others taught it.
        whole = config.batch_size * accelerator.num_processes <= len(datasets['train'])
        drop_last = stage.unsupervised and whole
        train_loader = self.loader(datasets['augmented'], shuffle=True, drop_last=drop_last)
        val_loader = self.loader(datasets['val'])
        optimizer = _create_optimizer(model, stage)
        module, optimizer, train_loader, val_loader = accelerator.prepare(
            module, optimizer, train_loader, val_loader
        )
        scheduler = _create_scheduler(
            optimizer.optimizer, stage, _updates_per_epoch(train_loader, config)
        )

        done = 0  # epochs of this stage
        checkpoint = self.latest_checkpoint()
        if checkpoint is not None and self.history and self.history[-1]['stage'] == name:
            done = self.history[-1]['epoch']
            accelerator.load_state(str(checkpoint))
            state = json.loads((checkpoint / 'progress.json').read_text())['scheduler']
            scheduler.load_state_dict(state)

        for epoch in range(done, stage.epochs):
            start = time.perf_counter()
            train_loader.set_epoch(epoch)
            rate = max(group['lr'] for group in optimizer.param_groups)
            loss = self._train_epoch(name, epoch, stage, module, optimizer, scheduler, train_loader)
            if stage.unsupervised:
                own = self.evaluate_own_loss(datasets['val'], 'val')
                result = {'val_loss': own['own_loss']}
            else:
                found = self.evaluate(module, val_loader, 'val')
                result = {'val_loss': found['loss'], 'val_accuracy': found['accuracy']}
            self._refuse_non_finite(result['val_loss'], f'{name}, validation of epoch {epoch + 1}')
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(loss)
            self.seconds['train'] += time.perf_counter() - start
            row = {
                'stage': name,
                'epoch': epoch + 1,
                'lr': rate,
                'train_loss': loss,
                **result,
                'seconds': round(time.perf_counter() - start, 2),
            }
            self._end_epoch(row, last=epoch + 1 == stage.epochs, scheduler=scheduler)
        accelerator.free_memory()
        if accelerator.is_main_process:
            shutil.rmtree(self.output / 'pooled', ignore_errors=True)

    def _train_epoch(
        self,
        name: str,
        epoch: int,
        stage: Stage,
        module: nn.Module,
        optimizer: Any,
        scheduler: Any,
        loader: DataLoader[Any],
    ) -> float:
        """One pass over the training set; its mean loss over all ranks."""
        accelerator = self.accelerator
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        module.train()
        layers = _trained_layers(self.model, stage)
        if layers:
            self.model.backbone.eval()
            for layer in layers:
                layer.train()
        if stage.freeze_bn:
            for layer in self.model.backbone.modules():
                if isinstance(layer, _BatchNorm):
                    layer.eval()
        updates = epoch * _updates_per_epoch(loader, self.config)
        loss_sum, count = 0.0, 0
        progress = tqdm(
            loader,
            f'{name} {epoch + 1}/{stage.epochs}',
            leave=False,
            disable=not accelerator.is_main_process or None,
        )
        for step, (x, y) in enumerate(progress):
            with accelerator.accumulate(module):
                weight = 1.0
                if stage.unsupervised:
                    loss, weight = module(x), stage.head_loss or 1.0
                    _refuse_without_gradient(loss, name, stage, self.config)
                else:
                    if stage.head_loss:
                        logits, own = module(x, head_loss=True)
                    else:
                        logits, own = module(x), 0.0
                    loss = F.cross_entropy(logits.float(), y, label_smoothing=stage.label_smoothing)
                    loss = loss + stage.head_loss * own
                self._refuse_non_finite(loss.item(), f'{name}, epoch {epoch + 1}, step {step + 1}')
                accelerator.backward(weight * loss)
                if stage.clip_grad is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters, stage.clip_grad)
                optimizer.step()
                if accelerator.sync_gradients:
                    self.model.project_()
                    updates += 1
                    if not isinstance(scheduler, ReduceLROnPlateau):
                        scheduler.step_update(updates)
                optimizer.zero_grad()
            self.steps += 1
            loss_sum += loss.item() * _batch_size(x)
            count += _batch_size(x)
            progress.set_postfix(loss=f'{loss.item():.3f}')
        total = accelerator.reduce(torch.tensor([loss_sum, count], device=accelerator.device))
        return (total[0] / total[1]).item()

    def _refuse_non_finite(self, loss: float, where: str) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f'The loss is {loss} in stage {where}. Last good checkpoint: '
                f'{self.latest_checkpoint() or "none"}. Try a lower learning rate, clip_grad, or '
                'mixed_precision no or bf16.'
            )

    def evaluate_on(self, dataset: AnyDataset, what: str) -> dict[str, Any]:
        """`evaluate`, outside of a stage."""
        prepare = self.accelerator.prepare_model
        module = prepare(self._module(dataset), evaluation_mode=True)
        return self.evaluate(module, self.accelerator.prepare(self.loader(dataset)), what)

    @torch.no_grad()
    def evaluate(self, module: nn.Module, loader: DataLoader[Any], what: str) -> dict[str, Any]:
        """Loss, accuracy and balanced accuracy over the true number of samples."""
        accelerator = self.accelerator
        module.eval()
        outputs = []
        progress = tqdm(loader, what, leave=False, disable=not accelerator.is_main_process or None)
        for x, y in progress:
            logits = module(x).float()
            losses = F.cross_entropy(logits, y, reduction='none')
            outputs.append(accelerator.gather_for_metrics((losses, logits.argmax(1), y)))
        losses, predicted, labels = (torch.cat(part).cpu() for part in zip(*outputs, strict=True))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)  # a class that no label of a split has
            balanced = balanced_accuracy_score(labels, predicted)
        return {
            'loss': losses.double().mean().item(),
            'accuracy': float(accuracy_score(labels, predicted)),
            'balanced_accuracy': float(balanced),
            'samples': len(labels),
        }

    @torch.no_grad()
    def evaluate_own_loss(self, dataset: AnyDataset, what: str) -> dict[str, Any]:
        """Mean own loss of the head over the true number of samples; no label is read.

        Each rank takes its share, uneven as it may be: the loss of a batch is no sum over its
        images that `gather_for_metrics` could leave the repeated ones out of.
        """
        accelerator = self.accelerator
        device = accelerator.device
        share = range(accelerator.process_index, len(dataset), accelerator.num_processes)
        module = Unsupervised(self.model, isinstance(dataset, Cached)).to(device).eval()
        total = torch.zeros(2, device=device)
        show = accelerator.is_main_process
        loader = self.loader(Subset(dataset, share))
        for x, _ in tqdm(loader, what, leave=False, disable=not show or None):
            with accelerator.autocast():
                loss = module(send_to_device(x, device))
            total += _batch_size(x) * torch.stack([loss.float(), torch.ones_like(total[0])])
        loss_sum, count = accelerator.reduce(total).tolist()
        return {'own_loss': loss_sum / count, 'samples': round(count)}

    def _module(self, dataset: AnyDataset) -> nn.Module:
        if not isinstance(dataset, Cached):
            return self.model
        return ClassifierOnly(self.model) if dataset.pooled else HeadOnly(self.model)

    def loader(
        self, dataset: Dataset[Any], *, shuffle: bool = False, drop_last: bool = False
    ) -> DataLoader[Any]:
        """A loader over a data set, before accelerate prepares it."""
        # Cached features come from a memory map: workers would only copy them once more.
        whole = dataset.dataset if isinstance(dataset, Subset) else dataset
        workers = 0 if isinstance(whole, Cached) else self.config.workers
        return DataLoader(
            dataset,
            self.config.batch_size,
            shuffle=shuffle,
            num_workers=workers,
            drop_last=drop_last,
        )

    def _end_epoch(self, row: dict[str, Any], *, last: bool, scheduler: Any) -> None:
        """Report, keep the model if it is the best, and write the checkpoint."""
        accelerator = self.accelerator
        self.history.append(row)
        supervised = 'val_accuracy' in row
        accuracy = f'val accuracy {row["val_accuracy"]:.2%}, ' if supervised else ''
        accelerator.print(
            f'{row["stage"]} {row["epoch"]}: lr {row["lr"]:.2g}, train loss '
            f'{row["train_loss"]:.4f}, val loss {row["val_loss"]:.4f}, {accuracy}'
            f'{row["seconds"]:.1f} s'
        )
        # Own losses of different features cannot be compared: until labels say which epoch is the
        # best, it is the last.
        best = self.best.get('val_accuracy', -1.0)
        if row['val_accuracy'] > best if supervised else best < 0:
            key = 'val_accuracy' if supervised else 'val_loss'
            self.best = {each: row[each] for each in ('stage', 'epoch', key)}
            if accelerator.is_main_process:
                self._save_model(self.output / 'model')
        if last:
            self.finished.append(row['stage'])
        progress = {
            'history': self.history,
            'finished': self.finished,
            'best': self.best,
            'seconds': self.seconds,
            'steps': self.steps,
            'scheduler': scheduler.state_dict(),
            'setting': self._setting(),
        }
        final = self.output / f'checkpoint-{len(self.history):04d}'
        partial = self.output / f'{final.name}.partial'
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            lines = ''.join(json.dumps(each) + '\n' for each in self.history)
            write(self.output / 'log.jsonl', lines)
            if last:
                _plot(self.history, self.output / 'curve.png')
            write(partial / 'progress.json', json.dumps(progress))
            os.replace(partial, final)
            for old in self.output.glob('checkpoint-*'):
                if old != final:
                    shutil.rmtree(old)
        accelerator.wait_for_everyone()

    def finish(self, split: str, result: dict[str, Any]) -> None:
        """Write last/ and metrics.json."""
        if not self.accelerator.is_main_process:
            return
        last = self.latest_checkpoint()
        if last is not None:
            shutil.rmtree(self.output / 'last', ignore_errors=True)
            shutil.copytree(last / 'model', self.output / 'last')
        model, config = self.model, self.config
        parameters = sum(parameter.numel() for parameter in model.parameters())
        metrics = {
            split: result,
            'best': self.best,
            'head': config.head,
            'head_kwargs': config.head_kwargs,
            'backbone': config.backbone,
            'backbone_stage': config.backbone_stage,
            'img_size': self.data_config['input_size'][-1],
            'seed': config.seed,
            'out_features': model.head_hidden_size,
            'parameters': parameters,
            'head_parameters': parameters - sum(p.numel() for p in model.backbone.parameters()),
            'steps': self.steps,
            'peak_memory_mb': round(_peak_memory(self.accelerator.device) / 2**20),
            'seconds': {key: round(value, 2) for key, value in self.seconds.items()},
            'processes': self.accelerator.num_processes,
            'device': str(self.accelerator.device),
            'dataset': Path(config.data_dir).stem or config.dataset,
            'command': command(config, self.accelerator),
            'versions': installed_versions(),
        }
        write(self.output / 'metrics.json', json.dumps(metrics, indent=2) + '\n')

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint of this run, if there is one."""
        found = sorted(self.output.glob('checkpoint-????'))
        return found[-1] if found else None

    def load_progress(self, checkpoint: Path) -> None:
        """Take history and weights from a checkpoint; `train_stage` takes the rest."""
        progress = json.loads((checkpoint / 'progress.json').read_text())
        self.history = progress['history']
        self.finished = progress['finished']
        self.best = progress['best']
        self.seconds = progress['seconds']
        self.steps = progress['steps']
        now = self._setting()
        if progress['setting'] != now:
            raise ValueError(f'--resume must keep {progress["setting"]}; this is {now}.')
        self.accelerator.load_state(str(checkpoint))  # weights, and the scaler of fp16

    def load_weights(self, folder: Path) -> None:
        """Put saved weights into the model, all or none."""
        weights = safetensors.torch.load_file(folder / 'model.safetensors')
        self.model.load_state_dict(weights, strict=True)

    def _setting(self) -> dict[str, Any]:
        """What the launcher decides, and an exact resume needs again."""
        accelerator = self.accelerator
        return {
            'processes': accelerator.num_processes,
            'mixed_precision': accelerator.mixed_precision,
        }

    def _save_model(self, folder: Path) -> None:
        timm_fisher.save_model(
            self.model,
            folder,
            label_names=self.classes or None,
            data_config=self.data_config,
        )

    def _save_weights(self, models: Any, weights: list[Any], folder: str) -> None:
        weights.clear()
        if self.accelerator.is_main_process:
            self._save_model(Path(folder, 'model'))

    def _load_weights(self, models: list[Any], folder: str) -> None:
        models.clear()
        self.load_weights(Path(folder, 'model'))


def _batch_size(x: Any) -> int:
    return len(x if isinstance(x, Tensor) else x[0])


def _cpu_count() -> int:
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


def _updates_per_epoch(loader: DataLoader[Any], config: Config) -> int:
    return math.ceil(len(loader) / config.grad_accum_steps)


def _prepare_output(output: Path, config: Config, main: bool) -> None:
    """Refuse to write over a run, or to resume one with other settings."""
    path = output / 'config.yaml'
    started = any(output.glob('checkpoint-????'))
    if config.resume and not path.exists():
        raise ValueError(f"--resume: '{output}' holds no run (no config.yaml).")
    if config.resume and started:
        old, new = yaml.safe_load(path.read_text()), yaml.safe_load(config.to_yaml())
        free = {'resume', 'output', 'workers', 'cache_dir'}
        changed = [key for key in new if key not in free and new[key] != old.get(key)]
        if changed:
            text = '; '.join(f'{key} was {old.get(key)!r}, is {new[key]!r}' for key in changed)
            raise ValueError(f"--resume must keep the settings of '{output}': {text}.")
    elif started:
        raise ValueError(
            f"'{output}' holds a run already. Add --resume true to continue it, or give another "
            '--output.'
        )
    elif main:
        output.mkdir(parents=True, exist_ok=True)
        write(path, config.to_yaml())
