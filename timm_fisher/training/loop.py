"""The loop over batches: steps of an optimizer on an objective, epoch by epoch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from timm_fisher.training.config import Config, Stage
from timm_fisher.training.folder import latest_checkpoint
from timm_fisher.training.interrupt import Interruption
from timm_fisher.training.report import head_names
from timm_fisher.training.stages import (
    Objective,
    create_optimizer,
    create_scheduler,
    set_training_mode,
)


class Trainer:
    """One stage: objective, optimizer, schedule and training batches, prepared by accelerate.

    Args:
        config: of the run.
        accelerator: of the run.
        interruption: where a step asks whether a signal has come.
        name: of the stage.
        objective: what is minimised.
        loader: training batches.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        interruption: Interruption,
        name: str,
        objective: Objective,
        loader: DataLoader[Any],
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.interruption, self.name = interruption, name
        self.model, self.weight = objective.model, objective.weight
        self.stage: Stage = config.stages[name]
        self.module, self.optimizer, self.loader = accelerator.prepare(
            objective, create_optimizer(objective.model, self.stage), loader
        )
        self.updates = math.ceil(len(self.loader) / config.grad_accum_steps)  # in an epoch
        self.scheduler = create_scheduler(self.optimizer.optimizer, self.stage, self.updates)
        self.plateau = isinstance(self.scheduler, ReduceLROnPlateau)

    @property
    def learning_rate(self) -> float:
        """The largest one, now."""
        rates: list[float] = [group['lr'] for group in self.optimizer.param_groups]
        return max(rates)

    def train_epoch(self, epoch: int) -> float:
        """One pass over the training set; its mean loss over all ranks.

        Args:
            epoch: from 0; decides the order of the images.

        Raises:
            FloatingPointError: the loss of a step is not finite.
            Interrupted: a signal has come.
            ValueError: the loss does not depend on what the stage trains.
        """
        accelerator = self.accelerator
        self.loader.set_epoch(epoch)
        self.module.train()
        set_training_mode(self.model, self.stage)
        update = epoch * self.updates
        total, count = 0.0, 0
        progress = tqdm(
            self.loader,
            f'{self.name} {epoch + 1}/{self.stage.epochs}',
            leave=False,
            disable=not accelerator.is_main_process or None,
        )
        for step, (x, y) in enumerate(progress):
            self.interruption.check()
            with accelerator.accumulate(self.module):
                loss = self.module(x, y)
                self._check(loss, f'epoch {epoch + 1}, step {step + 1}')
                update += self._step(loss, update + 1)
            total += loss.item() * len(y)
            count += len(y)
            progress.set_postfix(loss=f'{loss.item():.3f}')
        sums = accelerator.reduce(torch.tensor([total, count], device=accelerator.device))
        mean: float = (sums[0] / sums[1]).item()
        return mean

    def _step(self, loss: Tensor, update: int) -> bool:
        """Add to the gradient, and, if it is complete, change the model; whether it was."""
        accelerator, optimizer = self.accelerator, self.optimizer
        accelerator.backward(self.weight * loss)
        complete: bool = accelerator.sync_gradients
        if self.stage.clip_grad is not None and complete:
            parameters = [p for group in optimizer.param_groups for p in group['params']]
            accelerator.clip_grad_norm_(parameters, self.stage.clip_grad)
        optimizer.step()
        if complete:
            self.model.project_()
            if not self.plateau:
                self.scheduler.step_update(update)
        optimizer.zero_grad()
        return complete

    def _check(self, loss: Tensor, where: str) -> None:
        refuse_non_finite(loss.item(), f'{self.name}, {where}', Path(self.config.output))
        if not loss.requires_grad:
            raise ValueError(
                f"Stage '{self.name}' trains nothing: the unsupervised loss of "
                f'{head_names(self.config)} is zero or does not depend on what train: '
                f'{self.stage.train} trains.'
            )


def refuse_non_finite(loss: float, where: str, output: Path) -> None:
    """Raise FloatingPointError for a loss that is not finite, with what to try."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f'The loss is {loss} in stage {where}. Last good checkpoint: '
            f'{latest_checkpoint(output) or "none"}. Try a lower learning rate, clip_grad, or '
            'mixed_precision no or bf16.'
        )
