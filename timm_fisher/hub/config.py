"""What the config.json of a saved model may say: read and checked before anything is built.

It may come from anybody, so everything is on a list of what is allowed: an installed head, whose
constructor bounds its own arguments; one of timm's architectures; those of its arguments that
change shapes in known ways; sizes of images; names of classes. It cannot name code, a path or a
file. `trust_config=True` of the caller lifts the limits on the backbone's arguments and on sizes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.layers.helpers import to_2tuple

from timm_fisher.errors import LoadError
from timm_fisher.head import MOST_FEATURES
from timm_fisher.hub.text import LONGEST_LABEL, problem
from timm_fisher.hub.weights import find_file
from timm_fisher.lora import LoRA
from timm_fisher.registry import nearest

ARCHITECTURE = 'timm_fisher'
MOST_BYTES = 2**23  # of the file
MOST_CLASSES = 1_000_000
MOST_HEADS = 8
MOST_VALUES = 1000  # in the arguments of heads
LARGEST_IMAGE = 2048  # side in pixels
LARGEST_RESIZE = 8192  # side in pixels, before the middle is cut out
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
CROP_MODES = ('center', 'squash', 'border')
TRUST = 'If you trust it, give trust_config=True'


@dataclass(frozen=True)
class SavedConfig:
    """A checked config.json: arguments of `PooledModel`, what timm's pretrained configuration says
    about images and classes, and `hf_hub_id` and `sha256` of the backbone's weights, if it had any.
    """

    arguments: dict[str, Any]
    images: dict[str, Any]
    backbone_weights: dict[str, str | None] | None


def read_config(
    source: str, place: str, cache_dir: str | Path | None = None, *, trust_config: bool = False
) -> SavedConfig:
    """Read and check the config.json of a saved model.

    Args:
        source, place, cache_dir: as `timm_fisher.hub.weights.find_file` takes them.
        trust_config: take any of the backbone's arguments, and images of any size.

    Raises:
        LoadError: no such file, too large, not JSON, or it says what it may not.
    """
    path = find_file('config.json', source, place, cache_dir)
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise ValueError(f'it has {size} bytes; at most {MOST_BYTES} are allowed')
        return check_config(json.loads(path.read_bytes()), trust_config=trust_config)
    except (ValueError, RecursionError) as error:
        kind = 'refused' if type(error) is ValueError else 'not readable JSON'
        raise LoadError(f"The config.json of '{place}' is {kind}: {error}.") from error


def check_config(config: Any, *, trust_config: bool = False) -> SavedConfig:
    """Check the content of a config.json; ValueError if it is refused."""
    architecture = config.get('architecture') if isinstance(config, dict) else None
    if architecture != ARCHITECTURE:
        raise ValueError(f'its architecture is {_shown(architecture)}, not {ARCHITECTURE}')
    for name in ('model_args', 'pretrained_cfg'):
        if not isinstance(config.get(name), dict):
            raise ValueError(f'{name} is {_shown(config.get(name))}, not a table')
    arguments = {key: value for key, value in config['model_args'].items() if value is not None}
    for place in (config, config['pretrained_cfg']):
        if place.get('num_classes') is not None:
            arguments.setdefault('num_classes', place['num_classes'])
    _check_values('model_args', arguments, _ARGUMENTS)
    for key in ('backbone', 'head'):
        if key not in arguments:
            raise ValueError(f'model_args has no {key}')
    _check_heads(arguments)
    if not trust_config:
        options = arguments.get('backbone_kwargs', {})
        _check_values('backbone_kwargs', options, _BACKBONE_ARGUMENTS, f'. {TRUST}')
    images = _check_images(config, arguments, trust_config)
    weights = arguments.pop('backbone_weights', None)
    return SavedConfig(arguments, images, weights)


def _check_values(
    place: str, values: Mapping[str, Any], allowed: Mapping[str, _Check], advice: str = ''
) -> None:
    for key, value in values.items():
        if key not in allowed:
            raise ValueError(
                f"{place} holds '{key[:100]}', which is not among the arguments that a saved model "
                f'may set{advice}.{nearest(key[:100], allowed)}'.removesuffix('.')
            )
        wanted, is_valid = allowed[key]
        if not is_valid(value):
            raise ValueError(f'{key} is {_shown(value)}, not {wanted}{advice}')


def _shown(value: Any) -> str:
    """A value for a message, whatever it holds."""
    text = repr(value) if isinstance(value, str) else str(value)
    return ascii(text[:200])[1:-1] if not text[:200].isprintable() else text[:200]


# Values that are allowed. A check gets any JSON value.

_Check = tuple[str, Callable[[Any], bool]]


def _is_whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _is_number(least: float, most: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and least <= value <= most


def _is_one_of(*known: Any) -> Callable[[Any], bool]:
    return lambda value: any(value == option and type(value) is type(option) for option in known)


def _is_list(is_valid: Callable[[Any], bool], longest: int) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list | tuple) and len(value) <= longest and all(map(is_valid, value))
    )


def _is_size(least: int, lengths: int, most: int) -> Callable[[Any], bool]:
    """One whole number, or a list of `lengths` of them."""
    single, several = _is_whole(least, most), _is_list(_is_whole(least, most), lengths)
    return lambda value: single(value) or (several(value) and len(value) == lengths)


def _is_text(longest: int) -> Callable[[Any], bool]:
    return lambda value: not problem(value, longest)


def _is_one_or_list(is_valid: Callable[[Any], bool], longest: int) -> Callable[[Any], bool]:
    return lambda value: is_valid(value) or _is_list(is_valid, longest)(value)


def _is_architecture(value: Any) -> bool:
    return _is_text(100)(value) and timm.is_model(timm.models.get_arch_name(value))


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_lora(value: Any) -> bool:
    try:
        return _is_table(value) and _is_list(_is_text(200), MOST_VALUES)(LoRA.of(value).targets)
    except (TypeError, ValueError):
        return False


def _is_weights(value: Any) -> bool:
    known = _is_table(value) and set(value) == {'hf_hub_id', 'sha256'}
    return known and all(text is None or _is_text(200)(text) for text in value.values())


_ARGUMENTS: dict[str, _Check] = {
    'backbone': ("one of timm's architectures", _is_architecture),
    'head': (
        f'the names of 1 to {MOST_HEADS} heads, or a list of them',
        lambda value: (
            (_is_text(100 * MOST_HEADS)(value) and value.count('+') < MOST_HEADS)
            or (_is_list(_is_table, MOST_HEADS)(value) and len(value) > 0)
        ),
    ),
    'head_kwargs': ('a table', _is_table),
    'backbone_kwargs': ('a table', _is_table),
    'num_classes': (f'a whole number up to {MOST_CLASSES}', _is_whole(0, MOST_CLASSES)),
    'in_chans': ('a whole number from 1 to 1024', _is_whole(1, 1024)),
    'img_size': ('one or two whole numbers', _is_size(1, 2, 2**31)),
    'drop_rate': ('a number from 0 to 1', _is_number(0, 1)),
    'drop_path_rate': ('a number from 0 to 1', _is_number(0, 1)),
    'projection': (f'a whole number from 1 to {MOST_FEATURES}', _is_whole(1, MOST_FEATURES)),
    'pre_norm': ('true or false', lambda value: isinstance(value, bool)),
    'stage': ('a whole number from -64 to -1', _is_whole(-64, -1)),
    'class_token': ('drop, keep or append', _is_one_of('drop', 'keep', 'append')),
    'last_stride': ('1', _is_one_of(1)),
    'lora': ('a table of a rank r up to 1024, alpha and targets', _is_lora),
    'backbone_weights': ('a table of hf_hub_id and sha256', _is_weights),
}  # fmt: skip

# Arguments of timm's backbones that change shapes in known ways.
MOST_LAYERS = 160  # of all stages together


def _is_layers(value: Any) -> bool:
    return _is_list(_is_whole(1, 64), 8)(value) and sum(value) <= MOST_LAYERS


_FLAG = ('true or false', lambda value: isinstance(value, bool))
_BACKBONE_ARGUMENTS: dict[str, _Check] = {
    'output_stride': ('8, 16 or 32', _is_one_of(8, 16, 32)),
    'global_pool': ('a short text', _is_text(20)),
    'img_size': ('one or two whole numbers up to 2048', _is_size(1, 2, LARGEST_IMAGE)),
    'patch_size': ('one or two whole numbers from 1 to 64', _is_size(1, 2, 64)),
    'window_size': ('whole numbers from 1 to 64', _is_one_or_list(_is_size(1, 2, 64), 8)),
    'embed_dim': ('whole numbers from 1 to 4096', _is_one_or_list(_is_whole(1, 4096), 8)),
    'channels': ('up to 8 whole numbers from 1 to 4096', _is_list(_is_whole(1, 4096), 8)),
    **dict.fromkeys(('depth', 'reg_tokens'), ('a whole number from 1 to 64', _is_whole(1, 64))),
    'num_heads': ('whole numbers from 1 to 64', _is_one_or_list(_is_whole(1, 64), 8)),
    **dict.fromkeys(('depths', 'layers'), (f'whole numbers, {MOST_LAYERS} together', _is_layers)),
    **dict.fromkeys(
        ('dynamic_img_size', 'dynamic_img_pad', 'strict_img_size', 'always_partition',
         'class_token', 'no_embed_class', 'use_fc_norm'),
        _FLAG,
    ),
    **dict.fromkeys(
        ('drop_rate', 'drop_block_rate', 'proj_drop_rate', 'attn_drop_rate', 'init_values',
         'threshold'),
        ('a number from 0 to 1', _is_number(0, 1)),
    ),
}  # fmt: skip


def _check_heads(arguments: Mapping[str, Any]) -> None:
    """Bound what the heads get, whose constructors check what it means."""
    todo, count = [arguments['head'], arguments.get('head_kwargs')], 0
    while todo:
        value, count = todo.pop(), count + 1
        if count > MOST_VALUES:
            raise ValueError(f'the arguments of the heads hold more than {MOST_VALUES} values')
        if isinstance(value, dict):
            todo += [*value, *value.values()]
        elif isinstance(value, list):
            todo += value
        elif isinstance(value, str) and problem(value, 1000):
            raise ValueError(f'a text among the arguments of the heads {problem(value, 1000)}')
        elif type(value) in (int, float) and not abs(value) < 2**63:
            raise ValueError(f'a number among the arguments of the heads is {_shown(value)}')


_IMAGE_SIZE = (
    'three whole numbers: up to 1024 channels, height and width',
    lambda value: isinstance(value, list) and _is_size(1, 3, 2**31)(value) and value[0] <= 1024,
)
_IMAGES: dict[str, _Check] = {
    **dict.fromkeys(('input_size', 'test_input_size', 'min_input_size'), _IMAGE_SIZE),
    'mean': ('numbers from -1000 to 1000', _is_list(_is_number(-1000, 1000), 1024)),
    'std': ('numbers from 1e-6 to 1000', _is_list(_is_number(1e-6, 1000), 1024)),
    **dict.fromkeys(
        ('crop_pct', 'test_crop_pct'), ('a number from 0.1 to 2.0', _is_number(0.1, 2.0))
    ),
    'interpolation': (f'one of {", ".join(INTERPOLATIONS)}', _is_one_of(*INTERPOLATIONS)),
    'crop_mode': (f'one of {", ".join(CROP_MODES)}', _is_one_of(*CROP_MODES)),
    'license': ('a text of up to 200 characters', _is_text(200)),
    'fixed_input_size': _FLAG,
    'num_classes': (f'a whole number up to {MOST_CLASSES}', _is_whole(0, MOST_CLASSES)),
    'label_names': ('a list of texts', _is_list(lambda v: isinstance(v, str), MOST_CLASSES)),
    'label_descriptions': (
        'a table of texts of up to 1000 characters',
        lambda value: isinstance(value, dict)
        and all(_is_text(1000)(text) for pair in value.items() for text in pair),
    ),
}  # fmt: skip


def _check_images(
    config: Mapping[str, Any], arguments: Mapping[str, Any], trust_config: bool
) -> dict[str, Any]:
    """What timm's pretrained configuration says of images and classes; all else is left out."""
    # At the top level, timm takes these first.
    top = {key: config.get(key) for key in ('num_classes', 'label_names', 'label_descriptions')}
    cfg = config['pretrained_cfg'] | {k: value for k, value in top.items() if value is not None}
    images = {key: cfg[key] for key in _IMAGES if cfg.get(key) is not None}
    _check_values('pretrained_cfg', images, _IMAGES)
    classes = arguments.get('num_classes', 1000)
    if images.setdefault('num_classes', classes) != classes:
        raise ValueError(f'num_classes is {images["num_classes"]}, but {classes} in model_args')
    names = images.get('label_names')
    if names is not None and len(names) != classes:
        raise ValueError(f'there are {len(names)} label_names for {classes} classes')
    for number, name in enumerate(names or ()):
        if problem(name, LONGEST_LABEL):
            raise ValueError(f'label_names[{number}] {problem(name, LONGEST_LABEL)}')
    images.setdefault('input_size', [3, 224, 224])
    for key in ('input_size', 'test_input_size', 'min_input_size'):
        if key in images:
            images[key] = tuple(images[key])
    channels, *size = images['input_size']
    for key in ('mean', 'std'):
        if key in images and len(images[key]) not in (1, 3, channels):
            raise ValueError(f'{key} has {len(images[key])} values for {channels} channels')
    side = max(
        *size, *images.get('test_input_size', ())[1:], *to_2tuple(arguments.get('img_size', 1))
    )
    crop = min(images.get(key, 1.0) for key in ('crop_pct', 'test_crop_pct'))
    if not trust_config and side > LARGEST_IMAGE:
        raise ValueError(f'images of {side} pixels; at most {LARGEST_IMAGE} are allowed. {TRUST}')
    # timm resizes an image to this before it cuts the middle out.
    if not trust_config and side / crop > LARGEST_RESIZE:
        raise ValueError(
            f'images would be resized to {side} / {crop} pixels; at most {LARGEST_RESIZE} are '
            f'allowed. {TRUST}'
        )
    return images
