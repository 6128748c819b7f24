"""What a stage of training trains, with which loss, optimizer and schedule."""

from __future__ import annotations

from typing import Any

import matplotlib
import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from timm_fisher import PooledModel
from timm_fisher.fitting.stream import BatchStream
from timm_fisher.registry import nearest
from timm_fisher.training.config import Config, Stage
from timm_fisher.training.data import (
    Cached,
    Images,
)

matplotlib.use('Agg')

AnyDataset = Images | Cached



class HeadOnly(nn.Module):
    """The part of a model that runs on cached features: what is trained, and wrapped by DDP, while
    the backbone is frozen."""

    def __init__(self, model: PooledModel) -> None:
        super().__init__()
        self.head, self.head_drop, self.classifier = model.head, model.head_drop, model.classifier
        self._model = [model]  # a list keeps the backbone out of this module's children

    def forward(self, features: Tensor, head_loss: bool = False) -> Any:
        return self._model[0].forward_head(features, head_loss=head_loss)

    def train(self, mode: bool = True) -> HeadOnly:
        super().train(mode)
        self._model[0].train(mode)  # which leaves a frozen head in eval mode
        return self


class ClassifierOnly(nn.Module):
    """The part of a model that runs on pooled vectors, while the head is frozen too."""

    def __init__(self, model: PooledModel) -> None:
        super().__init__()
        self.head_drop, self.classifier = model.head_drop, model.classifier

    def forward(self, pooled: Tensor) -> Tensor:
        return self.classifier(self.head_drop(pooled))


class Unsupervised(nn.Module):
    """The own loss of a model's head, what an unsupervised stage trains; DDP wraps it.

    In training mode the head first updates itself by its own rule on the mini-batch
    (`PoolingHead.partial_fit`): the gradient that follows is that of the loss with the new
    parameters, in what the stage trains.

    Args:
        model: of which the head is asked.
        from_features: the input is what `model.forward_features` gives, not images.
    """

    def __init__(self, model: PooledModel, from_features: bool) -> None:
        super().__init__()
        self.model, self.from_features = model, from_features

    def forward(self, x: Any) -> Tensor:
        model = self.model
        features = x if self.from_features else model.descriptors.features(model.backbone, x)
        descriptors = model.descriptors(features)
        if self.training:
            for head, place in model.heads:
                head.partial_fit(BatchStream(descriptors[place].detach()))
        losses = [head.forward_with_loss(descriptors[place])[1] for head, place in model.heads]
        return torch.stack(losses).sum()


def _trained_layers(model: PooledModel, stage: Stage) -> list[nn.Module]:
    """The modules of the backbone that a stage names."""
    modules = dict(model.backbone.named_modules())
    for name in stage.layers:
        if not name or name not in modules:
            known = [each for each in modules if each]
            raise ValueError(f"The backbone has no layer '{name}'.{nearest(name, known)}")
    return [modules[name] for name in stage.layers]


def _freeze(model: PooledModel, name: str, stage: Stage) -> None:
    """Leave only what a stage trains with gradients.

    Raises:
        ValueError: a layer that the backbone does not have, or nothing that can be trained.
    """
    model.requires_grad_(True)
    model.freeze_backbone(not stage.trains_backbone)
    layers = _trained_layers(model, stage)
    for layer_name, layer in zip(stage.layers, layers, strict=True):
        if not any(parameter.requires_grad for parameter in layer.parameters()):
            raise ValueError(
                f"Layer '{layer_name}' of the backbone has no parameters that the head depends on."
            )
    if layers:
        trained = {id(parameter) for layer in layers for parameter in layer.parameters()}
        for parameter in model.backbone.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in trained)
    if stage.train in ('classifier', 'backbone'):
        model.head.requires_grad_(False)
    if stage.train == 'backbone' or stage.unsupervised:
        model.classifier.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        reasons = {
            'backbone': 'the backbone has no parameters that the head depends on',
            'head': 'the head has no parameters',
        }
        reason = reasons.get(stage.train, 'neither backbone nor head has parameters')
        raise ValueError(f"Stage '{name}' has nothing to train: {reason}.")


def _refuse_without_gradient(loss: Tensor, name: str, stage: Stage, config: Config) -> None:
    if not loss.requires_grad:
        raise ValueError(
            f"Stage '{name}' trains nothing: the own loss of {_head_names(config)} is zero or does "
            f'not depend on what train: {stage.train} trains.'
        )


def _create_optimizer(model: PooledModel, stage: Stage) -> torch.optim.Optimizer:
    groups = []
    for scale, modules in (
        (1.0, {'backbone': model.backbone}),
        (stage.head_lr_scale, {'head': model.head, 'classifier': model.classifier}),
    ):
        for group in param_groups_weight_decay(
            nn.ModuleDict(modules), stage.weight_decay, no_weight_decay_list=model.no_weight_decay()
        ):
            groups.append({**group, 'lr': stage.lr * scale})
    return create_optimizer_v2(groups, opt=stage.opt, lr=stage.lr, momentum=stage.momentum)


def _create_scheduler(optimizer: torch.optim.Optimizer, stage: Stage, updates: int) -> Any:
    if stage.sched == 'plateau':
        # timm's plateau schedule is deprecated, and does not save its counters.
        return ReduceLROnPlateau(
            optimizer,
            factor=stage.decay_rate,
            patience=stage.patience_epochs,
            min_lr=stage.min_lr,
        )
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


