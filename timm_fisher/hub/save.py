"""Saving a model as a folder that plain `timm.create_model` loads."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from timm_fisher.backbone import WEIGHTS, digest
from timm_fisher.errors import LoadError
from timm_fisher.hub import readme
from timm_fisher.hub.card import make_card
from timm_fisher.hub.config import check_config
from timm_fisher.hub.load import load
from timm_fisher.hub.metrics import check_metrics, read_metrics
from timm_fisher.hub.replace import replace_files
from timm_fisher.hub.state import check_json, check_state
from timm_fisher.hub.weights import is_finite
from timm_fisher.lora import is_factor
from timm_fisher.model import PooledModel

FILES = ('config.json', WEIGHTS, 'README.md', 'metrics.json')


def save_pretrained(
    model: PooledModel,
    folder: str | Path,
    *,
    metrics: str | Path | Mapping[str, Any] | None = None,
    label_names: Sequence[str] | None = None,
    data_config: dict[str, Any] | None = None,
    adapter: bool | None = None,
    backbone_id: str | None = None,
    float16: Collection[str] = (),
    card: Mapping[str, Any] | None = None,
) -> None:
    """Write a complete repository: config.json, model.safetensors, README.md and metrics.json.

    All files are written beside and then renamed: an error, such as a full disk, leaves what was
    there before. A process that is killed between two renames leaves a folder that is not loaded.
    Of a README.md that is there already, the generated part is replaced, see
    `timm_fisher.hub.readme.update`. Of local paths in the metrics the last name alone is written.

    Args:
        model: what to save.
        folder: made if it does not exist.
        metrics: what the card reports: metrics.json of this model's run, or its content.
        label_names: names of the classes, by index; None for those it was loaded with, if any.
        data_config: preprocessing, as `timm.data.resolve_input_data_config` gives it; None for
            the backbone's own, or what it was loaded with.
        adapter: store head and classifier alone, and factors of LoRA; None for where that is
            possible, that is where the backbone has the weights that it was loaded with, from a
            known repository.
        backbone_id: that repository, for a backbone that was loaded from a folder.
        float16: names of tensors that are stored in half precision.
        card: what else the card says, see `timm_fisher.hub.card.make_card`.

    Raises:
        ValueError: `adapter` is asked for and not possible; what could not be loaded, such as label
            names that are not fit to be shown; a `backbone_id` that cannot be right; metrics that
            are not of this model; or a README.md that is a link or cannot be read.
        TypeError: not a `PooledModel`, or an unknown or wrong field of the card.
    """
    _check(model, label_names)
    reported = read_metrics(metrics or {})
    check_metrics(reported, model)
    folder = Path(folder)
    check_regular(folder)
    old = folder / 'README.md'
    old_text = readme.read(old, f"'{old}'") if old.exists() else None
    weights = model.backbone_weights
    if backbone_id is not None:
        validate_repo_id(backbone_id.partition('@')[0])
        if weights is None:
            raise ValueError(
                f"backbone_id='{backbone_id}' is for a backbone with pretrained weights; this one "
                'has none.'
            )
        weights = {**weights, 'hf_hub_id': backbone_id}
    if adapter is not False:
        obstacle = _why_no_adapter(model, weights)
        if obstacle and adapter:
            raise ValueError(f'No adapter can be saved: {obstacle}. Give adapter=False.')
        adapter = not obstacle

    def write(beside: Path) -> None:
        config = _write_model(model, beside, label_names, data_config, weights, adapter, float16)
        size = (beside / WEIGHTS).stat().st_size
        text = make_card(
            model, config, reported, adapter=adapter, stored_bytes=size, **(card or {})
        )
        if old_text is not None:
            text = readme.update(text, old_text, f"'{old}'")
        (beside / 'README.md').write_bytes(text.encode())
        (beside / 'metrics.json').write_text(json.dumps(reported, indent=2) + '\n')

    replace_files(folder, write)


def save_model(
    model: PooledModel,
    folder: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    data_config: dict[str, Any] | None = None,
) -> None:
    """Write config.json and model.safetensors alone, with all weights, as training does.

    metrics.json of an earlier model in the folder is deleted: it is not of these weights.

    Args and errors as those of `save_pretrained`.
    """
    _check(model, label_names)
    replace_files(
        Path(folder),
        lambda beside: _write_model(model, beside, label_names, data_config),
        remove=['metrics.json'],
    )


def check_regular(folder: Path) -> None:
    """Refuse, by a ValueError, what is no ordinary file, such as a symbolic link, which could lead
    to any file of this machine."""
    for path in (folder / name for name in FILES):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ValueError(
                f"'{path}' is a symbolic link or no regular file. Put a copy of the file in its "
                'place, or delete it.'
            )


def _why_no_adapter(model: PooledModel, weights: dict[str, str | None] | None) -> str:
    """What stands against storing head and classifier alone, or an empty string."""
    if weights is None:
        return 'the backbone was not loaded with pretrained weights'
    if weights['sha256'] is None:
        return (
            "the backbone's weights were adapted to other images than they came for, or came from "
            'a repository without safetensors'
        )
    if weights['hf_hub_id'] is None:
        return (
            'the backbone did not come from the Hub; backbone_id names the repository of the same '
            'weights'
        )
    state = model.backbone.state_dict()
    if digest({key: state[key] for key in state if not is_factor(key)}) != weights['sha256']:
        return f"the backbone's weights are no longer those of '{weights['hf_hub_id']}'"
    return ''


def _check(model: PooledModel, label_names: Sequence[str] | None) -> None:
    if not isinstance(model, PooledModel):
        raise TypeError(
            f'{type(model).__name__} is not a PooledModel. Of a wrapped model give the inner one, '
            'such as accelerator.unwrap_model(model).'
        )
    if isinstance(label_names, str | Mapping):
        raise ValueError(f'label_names must be a list of texts, not {str(label_names)[:200]!r}.')


def _write_model(
    model: PooledModel,
    folder: Path,
    label_names: Sequence[str] | None,
    data_config: dict[str, Any] | None,
    weights: dict[str, str | None] | None = None,
    adapter: bool = False,
    float16: Collection[str] = (),
) -> dict[str, Any]:
    """config.json and model.safetensors, in timm's own form; gives the content of the first."""
    check_json(model)
    path = folder / 'config.json'
    save_config_for_hf(
        model,
        str(path),
        None if label_names is None else {'label_names': list(label_names)},
        {'backbone_weights': weights} if weights else None,
        data_config,
    )
    written: dict[str, Any] = json.loads(path.read_text())
    # It stands at the top, too, and transformers gives it to the factory beside these.
    del written['model_args']['num_classes']
    path.write_text(json.dumps(written, indent=2))
    state = model.state_dict()
    if unknown := sorted(set(float16) - set(state)):
        raise ValueError(f"The model has no tensor '{unknown[0]}' to be stored in float16.")
    if adapter:
        state = {
            key: state[key] for key in state if not key.startswith('backbone.') or is_factor(key)
        }
    for key, value in state.items():
        # safetensors refuses other memory formats, such as that of a channels-last model.
        state[key] = (value.half() if key in float16 else value).contiguous()
        if not is_finite(state[key]):
            raise ValueError(
                f"The tensor '{key}' holds NaN or infinite values, or numbers that are too large "
                'for float16; such a model could not be loaded.'
            )
    try:
        save_file(state, folder / WEIGHTS)
    except RuntimeError as error:
        if 'share memory' not in str(error):
            raise
        raise ValueError(
            f'A {type(model.backbone).__name__} uses some tensors in several places, which '
            'safetensors cannot store. Choose another backbone for a model that is saved.'
        ) from None
    try:
        with torch.device('meta'):
            again = load('local-dir', str(folder), trust_config=True)
    except LoadError as error:  # what cannot be loaded is not saved
        reason = str(error).replace(f" of '{folder}'", '')
        raise ValueError(f'The model cannot be saved: {reason}') from error
    check_state(model, again)
    try:
        check_config(written)
    except ValueError as error:
        warnings.warn(f'To load this model, trust_config=True is needed: {error}.', stacklevel=4)
    # safetensors makes its file private; the umask of the config is what the user wants.
    shutil.copymode(path, folder / WEIGHTS)
    return written
