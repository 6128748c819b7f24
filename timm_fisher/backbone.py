"""The backbone of a model: built by timm, without what its descriptors do not depend on; and where
its weights come from."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from timm.data.loader import adapt_to_chs
from timm.layers.helpers import to_2tuple
from timm.models import get_model_input_config, model_entrypoint
from torch import Tensor, nn

from timm_fisher.descriptors import StageDescriptors, find_descriptors, remove_unused
from timm_fisher.errors import ArgumentError
from timm_fisher.head import PoolingHead
from timm_fisher.lora import LoRA
from timm_fisher.registry import get_head, nearest
from timm_fisher.specification import HeadSpec

WEIGHTS = 'model.safetensors'
# What a pretrained_cfg says about images; the rest of it is about the backbone's own weights.
_DATA_KEYS = (
    'input_size', 'test_input_size', 'min_input_size', 'fixed_input_size', 'interpolation',
    'crop_pct', 'test_crop_pct', 'crop_mode', 'mean', 'std', 'license',
)  # fmt: skip


@dataclass
class Backbone:
    """A timm model without classifier, what reads its stages in ascending order, the size of an
    image (channels, height, width), rows and columns of the last stage's descriptors, those of the
    model's arguments that its folder or repository has, beside size, channels and classes, and
    where its weights come from, if it is pretrained."""

    module: Any
    descriptors: StageDescriptors
    input_size: tuple[int, int, int]
    pool_size: tuple[int, int] | None
    arguments: dict[str, Any]
    weights: dict[str, str | None] | None


@torch.inference_mode(False)  # whose tensors could not be trained later
def create_backbone(
    name: str,
    arguments: Mapping[str, Any],
    *,
    img_size: int | tuple[int, int] | None,
    heads: Sequence[HeadSpec],
    class_token: str,
    last_stride: int | None,
    lora: LoRA | None,
    pretrained: bool,
) -> Backbone:
    """Look at a backbone on the meta device, then build it without what is not needed.

    Where the default device is the meta device, it is not built again. A backbone that is built for
    one size of images shows that only once it is built, and is then built for another.

    Args:
        name: any name that `timm.create_model` takes, `hf-hub:` and `local-dir:` included.
        arguments: of `timm.create_model`.
        img_size, class_token, last_stride, pretrained: as `PooledModel` takes them.
        heads: that pool its stages.
        lora: low-rank changes, which its layers get factors of.

    Raises:
        ValueError: an unknown backbone, stage or class-token mode, or a backbone that cannot give
            what a head asks for.
    """
    _check_name(name)
    arguments = {**arguments, 'num_classes': 0}
    with torch.device('meta'):
        seen = timm.create_model(name, **arguments)
        if img_size is not None and get_model_input_config(seen)['fixed_input_size']:
            arguments['img_size'] = img_size
            seen = timm.create_model(name, **arguments)
        if hasattr(seen, 'descriptors'):
            raise ValueError(
                f"'{name}' is a whole timm_fisher model, not a backbone. Load it by "
                f"timm.create_model('{name}', pretrained=True)."
            )
        if last_stride is not None:
            _keep_last_stride(seen, last_stride)
        shape = get_model_input_config(seen)['input_size']
        input_size = (shape[0], *to_2tuple(img_size or shape[1:]))
        stages = sorted({head.stage for head in heads})
        descriptors, pool_size, idle, dead = find_descriptors(
            seen.eval(), torch.empty(1, *input_size), stages=stages, class_token=class_token
        )
        for head in heads:
            _check_context(name, head, descriptors[stages.index(head.stage)])
        seen.train()
    if torch.get_default_device().type == 'meta':
        module = seen
    else:
        module = timm.create_model(name, pretrained=pretrained, **arguments)
        if last_stride is not None:
            _keep_last_stride(module, last_stride)
    remove_unused(module, idle, dead)
    weights = describe_weights(module, arguments.get('cache_dir')) if pretrained else None
    if lora is not None:
        lora.add_to(module, descriptors, input_size)
    recorded = ('num_classes', 'in_chans', 'img_size')  # by the model itself
    stored = getattr(module, 'pretrained_model_args', {})
    given = {key: value for key, value in stored.items() if key not in recorded}
    return Backbone(module, descriptors, input_size, pool_size, given, weights)


def _check_context(backbone: str, head: HeadSpec, reader: Any) -> None:
    """Refuse a head that needs what the reader of its stage cannot give."""
    for name, needed in get_head(head.name).asks_for.items():
        if needed and not reader.can_give(name):
            what = name.replace('_', ' ')
            raise ValueError(
                f"Head '{head.name}' needs a {what}, which '{backbone}' does not give at stage "
                f'{head.stage}. Take '
                + (
                    'the output of a transformer that has one, such as vit_base_patch16_224, or '
                    'another head.'
                    if name == 'class_token'
                    else "class_token='drop', which keeps tokens without a place out."
                )
            )


def check_number(name: str, head: PoolingHead, built: Backbone) -> None:
    """Refuse a head that needs more descriptors than an image has."""
    number = math.prod(built.pool_size or (head.least_descriptors,))
    if number < head.least_descriptors:
        raise ValueError(
            f"Head '{name}' as it is set needs {head.least_descriptors} descriptors, and an image "
            f'of {built.input_size[1:]} has {number}. Change its arguments, or take larger images '
            'or an earlier stage.'
        )


def create_features(
    options: Mapping[str, Any],
    *,
    backbone: str,
    img_size: int | tuple[int, int] | None = None,
    last_stride: int | None = None,
    pretrained: bool = False,
    **arguments: Any,
) -> nn.Module:
    """A backbone as timm's `features_only=True` gives it.

    Args:
        options: of `timm.create_model`, `out_indices` and `feature_cls` among them.
        backbone, img_size, last_stride, pretrained: as `PooledModel` takes them.
        **arguments: others of `PooledModel`, of which those are taken that a backbone has.
    """
    _check_name(backbone)
    passed = ('in_chans', 'drop_path_rate', 'pretrained_cfg_overlay', 'cache_dir')
    given = {key: arguments[key] for key in passed if arguments.get(key) is not None}
    given = {**options, **given, 'features_only': True}
    if img_size is not None:
        with torch.device('meta'):
            seen = timm.create_model(backbone, **given)
        if get_model_input_config(seen)['fixed_input_size']:
            given['img_size'] = img_size
    features: nn.Module = timm.create_model(backbone, pretrained=pretrained, **given)
    inner = getattr(features, 'model', features)
    if last_stride is not None and getattr(inner, 'layer4', None):  # else it is not asked for
        _keep_last_stride(inner, last_stride)
    return features


def _check_name(name: str) -> None:
    """Refuse what names none of timm's backbones, nor a folder that holds one."""
    if not isinstance(name, str):
        raise ArgumentError(
            "backbone is the name of a timm model, such as 'resnet50', not a "
            f'{type(name).__name__}.'
        )
    source, architecture = timm.models.parse_model_name(name)
    if source == 'local-dir' and not Path(architecture, 'config.json').is_file():
        raise FileNotFoundError(
            f"'{architecture}' is no folder of a timm model: it holds no config.json. (That of "
            'tf_efficientnet_lite0 is written by `python recipes/maintenance/lite0_weights.py '
            'FOLDER`, without the Hub.)'
        )
    architecture = timm.models.get_arch_name(architecture)
    if source is None and (not timm.is_model(architecture) or is_ours(architecture)):
        known = [known for known in timm.list_models() if not is_ours(known)]
        raise ValueError(
            f"Unknown backbone '{name}'.{nearest(architecture, known)} "
            'timm.list_models() lists all of them.'
        )


def is_ours(architecture: str) -> bool:
    """Whether a name of `timm.list_models()` is a whole model of this package, not a backbone."""
    module = model_entrypoint(architecture).__module__
    return module in ('timm_fisher.factory', 'timm_fisher.presets')


def can_resize(backbone: Any) -> bool:
    """Whether a backbone that is built takes images of another size."""
    fixed = get_model_input_config(backbone)['fixed_input_size']
    return not fixed or hasattr(backbone, 'set_input_size')


def resize(backbone: Any, size: tuple[int, int], patch_size: tuple[int, int] | None) -> None:
    """Have a backbone take images of another height and width, and patches of another, in place.

    Raises:
        ValueError: it can neither take another size nor resample.
    """
    built = get_model_input_config(backbone)
    given = {'patch_size': patch_size} if patch_size else {}
    if built['fixed_input_size'] and size != built['input_size'][1:]:
        given['img_size'] = size
    change: Any = getattr(backbone, 'set_input_size', None)
    allowed = inspect.signature(change).parameters if change else ()
    for key, value in given.items():
        if key not in allowed:
            raise ValueError(
                f'{type(backbone).__name__}, built for images {built["input_size"]}, cannot change '
                f'to {key}={value}. Create the model with {key}={value}.'
            )
    if min(patch_size or (1,)) < 1 or len({*(patch_size or (1,))}) > 1:
        raise ValueError(f'{patch_size=} is not that of a square patch of one pixel or more.')
    before = to_2tuple(backbone.patch_embed.patch_size)[0] if patch_size else 0
    if given:
        change(**given)
    if patch_size:  # timm leaves these as they were
        for stage in backbone.feature_info:
            stage['reduction'] = stage['reduction'] * patch_size[0] // before


def _keep_last_stride(backbone: Any, last_stride: int) -> None:
    """Stride 1 in the last stage of a ResNet, in place; see `PooledModel`."""
    if last_stride != 1:
        raise ValueError(f'{last_stride=} is not 1, or None for the backbone as it is.')
    stage = getattr(backbone, 'layer4', nn.Identity())
    layers = [layer for layer in stage.modules() if not any(layer.children())]
    strided = [layer for layer in layers if getattr(layer, 'stride', 1) not in (1, (1, 1))]
    if not strided or not all(isinstance(layer, nn.Conv2d) for layer in strided):
        raise ValueError(
            f'{last_stride=} needs a last stage that only convolutions make smaller, as that of '
            f'resnet50; {type(backbone).__name__} has none here.'
        )
    for layer in strided:
        layer.stride = (1, 1)
    backbone.feature_info[-1]['reduction'] //= 2


def wrap_cfg(
    source: Mapping[str, Any],
    input_size: tuple[int, ...],
    pool_size: tuple[int, int] | None,
    num_classes: int,
) -> dict[str, Any]:
    """The image configuration of a model from that of its backbone (`source`): module names as seen
    from the model, and rows and columns of its descriptors (`pool_size`)."""
    cfg = {key: source[key] for key in _DATA_KEYS if key in source}
    set_size(cfg, input_size, pool_size)
    # Of grey images timm's loader takes the average, its transform refuses three values.
    cfg |= {key: adapt_to_chs(cfg[key], input_size[0]) for key in ('mean', 'std') if key in cfg}
    stem = source.get('first_conv')
    if stem is not None:
        names = [f'backbone.{name}' for name in ([stem] if isinstance(stem, str) else stem)]
        stem = names[0] if isinstance(stem, str) else names
    return cfg | {
        'architecture': 'timm_fisher',
        'num_classes': num_classes,
        'first_conv': stem,
        'classifier': 'classifier',
    }


def set_size(
    cfg: dict[str, Any], input_size: tuple[int, ...], pool_size: tuple[int, int] | None
) -> None:
    """Another size of input and of its grid in an image configuration; what it says of testing goes
    with the old one."""
    if tuple(cfg['input_size']) != input_size:
        for key in ('test_input_size', 'test_crop_pct'):
            cfg.pop(key, None)
    cfg |= {'input_size': input_size, 'pool_size': pool_size}


def describe_weights(backbone: Any, cache_dir: str | Path | None = None) -> dict[str, str | None]:
    """Where the weights of a freshly loaded backbone come from, and what they are.

    Returns:
        `hf_hub_id`, the Hub's repository of these weights, None where they come from elsewhere;
        and `sha256`, their digest, None where they are not, tensor by tensor, those of a
        safetensors file: where timm has converted them, or fitted them to other images.
    """
    cfg = backbone.pretrained_cfg
    folder = cfg.get('file')
    repo_id = None if folder or cfg.get('state_dict') else cfg.get('hf_hub_id')
    path: Any = None
    if folder:
        path = folder if Path(folder).suffix == '.safetensors' else Path(folder, WEIGHTS)
    elif repo_id:
        name, _, revision = repo_id.partition('@')
        path = try_to_load_from_cache(name, WEIGHTS, cache_dir, revision or None)
    state, same = backbone.state_dict(), False
    if isinstance(path, str | Path) and Path(path).is_file():
        with safe_open(path, framework='pt') as file:
            names = set(file.keys())
            same = all(
                name in names and torch.equal(file.get_tensor(name).to(value.dtype), value.cpu())
                for name, value in state.items()
                if not is_counter(name)
            )
    return {'hf_hub_id': repo_id, 'sha256': digest(state) if same else None}


def is_counter(name: str) -> bool:
    """Whether a tensor is a counter of batches, which no result depends on."""
    return name.endswith('num_batches_tracked')


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values of tensors, counters of batches left out."""
    sha256 = hashlib.sha256()
    for name in sorted(weights):
        if is_counter(name):
            continue
        value = weights[name].detach().cpu().contiguous()
        sha256.update(f'{name} {value.dtype} {tuple(value.shape)}\n'.encode())
        sha256.update(value.view(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()
