"""What a run keeps for its resumption: progress, weights, and the state of optimizer and random
numbers, at the end of each epoch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from accelerate import Accelerator

from timm_fisher import PooledModel
from timm_fisher.files import write
from timm_fisher.training.folder import latest_checkpoint
from timm_fisher.training.report import draw_curve


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        history: a row for each epoch, those of log.jsonl.
        finished: names of stages.
        best: stage, epoch and validation accuracy (or loss) of the model that is kept.
        seconds: spent on 'features', 'fit' and 'train'.
        steps: of training, on one process.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(
        default_factory=lambda: {'features': 0.0, 'fit': 0.0, 'train': 0.0}
    )
    steps: int = 0

    def add(self, row: dict[str, Any], *, ends_stage: bool) -> bool:
        """Take in an epoch; whether it is the best so far.

        Unsupervised losses of different features cannot be compared: until labels say which epoch
        is the best, it is the last.
        """
        self.history.append(row)
        if ends_stage:
            self.finished.append(row['stage'])
        best = self.best.get('val_accuracy', -1.0)
        supervised = 'val_accuracy' in row
        better: bool = row['val_accuracy'] > best if supervised else best < 0
        if better:
            key = 'val_accuracy' if supervised else 'val_loss'
            self.best = {name: row[name] for name in ('stage', 'epoch', key)}
        return better


class Checkpoints:
    """The checkpoints in the folder of a run: one at a time, whole or not there.

    Args:
        output: the folder.
        accelerator: of the run; its state is what is saved, besides the model.
        model: of the run.
        save_model: saves it as a folder in timm's form.
    """

    def __init__(
        self,
        output: Path,
        accelerator: Accelerator,
        model: PooledModel,
        save_model: Callable[[Path], None],
    ) -> None:
        self.output, self.accelerator = output, accelerator
        self.model, self.save_model = model, save_model
        # Weights are written once, in timm's form, instead of accelerate's.
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    @property
    def latest(self) -> Path | None:
        """The newest one."""
        return latest_checkpoint(self.output)

    def save(self, progress: Progress, scheduler: Any, *, ends_stage: bool) -> None:
        """Write log, checkpoint and, after a stage, curve; then delete older checkpoints."""
        accelerator, output = self.accelerator, self.output
        final = output / f'checkpoint-{len(progress.history):04d}'
        partial = output / f'{final.name}.partial'
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            lines = ''.join(json.dumps(row) + '\n' for row in progress.history)
            write(output / 'log.jsonl', lines)
            if ends_stage:
                draw_curve(progress.history, output / 'curve.png')
            state = {
                **asdict(progress),
                'scheduler': scheduler.state_dict(),
                'setting': self._setting(),
            }
            write(partial / 'progress.json', json.dumps(state))
            os.replace(partial, final)
            for old in output.glob('checkpoint-*'):
                if old != final:
                    shutil.rmtree(old)
        accelerator.wait_for_everyone()

    def load_progress(self, checkpoint: Path) -> Progress:
        """Progress and weights; `load_state` takes the rest.

        Raises:
            ValueError: the run had another number of processes, or another precision.
        """
        state = _read(checkpoint)
        del state['scheduler']
        before, now = state.pop('setting'), self._setting()
        if before != now:
            raise ValueError(f'--resume must keep {before}; this is {now}.')
        self.accelerator.load_state(str(checkpoint))  # weights, and the scaler of fp16
        return Progress(**state)

    def load_state(self, checkpoint: Path, scheduler: Any) -> None:
        """The state of everything that was prepared, and of a scheduler."""
        self.accelerator.load_state(str(checkpoint))
        scheduler.load_state_dict(_read(checkpoint)['scheduler'])

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

    def _save_weights(self, models: Any, weights: list[Any], folder: str) -> None:
        weights.clear()
        if self.accelerator.is_main_process:
            self.save_model(Path(folder, 'model'))

    def _load_weights(self, models: list[Any], folder: str) -> None:
        models.clear()
        self.load_weights(Path(folder, 'model'))


def _read(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / 'progress.json').read_text())
    return state
