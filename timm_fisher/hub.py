"""Saving a model as a folder that plain `timm.create_model('local-dir:...')` loads."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from timm_fisher.model import PooledModel


def save_pretrained(
    model: PooledModel,
    folder: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    data_config: dict[str, Any] | None = None,
) -> None:
    """Write `model.safetensors` and `config.json` in timm's own form.

    Both files are written beside and then renamed, so that a full disk or a kill while writing
    leaves what was in the folder before.

    Args:
        model: what to save.
        folder: made if it does not exist.
        label_names: names of the classes, by index.
        data_config: the preprocessing that the model was trained with (input size, crop, mean,
            ...), as `timm.data.resolve_input_data_config` gives it; None for the backbone's own.

    Raises:
        ValueError: the number of label names is not that of the classes.
    """
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(
            f'{len(label_names)} label names were given for {model.num_classes} classes.'
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {} if label_names is None else {'label_names': list(label_names)}
    # For the time of saving only: timm's EMA writes into the tensors of a state dict.
    hook = model.register_state_dict_post_hook
    contiguous = hook(_make_contiguous)  # type: ignore[no-untyped-call]
    with contiguous, tempfile.TemporaryDirectory(dir=folder, prefix='.saving-') as beside:
        timm.models.save_for_hf(
            model, beside, model_config=config, safe_serialization=True, data_config=data_config
        )
        # safetensors makes its file private; the umask of the config is what the user wants.
        shutil.copymode(Path(beside, 'config.json'), Path(beside, 'model.safetensors'))
        with contextlib.ExitStack() as undo:
            for name in ('model.safetensors', 'config.json'):
                target, kept = folder / name, Path(beside, f'{name}.old')
                with open(Path(beside, name), 'rb') as file:
                    os.fsync(file.fileno())
                if target.exists():
                    _link_or_copy(target, kept)
                    undo.callback(os.replace, kept, target)
                else:
                    undo.callback(target.unlink, missing_ok=True)
                os.replace(Path(beside, name), target)
            undo.pop_all()


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _make_contiguous(
    module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]
) -> None:
    """safetensors refuses other memory formats, such as that of a channels-last model."""
    for key in state:
        if key.startswith(prefix):
            state[key] = state[key].contiguous()
