"""Reading a saved model: its configuration is checked before anything is built from it, its weights
before anything is loaded, and the backbone of an adapter is fetched and recognised.

A configuration may come from anybody. It chooses an installed head and one of timm's architectures,
sets their arguments, and names the Hub's repository of an adapter's backbone, with its digest. It
cannot name code, a path or a file to read, nor ask for more memory than the weights fill.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open
from timm.models import load_pretrained
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

SOURCES = ('hf-hub', 'local-dir')  # where timm finds a saved model by its name
WEIGHTS = 'model.safetensors'
# Of a saved configuration. Larger models than any of timm's stay possible, accidents do not.
MOST_BYTES = 2**23
MOST_VALUES = 10_000
MOST_HEADS = 64
LONGEST_TEXT = 1000
LARGEST_SUM = 1_000_000  # of all numbers; timm keeps lists as long as all depths together
LARGEST_IN_BACKBONE = 2048  # timm keeps lists of all positions of a window
LARGEST_IMAGE = 8192
MOST_SECONDS = 30.0  # of one thread, for a model that has no values yet
# What timm's factories read files by, or take for themselves.
_FACTORY = {
    *inspect.signature(timm.create_model).parameters,
    *inspect.signature(timm.models.build_model_with_cfg).parameters,
    *('device', 'dtype', 'features_only', 'feature_cls', 'pruned'),
} - {'kwargs'}
# Of a pretrained configuration: where weights would come from, and what would be done to them.
_SOURCE_KEYS = ('url', 'state_dict', 'hf_hub_filename', 'custom_load', 'label_offset')


class LoadError(RuntimeError):
    """A saved model cannot be loaded: what is wrong with it, or with the way to it."""


class PushError(RuntimeError):
    """A model cannot be pushed to the Hub. What was there before is still there."""


def check_config(arguments: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Refuse the saved arguments of a model that no `save_pretrained` wrote.

    Args:
        arguments: `model_args` of config.json.
        known: arguments that may be saved.
        where: folder or repository, for the error.

    Raises:
        LoadError: an unknown argument, a backbone that is not one of timm's architectures, an
            argument that timm would read a file by, or numbers beyond all measure.
    """

    def refuse(why: str) -> LoadError:
        return LoadError(f"The config.json of '{where}' is refused: {why}.")

    unknown = sorted(map(str, set(arguments) - set(known)))
    if unknown:
        raise refuse(f'model_args holds {", ".join(unknown)[:200]}, which no saved model has')
    backbone = arguments.get('backbone')
    if not isinstance(backbone, str) or not timm.is_model(timm.models.get_arch_name(backbone)):
        raise refuse(f"backbone is {str(backbone)[:200]!r}, not one of timm's architectures")
    options = arguments.get('backbone_kwargs') or {}
    reserved = sorted(_FACTORY & set(options)) if isinstance(options, dict) else []
    if reserved:
        raise refuse(f'backbone_kwargs holds {", ".join(reserved)}, which only a caller may give')
    weights = arguments.get('backbone_weights')
    if weights is not None and not (
        isinstance(weights, dict)
        and set(weights) == {'hf_hub_id', 'sha256'}
        and isinstance(weights['hf_hub_id'], str | None)
        and isinstance(weights['sha256'], str)
    ):
        raise refuse('backbone_weights does not consist of hf_hub_id and sha256')

    if isinstance(arguments.get('head'), list) and len(arguments['head']) > MOST_HEADS:
        raise refuse(f'there are {len(arguments["head"])} heads; at most {MOST_HEADS} are possible')
    number = '{} is {}; at most {} is possible'
    for key, value in _flatten(options):
        if isinstance(value, int | float) and not abs(value) <= LARGEST_IN_BACKBONE:
            raise refuse(number.format(key, value, LARGEST_IN_BACKBONE))
    for _, value in _flatten(arguments.get('img_size')):
        if isinstance(value, int | float) and not abs(value) <= LARGEST_IMAGE:
            raise refuse(number.format('img_size', value, LARGEST_IMAGE))
    total = 0.0
    for count, (key, value) in enumerate(_flatten(arguments), start=1):
        if count > MOST_VALUES:
            raise refuse(f'model_args holds more than {MOST_VALUES} values')
        if max(len(key), len(value) if isinstance(value, str) else 0) > LONGEST_TEXT:
            raise refuse(f'model_args holds a text of more than {LONGEST_TEXT} characters')
        if isinstance(value, int | float) and key != 'seed':
            if not abs(value) <= LARGEST_SUM:
                raise refuse(number.format(key, value, LARGEST_SUM))
            total += abs(value)
    if total > LARGEST_SUM:
        raise refuse(f'the numbers in model_args make more than {LARGEST_SUM} together')


def _flatten(value: Any) -> Iterator[tuple[str, Any]]:
    """What JSON holds, with the nearest key of each; containers come before their content."""
    todo: list[Iterator[tuple[str, Any]]] = [iter([('', value)])]
    while todo:
        found = next(todo[-1], None)
        if found is None:
            todo.pop()
            continue
        yield found
        key, value = found
        if isinstance(value, Mapping):
            todo.append(iter(value.items()))
        elif isinstance(value, list | tuple):
            todo.append(zip(itertools.repeat(key), value, strict=False))


def check_images(
    cfg: Mapping[str, Any], arguments: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Check what a saved model says about images and classes.

    Args:
        cfg: timm's pretrained configuration, `pretrained_cfg` of config.json, with the source.
        arguments: `model_args` of config.json.
        where: folder or repository, for the error.

    Returns:
        The configuration, without other places of weights than its source.

    Raises:
        LoadError: a value of another type, or another number of classes than in `arguments`.
    """
    for key, (wanted, fits) in _IMAGE_KEYS.items():
        if cfg.get(key) is not None and not fits(cfg[key]):
            raise LoadError(
                f"The config.json of '{where}' is refused: {key} is {str(cfg[key])[:200]}, not "
                f'{wanted}.'
            )
    classes = cfg.get('num_classes', 1000), arguments.get('num_classes', 1000)
    if type(classes[0]) is not int or classes[0] != classes[1]:
        raise LoadError(
            f"The config.json of '{where}' is refused: num_classes is {str(classes[0])[:200]}, but "
            f'{str(classes[1])[:200]} in model_args.'
        )
    elsewhere = 'file' if cfg['source'] == 'hf-hub' else 'hf_hub_id'
    return {key: cfg[key] for key in cfg if key not in (*_SOURCE_KEYS, elsewhere)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_size(value: Any) -> bool:
    whole = isinstance(value, list | tuple) and all(type(each) is int for each in value)
    return whole and len(value) == 3 and min(value) > 0 and max(value) <= LARGEST_IMAGE


def _is_list(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(of, value))


_SIZE = ('three whole numbers: channels, height and width', _is_size)
_IMAGE_KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(('input_size', 'test_input_size', 'min_input_size'), _SIZE),
    **dict.fromkeys(('mean', 'std'), ('a list of numbers', _is_list(_is_number))),
    **dict.fromkeys(('crop_pct', 'test_crop_pct'), ('a number', _is_number)),
    **dict.fromkeys(('interpolation', 'crop_mode', 'license'), ('a text', _is_text)),
    'fixed_input_size': ('true or false', lambda value: isinstance(value, bool)),
    'label_names': ('a list of texts', _is_list(_is_text)),
    'label_descriptions': ('a table of texts', lambda value: isinstance(value, dict)),
}


@dataclass
class Size:
    """Of a model, or of all that was built of it: modules and tensors, and bytes of tensors."""

    parts: int = 0
    bytes: int = 0


LARGEST = Size(100_000, 2**35)  # more than anything in timm
# Beside what the weights fill, three times timm's own backbone: it is built up to three times, to
# look at it. 2**28 bytes are a classifier of 1000 classes for 67 000 features.
UNPROVEN = Size(5000, 2**28)


def allowed_size(plain: Size, shapes: Mapping[str, tuple[int, ...]]) -> Size:
    """What may be built, on the meta device, from a configuration.

    Args:
        plain: size of its backbone as timm builds it without arguments.
        shapes: of the weights beside the configuration; empty where they are not to be loaded.
    """
    stored = 4 * sum(map(math.prod, shapes.values()))
    return Size(
        UNPROVEN.parts + 3 * plain.parts + 6 * len(shapes),
        UNPROVEN.bytes + 3 * plain.bytes + 3 * stored,
    )


@contextmanager
def bounded(most: Size = LARGEST, *, timed: bool = False) -> Iterator[Size]:
    """Count what is built inside, on the meta device, and stop where it becomes too much.

    Args:
        most: that may be built.
        timed: stop after `MOST_SECONDS`, too, which makes it about twice as slow.

    Raises:
        ValueError: more is built, or it takes longer than `MOST_SECONDS`.
    """
    thread, built = threading.get_ident(), Size()

    def count_module(owner: nn.Module, name: str, module: nn.Module | None) -> None:
        count(0)

    def count_tensor(owner: nn.Module, name: str, tensor: Tensor | None) -> None:
        count(0 if tensor is None else tensor.numel() * tensor.element_size())

    def count(size: int) -> None:
        if threading.get_ident() != thread:
            return
        built.parts += 1
        built.bytes += size
        if built.parts > most.parts:
            raise ValueError(f'more than {most.parts} modules and tensors would be built')
        if built.bytes > most.bytes:
            raise ValueError(
                f'more than {most.bytes} bytes would be filled, against {UNPROVEN.bytes} beside '
                'what the backbone has by itself and what the weights fill'
            )

    # Python calls this at each call of a function: it also stops a loop that registers nothing.
    calls, end = itertools.count(), time.thread_time() + MOST_SECONDS

    def watch(*_: Any) -> None:
        if next(calls) % 256 == 0 and time.thread_time() > end:
            raise ValueError(f'it takes more than {MOST_SECONDS:.0f} seconds')

    handles = [
        nn_module.register_module_module_registration_hook(count_module),
        nn_module.register_module_parameter_registration_hook(count_tensor),
        nn_module.register_module_buffer_registration_hook(count_tensor),
    ]
    before = sys.getprofile()
    try:
        with torch.device('meta'):
            if timed and before is None:  # a profiler goes on
                sys.setprofile(watch)
            yield built
    finally:
        sys.setprofile(before)
        for handle in handles:
            handle.remove()


@contextmanager
def clear_errors(doing: str, kind: type[LoadError] | type[PushError] = LoadError) -> Iterator[None]:
    """Turn what huggingface_hub raises into one sentence that says what to do."""
    expected: tuple[type[Exception], ...] = (HTTPError, hub_errors.HFValidationError, OSError)
    if kind is PushError:
        expected += (RuntimeError, ValueError)  # around an error of the upload; invalid metadata
    try:
        yield
    except expected as error:
        raise kind(f'{doing} failed: {_explain(error)}') from None


def _explain(error: Exception) -> str:
    # The reason may be wrapped: "an error happened", because of a 403.
    if isinstance(error.__cause__, HTTPError) and not isinstance(error, HTTPError):
        error = error.__cause__
    response = getattr(error, 'response', None)
    status = response.status_code if response is not None else None
    if isinstance(error, hub_errors.HFValidationError):
        return str(error)
    if isinstance(error, hub_errors.OfflineModeIsEnabled):
        return 'the Hub is needed, but HF_HUB_OFFLINE is set. Unset it, or give a folder.'
    if isinstance(error, hub_errors.GatedRepoError):
        return 'access to the repository must be asked for, on its page.'
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return 'the repository has no such revision.'
    if isinstance(error, hub_errors.RemoteEntryNotFoundError):
        return 'the repository lacks a file that every saved model has.'
    if isinstance(error, hub_errors.LocalEntryNotFoundError):
        return (
            'the Hub cannot be reached, and the file is not in the cache. Check the connection, or '
            'HF_HUB_OFFLINE, and try again.'
        )
    if status == 401:
        return 'no such repository, or it is private and HF_TOKEN has no access to it (401).'
    if status == 403:
        return 'the token does not allow this (403). Give one that may write to the repository.'
    if status == 404:
        return 'no such repository (404). Check its name, and the token if it is private.'
    if status == 409:
        return 'the repository was changed by somebody else at the same time (409). Try again.'
    if status == 429:
        return 'the Hub says that there were too many requests (429). Wait, and try again.'
    if status is not None and status >= 500:
        return f'the Hub has a fault of its own ({status}). Try again later.'
    if status is not None:
        return f'the Hub answered {status}.'
    if isinstance(error, HTTPError | ConnectionError):
        return 'there is no connection to the Hub, or it broke. Try again.'
    return str(error).partition('\n')[0] or type(error).__name__


def find_weights(cfg: Mapping[str, Any], cache_dir: str | Path | None) -> Path:
    """The file of weights of a saved model, downloaded if it is on the Hub.

    Args:
        cfg: timm's pretrained configuration, with `source` 'hf-hub' or 'local-dir'.
        cache_dir: of downloads.

    Raises:
        LoadError: there is none, or the Hub cannot be reached.
    """
    if cfg['source'] == 'hf-hub':
        repo_id, _, revision = cfg['hf_hub_id'].partition('@')
        with clear_errors(f"Downloading the weights of '{cfg['hf_hub_id']}'"):
            return Path(
                hf_hub_download(repo_id, WEIGHTS, revision=revision or None, cache_dir=cache_dir)
            )
    path = Path(cfg['file'], WEIGHTS)
    if not path.is_file():
        raise LoadError(
            f"'{cfg['file']}' holds no {WEIGHTS}. Save it by timm_fisher.save_pretrained, or by "
            'timm.models.save_for_hf(model, folder, safe_serialization=True).'
        )
    return path


def check_file(name: str, cache_dir: str | Path | None) -> None:
    """Refuse a config.json that timm should not even read, or would build a model of its own from.

    Args:
        name: of a saved model, as `timm.create_model` takes it, with its source.
        cache_dir: of downloads.

    Raises:
        LoadError: no such file, too large, not JSON, or not of a timm_fisher model.
    """
    source, place = timm.models.parse_model_name(name)
    with clear_errors(f"Reading the config.json of '{place}'"):
        if source == 'hf-hub':
            repo_id, _, revision = place.partition('@')
            path = Path(
                hf_hub_download(
                    repo_id, 'config.json', revision=revision or None, cache_dir=cache_dir
                )
            )
        else:
            path = Path(place, 'config.json')
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise LoadError(
                f"The config.json of '{place}' is refused: {size} bytes; at most {MOST_BYTES} are "
                'possible.'
            )
        text = path.read_bytes()
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"The config.json of '{place}' is not readable JSON: {error}.") from error
    architecture = config.get('architecture') if isinstance(config, dict) else None
    if architecture != 'timm_fisher':
        raise LoadError(
            f"'{place}' is not a timm_fisher model: the architecture in its config.json is "
            f'{str(architecture)[:200]!r}.'
        )


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


def describe_backbone(backbone: Any) -> dict[str, str | None]:
    """Where the weights of a freshly loaded backbone come from, and what they are.

    Returns:
        `hf_hub_id`, the Hub's repository of these weights, None where they come from elsewhere;
        and `sha256`, their digest.
    """
    cfg = backbone.pretrained_cfg
    elsewhere = cfg.get('file') or cfg.get('state_dict')
    repo_id = None if elsewhere else cfg.get('hf_hub_id')
    return {'hf_hub_id': repo_id, 'sha256': digest(backbone.state_dict())}


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
    expected: Mapping[str, str],
    arguments: Mapping[str, Any],
    *,
    source: str | None,
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
    named = (repo_id or '').rpartition('/')[2]  # ARCHITECTURE.TAG, in timm's own repositories
    own = timm.models.get_arch_pretrained_cfgs(architecture).get(named)
    if source is not None:
        name = source
    elif repo_id is None:
        raise LoadError(
            f"'{where}' is an adapter, head and classifier alone, and does not say which backbone "
            "is needed. Give it as backbone='local-dir:FOLDER'."
        )
    elif own is not None and own.hf_hub_id == repo_id:
        name = named
    else:
        overlay = {'hf_hub_id': repo_id, 'hf_hub_filename': WEIGHTS, 'url': '', 'file': ''}
        options['pretrained_cfg_overlay'] = overlay
    origin = source or repo_id
    if arguments.get('in_chans') is not None:
        options['in_chans'] = arguments['in_chans']
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
            f"trained with ('{repo_id}', digest {expected['sha256'][:12]}). Give "
            "backbone='local-dir:FOLDER' with the right ones, or any_backbone=True to take these, "
            'with other results than on the card.'
        )
    return {f'backbone.{key}': value for key, value in state.items()}
