"""Checks of a saved model's config.json, before anything is built from it.

It may come from anybody. It chooses an installed head and one of timm's architectures, sets their
arguments, and names the Hub's repository of an adapter's backbone, with its digest. It cannot name
code, a path or a file to read, nor ask for more memory than the weights beside it fill.
"""

from __future__ import annotations

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
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from timm_fisher.errors import LoadError, clear_errors
from timm_fisher.hub.weights import find_file

SOURCES = ('hf-hub', 'local-dir')  # where timm finds a saved model by its name
# Of a saved configuration. Larger models than any of timm's stay possible, accidents do not.
MOST_BYTES = 2**23
MOST_VALUES = 10_000
MOST_HEADS = 64
LONGEST_TEXT = 1000
LARGEST_SUM = 1_000_000  # of all numbers; timm keeps lists as long as all depths together
LARGEST_IN_BACKBONE = 2048  # timm keeps lists of all positions of a window
MOST_ITERATIONS = 1000  # of a head, in each forward pass
_ITERATIONS = ('iterations', 'steps', 'updates')  # last word of the names of such arguments
LARGEST_IMAGE = 8192
ORDINARY_IMAGE = 1024
SMALLEST_CROP, LARGEST_CROP = 0.1, 2.0
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
CROP_MODES = ('center', 'squash', 'border')
MOST_SECONDS = 30.0  # of one thread, for a model that has no values yet
# What timm's factories read files by, or take for themselves.
_FACTORY = {
    *inspect.signature(timm.create_model).parameters,
    *inspect.signature(timm.models.build_model_with_cfg).parameters,
    *('device', 'dtype', 'features_only', 'feature_cls', 'pruned'),
} - {'kwargs'}
# Of a pretrained configuration: where weights would come from, and what would be done to them.
_SOURCE_KEYS = ('url', 'state_dict', 'hf_hub_filename', 'custom_load', 'label_offset')


def check_file(name: str, cache_dir: str | Path | None) -> None:
    """Refuse a config.json that timm should not even read, or would build a model of its own from.

    Args:
        name: of a saved model, as `timm.create_model` takes it, with its source.
        cache_dir: of downloads.

    Raises:
        LoadError: no such file, too large, not JSON, or not of a timm_fisher model.
    """
    source, place = timm.models.parse_model_name(name)
    path = find_file('config.json', str(source), place, cache_dir)
    with clear_errors(f"Reading the config.json of '{place}'"):
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
        and isinstance(weights['sha256'], str | None)
    ):
        raise refuse('backbone_weights does not consist of hf_hub_id and sha256')

    if isinstance(arguments.get('head'), list) and len(arguments['head']) > MOST_HEADS:
        raise refuse(f'there are {len(arguments["head"])} heads; at most {MOST_HEADS} are possible')
    number = '{} is {}; at most {} is possible'
    for key, value in _flatten(options):
        if isinstance(value, int | float) and not abs(value) <= LARGEST_IN_BACKBONE:
            raise refuse(number.format(key, value, LARGEST_IN_BACKBONE))
    for key, value in _flatten([arguments.get('head'), arguments.get('head_kwargs')]):
        repeated = isinstance(value, int | float) and key.rpartition('_')[2] in _ITERATIONS
        if repeated and not abs(value) <= MOST_ITERATIONS:
            raise refuse(number.format(key, value, MOST_ITERATIONS))
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
        LoadError: a value of another type or beyond measure, or another number of classes, or of
            their names, than in `arguments`.
    """

    def refuse(why: str) -> LoadError:
        return LoadError(f"The config.json of '{where}' is refused: {why}.")

    for key, (wanted, fits) in _IMAGE_KEYS.items():
        if cfg.get(key) is not None and not fits(cfg[key]):
            raise refuse(f'{key} is {str(cfg[key])[:200]}, not {wanted}')
    classes = cfg.get('num_classes', 1000), arguments.get('num_classes', 1000)
    if type(classes[0]) is not int or classes[0] != classes[1]:
        raise refuse(
            f'num_classes is {str(classes[0])[:200]}, but {str(classes[1])[:200]} in model_args'
        )
    names = cfg.get('label_names')
    if names is not None and len(names) != classes[0]:
        raise refuse(f'there are {len(names)} label_names for {classes[0]} classes')
    sizes = [cfg.get(key) or (3, 224, 224) for key in ('input_size', 'test_input_size')]
    for key in ('mean', 'std'):
        if cfg.get(key) is not None and len(cfg[key]) not in (1, 3, sizes[0][0]):
            raise refuse(f'{key} has {len(cfg[key])} values for {sizes[0][0]} channels')
    # timm resizes an image to this before it cuts the middle out.
    side = max(max(size[1:]) for size in sizes)
    crop = min(cfg.get(key) or 1.0 for key in ('crop_pct', 'test_crop_pct'))
    if side / crop > LARGEST_IMAGE:
        raise refuse(
            f'images would be resized to {side} / {crop} pixels; at most {LARGEST_IMAGE} are '
            'possible'
        )
    elsewhere = 'file' if cfg['source'] == 'hf-hub' else 'hf_hub_id'
    return {key: cfg[key] for key in cfg if key not in (*_SOURCE_KEYS, elsewhere)}


def _is_between(least: float, most: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int | float) and least <= value <= most


def _is_one_of(known: Collection[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in known


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_size(value: Any) -> bool:
    whole = isinstance(value, list | tuple) and all(type(each) is int for each in value)
    return whole and len(value) == 3 and min(value) > 0 and max(value) <= LARGEST_IMAGE


def _is_list(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(of, value))


_SIZE = ('three whole numbers: channels, height and width', _is_size)
_CROP = (
    f'a number from {SMALLEST_CROP} to {LARGEST_CROP}',
    _is_between(SMALLEST_CROP, LARGEST_CROP),
)
_IMAGE_KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(('input_size', 'test_input_size', 'min_input_size'), _SIZE),
    'mean': ('a list of numbers up to 1000', _is_list(_is_between(-1000, 1000))),
    'std': ('a list of numbers from 1e-6 to 1000', _is_list(_is_between(1e-6, 1000))),
    **dict.fromkeys(('crop_pct', 'test_crop_pct'), _CROP),
    'interpolation': (f'one of {", ".join(INTERPOLATIONS)}', _is_one_of(INTERPOLATIONS)),
    'crop_mode': (f'one of {", ".join(CROP_MODES)}', _is_one_of(CROP_MODES)),
    'license': ('a text', _is_text),
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


def may_take_long(arguments: Mapping[str, Any]) -> bool:
    """Whether a backbone that loops over positions could have many of them to loop over."""
    options = [value for _, value in _flatten(arguments.get('backbone_kwargs'))]
    sizes = [value for _, value in _flatten(arguments.get('img_size'))]
    return any(type(value) in (int, float) for value in options) or any(
        type(value) in (int, float) and value > ORDINARY_IMAGE for value in sizes
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
                'what the backbone has by itself and, with pretrained=True, the weights fill'
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
    armed = timed and sys.getprofile() is None  # a profiler goes on
    try:
        with torch.device('meta'):
            if armed:
                sys.setprofile(watch)
            yield built
    finally:
        if armed:
            sys.setprofile(None)
        for handle in handles:
            handle.remove()
