"""Weights of a saved model, checked before anything is loaded; and the backbone of an adapter,
which is head and classifier alone, fetched and recognised."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from timm.models import load_pretrained
from torch import Tensor, nn

from timm_fisher.errors import LoadError, clear_errors

WEIGHTS = 'model.safetensors'
SAVING = '.saving-'  # start of the name of a folder of files that are not in place yet


def find_file(name: str, source: str, place: str, cache_dir: str | Path | None) -> Path:
    """A file of a saved model, downloaded if it is on the Hub.

    Args:
        name: of the file.
        source: 'hf-hub' or 'local-dir'.
        place: repository, with its revision after '@' if there is one; or folder.
        cache_dir: of downloads.

    Raises:
        LoadError: there is none, saving it was cut off, or the Hub cannot be reached.
    """
    if source == 'hf-hub':
        repo_id, _, revision = place.partition('@')
        with clear_errors(f"Downloading {name} of '{place}'"):
            return Path(
                hf_hub_download(repo_id, name, revision=revision or None, cache_dir=cache_dir)
            )
    check_whole(Path(place))
    path = Path(place, name)
    if not path.is_file():
        raise LoadError(
            f"'{place}' holds no {name}. Save it by timm_fisher.save_pretrained, or by "
            'timm.models.save_for_hf(model, folder, safe_serialization=True).'
        )
    return path


def check_whole(folder: Path) -> None:
    """Refuse a folder whose files may be of two models.

    Raises:
        LoadError: while the files of one model were replaced by those of another, the process was
            killed, or is still at it.
    """
    for beside in half_replaced(folder):
        raise LoadError(
            f"'{folder}' may hold files of two models: saving was cut off, or goes on. Save the "
            f"model again; or move the files '{beside}/NAME.old' to '{folder}/NAME', and delete "
            f"'{beside}'."
        )


def half_replaced(folder: Path) -> list[Path]:
    """Folders of earlier files, which `save_pretrained` deletes when all new ones are in place."""
    return _saving(folder, lambda beside: any(path.suffix == '.old' for path in beside.iterdir()))


def abandoned(folder: Path) -> list[Path]:
    """Folders that a killed process was writing into: nothing has changed there for an hour."""
    return _saving(folder, lambda beside: beside.stat().st_mtime < time.time() - 3600)


def _saving(folder: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    found = []
    for beside in folder.glob(f'{SAVING}*'):
        # Another process has just finished; or it is another user's, and closed.
        with contextlib.suppress(FileNotFoundError, PermissionError):
            if wanted(beside):
                found.append(beside)
    return found


def read_shapes(path: Path, where: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a file of weights, from its header alone.

    Raises:
        LoadError: the file is damaged.
    """
    try:
        with safe_open(path, framework='pt') as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise LoadError(
            f"The weights of '{where}' are damaged or cut short, nothing was loaded: {error}. "
            'Copy or download them again.'
        ) from error


def is_adapter(shapes: Collection[str]) -> bool:
    """Whether these are the names of head and classifier alone."""
    return not any(name.startswith('backbone.') for name in shapes)


def check_shapes(
    given: Mapping[str, tuple[int, ...]], model: Any, cfg: Mapping[str, Any], where: str
) -> None:
    """Refuse weights that do not fit, before any of them is read.

    Left to timm: a classifier for another number of classes, a stem for other image channels.

    Args:
        given: shapes of the weights.
        model: `PooledModel`, which may be on the meta device.
        cfg: pretrained configuration that the weights were saved with.
        where: folder or repository, for the error.

    Raises:
        LoadError: a tensor is missing, unexpected or of another shape.
    """
    adapted: tuple[str, ...] = ()
    if cfg['num_classes'] != model.num_classes:
        adapted += (model.pretrained_cfg['classifier'],)
    if cfg['input_size'][0] != model.in_chans:
        stem = model.pretrained_cfg['first_conv'] or ()
        adapted += (stem,) if isinstance(stem, str) else tuple(stem)

    def strict(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return {
            key: shape for key, shape in shapes.items() if key.rpartition('.')[0] not in adapted
        }

    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    wanted, found = strict(state), strict(given)
    problems = [f'missing {key} {wanted[key]}' for key in wanted if key not in found]
    problems += [f'unexpected {key} {found[key]}' for key in found if key not in wanted]
    problems += [
        f'{key} is {found[key]}, not {wanted[key]}'
        for key in wanted
        if key in found and found[key] != wanted[key]
    ]
    if problems:
        size = timm.models.get_model_input_config(model.backbone)['input_size']
        shown = '\n  '.join(problems[:20] + ['...'] * (len(problems) > 20))
        raise LoadError(
            f"The weights of '{where}' are not of this model ({type(model.backbone).__name__} with "
            f'{type(model.head).__name__} for images {size}), nothing was loaded; '
            f'{len(problems)} differences:\n  {shown}'
        )


def check_size(backbone: nn.Module, plain: nn.Module, where: str) -> None:
    """Refuse an adapter whose backbone is larger than timm's own, which its weights cannot fill.

    Args:
        backbone: of the adapter, on the meta device.
        plain: timm's, without arguments, on the meta device.
        where: folder or repository, for the error.

    Raises:
        LoadError: it is larger.
    """
    asked, most = (sum(p.numel() for p in each.parameters()) for each in (backbone, plain))
    if asked > most:
        raise LoadError(
            f"The config.json of '{where}' is refused: it asks for a backbone of {asked} "
            f'parameters, where pretrained weights have {most}.'
        )


def load_weights(model: Any, weights: dict[str, Tensor], cfg: Mapping[str, Any]) -> None:
    """Load checked weights by timm, which adapts classifier and stem where they differ."""
    saved = {key: cfg[key] for key in ('num_classes', 'input_size')}
    names = {key: model.pretrained_cfg[key] for key in ('classifier', 'first_conv')}
    load_pretrained(
        model,
        pretrained_cfg={**saved, **names, 'state_dict': weights},
        num_classes=model.num_classes,
        in_chans=model.in_chans,
    )


def describe_backbone(
    backbone: Any, *, adapted: bool, cache_dir: str | Path | None
) -> dict[str, str | None]:
    """Where the weights of a freshly loaded backbone come from, and what they are.

    Args:
        backbone: timm's model.
        adapted: timm has fitted the weights to other images than they came for.
        cache_dir: of downloads.

    Returns:
        `hf_hub_id`, the Hub's repository of these weights, None where they come from elsewhere;
        and `sha256`, their digest. It is None where an adapter could not get the same again: of
        adapted weights, which may differ in a bit from machine to machine, and of a repository
        without safetensors.
    """
    cfg = backbone.pretrained_cfg
    elsewhere = cfg.get('file') or cfg.get('state_dict')
    repo_id = None if elsewhere else cfg.get('hf_hub_id')
    name, _, revision = (repo_id or '').partition('@')
    again = not repo_id or isinstance(
        try_to_load_from_cache(name, WEIGHTS, cache_dir=cache_dir, revision=revision or None), str
    )
    sha256 = digest(backbone.state_dict()) if again and not adapted else None
    return {'hf_hub_id': repo_id, 'sha256': sha256}


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values of tensors, counters of batches left out."""
    found = hashlib.sha256()
    for name in sorted(weights):
        if name.endswith('num_batches_tracked'):
            continue
        value = weights[name].detach().cpu().contiguous()
        found.update(f'{name} {value.dtype} {tuple(value.shape)}\n'.encode())
        found.update(value.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def fetch_backbone(
    names: Collection[str],
    expected: Mapping[str, str | None],
    arguments: Mapping[str, Any],
    *,
    source: str | None,
    fixed_size: bool,
    any_backbone: bool,
    cache_dir: str | Path | None,
    where: str,
) -> dict[str, Tensor]:
    """The weights of the backbone that an adapter was trained on.

    Args:
        names: tensors of the backbone that the model keeps.
        expected: what `describe_backbone` gave when the adapter was trained.
        arguments: the adapter's saved arguments.
        source: name of a backbone as `timm.create_model` takes it, where the weights come from
            instead of the Hub's repository of `expected`.
        fixed_size: the backbone is built for one size of images.
        any_backbone: take other weights than those trained with.
        cache_dir: of downloads.
        where: folder or repository of the adapter, for the error.

    Returns:
        A state dict with names as seen from the whole model.

    Raises:
        LoadError: the weights are not there, or are others than those trained with.
    """
    name, repo_id = arguments['backbone'], expected['hf_hub_id']
    options: dict[str, Any] = dict(arguments.get('backbone_kwargs') or {})
    architecture = timm.models.get_arch_name(name)
    if source is not None:
        name = source
    elif repo_id is None:
        raise LoadError(
            f"'{where}' is an adapter, head and classifier alone, and does not say which backbone "
            "is needed. Give it as backbone='local-dir:FOLDER'."
        )
    else:  # safetensors alone, also where timm would take another file
        overlay = {'hf_hub_id': repo_id, 'hf_hub_filename': WEIGHTS, 'url': '', 'file': ''}
        options['pretrained_cfg_overlay'] = overlay
    origin = source or repo_id
    if arguments.get('in_chans') is not None:
        options['in_chans'] = arguments['in_chans']
    if source is None and fixed_size and arguments.get('img_size') is not None:
        options['img_size'] = arguments['img_size']  # that of the repository's own config.json
    advice = (
        f"'{where}' is an adapter: head and classifier alone, for the backbone '{repo_id}'. With "
        "its weights in a folder, give backbone='local-dir:FOLDER'."
    )
    try:
        with clear_errors(f"Fetching the backbone '{origin}'"):
            backbone: Any = timm.create_model(
                name, pretrained=True, num_classes=0, cache_dir=cache_dir, **options
            )
    except LoadError as error:
        raise LoadError(f'{error} {advice}') from None
    except Exception as error:
        raise LoadError(
            f"The backbone '{origin}' cannot be loaded: {type(error).__name__}: {error}. {advice}"
        ) from error
    state = backbone.state_dict()
    if backbone.pretrained_cfg['architecture'] != architecture:
        raise LoadError(
            f"'{origin}' is {backbone.pretrained_cfg['architecture']}, not "
            f'{arguments["backbone"]}. {advice}'
        )
    state = {key: state[key] for key in names if key in state}
    found = digest(state)
    if found != expected['sha256'] and not any_backbone:
        raise LoadError(
            f"The weights of '{origin}' (digest {found[:12]}) are not those that '{where}' was "
            f"trained with ('{repo_id}', digest {str(expected['sha256'])[:12]}). Give "
            "backbone='local-dir:FOLDER' with the right ones, or any_backbone=True to take these, "
            'with other results than on the card.'
        )
    return {f'backbone.{key}': value for key, value in state.items()}
