"""What a stage trains, with which loss, optimizer and schedule.

`Supervised`, `Unsupervised` and `MetricLearning` are modules, which DDP wraps: called with a batch
they give the loss, and `evaluate` measures a model on a whole data set.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import ReduceLROnPlateau

from timm_fisher import PooledModel
from timm_fisher.fitting.stream import ListStream
from timm_fisher.registry import nearest
from timm_fisher.training.config import Stage
from timm_fisher.training.data import Gives
from timm_fisher.training.evaluate import accuracies
from timm_fisher.training.metric_learning import MetricLearning

Batches = Iterable[tuple[Any, Tensor]]


class Supervised(nn.Module):
    """Cross-entropy of the labels, plus the head's unsupervised loss with the stage's weight."""

    whole_batches = False
    weight = 1.0  # of the loss in the gradient
    loss_name = 'loss'  # in the results of `evaluate`

    def __init__(self, model: PooledModel, stage: Stage, gives: Gives) -> None:
        super().__init__()
        self.model, self.stage, self.gives = model, stage, gives

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """The loss of images `[B, 3, H, W]`, a list of features or one of pooled vectors, and
        labels `[B]`."""
        logits, unsupervised = self._logits(x, with_loss=self.stage.head_loss > 0)
        smoothing = self.stage.label_smoothing
        loss = F.cross_entropy(logits.float(), y, label_smoothing=smoothing)
        return loss + self.stage.head_loss * unsupervised

    @torch.no_grad()
    def evaluate(self, batches: Batches) -> dict[str, Any]:
        """`loss`, the cross-entropy, `accuracy`, `balanced_accuracy` and `samples` of a data set;
        `batches` are this rank's share of it."""
        rows: list[tuple[float, int, int]] = []
        for x, y in batches:
            logits = self._logits(x)[0].float()
            losses = F.cross_entropy(logits, y, reduction='none')
            rows += zip(losses.tolist(), y.tolist(), logits.argmax(1).tolist(), strict=True)
        values, labels, predicted = zip(*gather_object(rows), strict=True)
        return {'loss': statistics.fmean(values), **accuracies(labels, predicted)}

    def _logits(self, x: Any, with_loss: bool = False) -> tuple[Tensor, Tensor | float]:
        model = self.model
        if self.gives == 'pooled':
            return model.classify(x[0]), 0.0
        if self.gives == 'features':
            return model.forward_head_with_loss(x) if with_loss else (model.forward_head(x), 0.0)
        return model.forward_with_loss(x) if with_loss else (model(x), 0.0)


class Unsupervised(nn.Module):
    """The unsupervised loss of the model's heads; no label is read. In training each head first
    updates itself by its own rule on the mini-batch (`PoolingHead.partial_fit`): the gradient is
    that of the loss with the new parameters, in what the stage trains."""

    # A head's own rule takes every batch at full weight: a few images left over would undo what the
    # others taught it.
    whole_batches = True
    loss_name = 'unsupervised_loss'

    def __init__(self, model: PooledModel, stage: Stage, gives: Gives) -> None:
        super().__init__()
        self.model, self.gives = model, gives
        self.weight = stage.head_loss or 1.0

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """The loss of images `[B, 3, H, W]` or a list of features."""
        model = self.model
        if self.gives == 'features':
            features, size = x, model.pretrained_cfg['input_size'][1:]
        else:
            features, size = model.descriptors.features(model.backbone, x), x.shape[2:]
        losses = []
        for head, descriptors, context in model.inputs_of_heads(features, size):
            if self.training:
                head.partial_fit(ListStream([descriptors.detach()], [context]))
            losses.append(head.forward_with_loss(descriptors, **context)[1])
        return torch.stack(losses).sum()

    @torch.no_grad()
    def evaluate(self, batches: Batches) -> dict[str, Any]:
        """`unsupervised_loss`, the mean over images, and `samples`, as in `Supervised`."""
        rows = gather_object([(self(x, y).item(), len(y)) for x, y in batches])
        samples = sum(count for _, count in rows)
        total = sum(loss * count for loss, count in rows)
        return {'unsupervised_loss': total / samples, 'samples': samples}


Objective = Supervised | Unsupervised | MetricLearning


def create_objective(model: PooledModel, stage: Stage, gives: Gives, classes: int) -> Objective:
    """The objective of a stage, on batches of what a data set gives, of so many classes."""
    if stage.loss:
        return MetricLearning(model, stage, gives, classes)
    return (Unsupervised if stage.unsupervised else Supervised)(model, stage, gives)


def freeze(model: PooledModel, name: str, stage: Stage) -> None:
    """Leave only what a stage trains with gradients.

    Raises:
        ValueError: a layer that the backbone does not have, or nothing that can be trained.
    """
    model.requires_grad_(True)
    model.freeze_backbone(not stage.trains_backbone)
    trained: list[nn.Parameter] = []
    for layer_name, layer in _trained_layers(model, stage).items():
        parameters = [p for p in layer.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError(
                f"Layer '{layer_name}' of the backbone has no parameters that the head depends on."
            )
        trained += parameters
    if trained:
        model.backbone.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
    if stage.train in ('classifier', 'backbone'):
        model.head.requires_grad_(False)
        model.projection.requires_grad_(False)
    if stage.train == 'backbone' or stage.unsupervised or stage.loss:
        model.classifier.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        reason = {
            'backbone': 'the backbone has no parameters that the head depends on',
            'head': 'the head has no parameters',
        }.get(stage.train, 'neither backbone nor head has parameters')
        raise ValueError(f"Stage '{name}' has nothing to train: {reason}.")


def set_training_mode(model: PooledModel, stage: Stage) -> None:
    """Leave what a stage does not train in evaluation mode; the model is in training mode."""
    if stage.layers:
        model.backbone.eval()
        for layer in _trained_layers(model, stage).values():
            layer.train()
    for module in model.backbone.modules():
        if stage.freeze_bn and isinstance(module, _BatchNorm):
            module.eval()


def _trained_layers(model: PooledModel, stage: Stage) -> dict[str, nn.Module]:
    """The modules of the backbone that a stage names."""
    modules = dict(model.backbone.named_modules())
    del modules['']  # the backbone itself
    for name in stage.layers:
        if name not in modules:
            raise ValueError(f"The backbone has no layer '{name}'.{nearest(name, modules)}")
    return {name: modules[name] for name in stage.layers}


def create_optimizer(objective: Objective, stage: Stage) -> torch.optim.Optimizer:
    """An optimizer of what has gradients: no weight decay on vectors, all that follows the backbone
    with learning rates of its own."""
    groups, model = [], objective.model
    after = {name: getattr(model, name) for name in ('head', 'projection', 'classifier')}
    if isinstance(objective, MetricLearning):
        after['loss'] = objective.loss
    for scale, modules in ((1.0, {'backbone': model.backbone}), (stage.head_lr_scale, after)):
        for group in param_groups_weight_decay(
            nn.ModuleDict(modules), stage.weight_decay, no_weight_decay_list=model.no_weight_decay()
        ):
            groups.append({**group, 'lr': stage.lr * scale})
    return create_optimizer_v2(groups, opt=stage.opt, lr=stage.lr, momentum=stage.momentum)


def create_scheduler(optimizer: torch.optim.Optimizer, stage: Stage, updates: int) -> Any:
    """`ReduceLROnPlateau`, or a schedule of timm's; `updates` are steps in an epoch."""
    if stage.sched == 'plateau':
        # timm's plateau schedule is deprecated, and does not save its counters.
        factor, patience = stage.decay_rate, stage.patience_epochs
        return ReduceLROnPlateau(optimizer, factor=factor, patience=patience, min_lr=stage.min_lr)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        stage.sched,
        num_epochs=stage.epochs,
        decay_epochs=stage.decay_epochs,
        decay_rate=stage.decay_rate,
        warmup_epochs=stage.warmup_epochs,
        warmup_lr=0.0,
        min_lr=stage.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    return scheduler
