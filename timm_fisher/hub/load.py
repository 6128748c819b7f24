"""Loading a saved model: check what config.json says, look at the header of the weights, build once
on the meta device, compare, then read the weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import adapt_input_conv, resolve_pretrained_cfg
from torch import Tensor, nn

from timm_fisher.backbone import can_resize, digest
from timm_fisher.device import with_device_and_dtype
from timm_fisher.errors import LoadError
from timm_fisher.hub.config import TRUST, SavedConfig, read_config
from timm_fisher.hub.state import check_rebuildable, rebuild_derived_buffers
from timm_fisher.hub.weights import Header, check_tensors, is_finite, read_header, read_tensors
from timm_fisher.lora import LoRA, is_factor
from timm_fisher.model import PooledModel
from timm_fisher.registry import check_arguments, nearest

# Arguments of the factory that no model has.
LOADING = ('pretrained', 'pretrained_cfg_overlay', 'cache_dir')
MOST_DERIVED = 2**28  # bytes of tables beside four times the stored weights
UNPROVEN = 2**27  # values beside those of timm's architecture, where no weights are loaded
HUB_USER = 'timm-fisher'
RELEASED = (
    'mnist-dbm-idfk',
    'trashnet-3g',
    'trashnet-dbm-idfk',
    'trashnet-fisher',
    'trashnet-gmm-fisher',
    'trashnet-gsnmf',
    'trashnet-isqrt-cov',
)
BACKBONE_VARIABLE = 'TIMM_FISHER_BACKBONE'  # for scripts that hand no arguments to a model
CHECKOUT = Path(__file__).parents[2] / 'hub_cards'


def list_pretrained() -> list[str]:
    """Short names of the released models, for `from_pretrained`."""
    return list(RELEASED)


def from_pretrained(
    name: str | Path, *, revision: str | None = None, pretrained: bool = True, **arguments: Any
) -> PooledModel:
    """Load a saved model, everything that was saved.

    ```python
    from_pretrained('trashnet-fisher', num_classes=3)
    ```

    Args:
        name: short name of a released model, which comes from the folder hub_cards where the
            package runs from its checkout, else from the Hub; a folder, or 'local-dir:FOLDER'; or
            USER/NAME on the Hub, or 'hf-hub:USER/NAME'.
        revision: branch, tag or commit on the Hub.
        pretrained: load the weights; otherwise the architecture alone, with fresh values.
        **arguments: those of `load`, such as `num_classes`, `backbone`, `device` or `dtype`.

    Raises:
        ValueError: a name that is none of these.
        TypeError: an unknown argument.
        LoadError: what was saved is damaged, not of this model, or refused; or the Hub cannot be
            reached.
    """
    source, place = find(str(name), revision)
    try:
        return load(source, place, pretrained=pretrained, **arguments)
    except LoadError as error:
        if place == str(name) and str(error).startswith('Downloading config.json'):
            raise LoadError(f"{error} There is no folder '{name}' here.") from None
        raise


def find(name: str, revision: str | None) -> tuple[str, str]:
    """Source and place of a saved model."""
    at = f'@{revision}' if revision else ''
    if name.startswith('hf-hub:'):
        return 'hf-hub', name.removeprefix('hf-hub:') + at
    if name.startswith('local-dir:'):
        place = name.removeprefix('local-dir:')
        folder = Path(place)
        if not place or not folder.is_dir():
            raise ValueError(f"There is no folder '{place}'.")
        if revision is not None:
            raise ValueError(f"{revision=} is for the Hub, but '{folder}' is a folder.")
        return 'local-dir', str(folder)
    is_released = name in RELEASED
    folder = CHECKOUT / name if is_released else Path(name)
    if name and folder.is_dir():
        if revision is None:
            return 'local-dir', str(folder)
        if not is_released:
            raise ValueError(f"{revision=} is for the Hub, but '{name}' is a folder.")
    if folder.is_file():
        raise ValueError(f"'{name}' is a file. Give the folder that holds it.")
    repo_id = f'{HUB_USER}/{name}' if is_released else name
    if repo_id.count('/') != 1 or repo_id.startswith(('.', '/')):
        raise ValueError(
            f"'{name}' is no released model, no folder, and no USER/NAME on the Hub."
            f'{nearest(name, RELEASED)} timm_fisher.list_pretrained() lists the released models.'
        )
    return 'hf-hub', repo_id + at


@with_device_and_dtype
def load(
    source: str,
    place: str,
    *,
    pretrained: bool = True,
    backbone: str | None = None,
    any_backbone: bool = False,
    merge_lora: bool = True,
    trust_config: bool = False,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **arguments: Any,
) -> PooledModel:
    """A saved model.

    Args:
        source, place, cache_dir: as `timm_fisher.hub.weights.find_file` takes them.
        pretrained: load the weights; otherwise all values are fresh.
        backbone: where an adapter's backbone comes from instead of the Hub: a name that
            `timm.create_model` takes, such as 'local-dir:FOLDER'. None for what the environment
            variable TIMM_FISHER_BACKBONE says, if it is set.
        any_backbone: take other weights of the backbone than an adapter was trained with.
        merge_lora: add the changes that LoRA has trained to the backbone's weights; False keeps the
            factors, to train them on or to save them again, which needs peft.
        trust_config: lift the limits on the backbone's arguments, on the size of images, and on
            memory that the weights do not fill.
        pretrained_cfg_overlay: replaces what was saved about images.
        **arguments: of `PooledModel`, in place of those that were saved; `head_kwargs` are merged
            as long as the head stays the same.

    Errors as those of `from_pretrained`.
    """
    arguments = {key: value for key, value in arguments.items() if value is not None}
    check_arguments('A saved model', PooledModel, arguments, given=('backbone', 'lora', *LOADING))
    saved = read_config(source, place, cache_dir, trust_config=trust_config)
    lora = (
        LoRA.of(saved.arguments.pop('lora')) if merge_lora and 'lora' in saved.arguments else None
    )
    head = saved.arguments['head']
    if 'head_kwargs' in arguments and arguments.get('head', head) == head:
        arguments['head_kwargs'] = saved.arguments.get('head_kwargs', {}) | arguments['head_kwargs']
    header = read_header(source, place, cache_dir) if pretrained else None
    model = _build(saved, arguments, place)
    if not trust_config:
        _check_size(model, saved, header, place)
    if header is not None:
        with torch.inference_mode(False):  # whose tensors could not be trained later
            _fill(model, saved, header, lora, backbone, any_backbone, cache_dir)
        model.backbone_weights = None if any_backbone else saved.backbone_weights
    elif torch.get_default_device().type != 'meta':
        model = PooledModel(**{**saved.arguments, **arguments})
    images, num_classes = saved.images, arguments.get('num_classes')
    if num_classes not in (None, model.num_classes):
        model.reset_classifier(num_classes)
    if num_classes not in (None, images['num_classes']):  # whose names are those of other classes
        images = {key: value for key, value in images.items() if not key.startswith('label_')}
    origin = {'source': source, 'hf_hub_id' if source == 'hf-hub' else 'file': place}
    cfg = resolve_pretrained_cfg(
        'timm_fisher', {**images, **origin, **(pretrained_cfg_overlay or {})}
    ).to_dict()
    own = {key: model.pretrained_cfg[key] for key in ('classifier', 'first_conv', 'pool_size')}
    model.pretrained_cfg = {**cfg, **own}
    size = arguments.get('img_size')
    if size not in (None, saved.arguments.get('img_size')):
        model.set_input_size(size)
    return model


def _build(saved: SavedConfig, arguments: Mapping[str, Any], where: str) -> PooledModel:
    """The model on the meta device, with the arguments that are asked for, but with the saved
    classes and, if the backbone can be resized later, the saved size of images."""
    later = ('num_classes', 'img_size')
    wanted = saved.arguments | {k: v for k, v in arguments.items() if k not in later}
    size = arguments.get('img_size')
    try:
        with torch.device('meta'):
            model = PooledModel(**wanted)
            if size is not None and not can_resize(model.backbone):
                model = PooledModel(**{**wanted, 'img_size': size})
    except Exception as error:  # whatever timm or a head raises
        raise LoadError(
            f"No model can be built from the config.json of '{where}': "
            f'{type(error).__name__}: {error}'
        ) from error
    check_rebuildable(model)
    return model


def is_adapter(saved: SavedConfig, header: Header) -> bool:
    """Whether a file holds no weights of the backbone."""
    own = any(_is_of_backbone(name) for name in header.tensors)
    return saved.backbone_weights is not None and not own


def _is_of_backbone(name: str) -> bool:
    return name.startswith('backbone.') and not is_factor(name)


def _find_backbone(
    saved: SavedConfig, backbone: str | None, cache_dir: str | Path | None, where: str
) -> Header:
    """The header of the weights of an adapter's backbone."""
    repo_id = (saved.backbone_weights or {})['hf_hub_id']
    backbone = backbone or os.environ.get(BACKBONE_VARIABLE)
    if backbone is None and repo_id is None:
        raise LoadError(
            f"'{where}' is an adapter, head and classifier alone, and does not say which backbone "
            "is needed. Give it as backbone='local-dir:FOLDER'."
        )
    try:
        source, place = timm.models.parse_model_name(backbone or f'hf-hub:{repo_id}')
        if source is None:
            cfg = timm.get_pretrained_cfg(place) if timm.is_model(place) else None
            if not cfg or not cfg.hf_hub_id:
                raise ValueError(f"timm knows no weights of '{backbone}' on the Hub.")
            source, place = 'hf-hub', cfg.hf_hub_id
        return read_header(source, place, cache_dir, 'backbone.')
    except (RuntimeError, ValueError) as error:
        raise LoadError(
            f"The backbone '{backbone or repo_id}' cannot be loaded: {error} '{where}' is an "
            f"adapter: head and classifier alone, for the backbone '{repo_id}'. With its weights "
            "in a folder, give backbone='local-dir:FOLDER'."
        ) from None


def _fill(
    model: PooledModel,
    saved: SavedConfig,
    header: Header,
    lora: LoRA | None,
    backbone: str | None,
    any_backbone: bool,
    cache_dir: str | Path | None,
) -> None:
    """Give a model on the meta device its tensors, once all headers are exactly of it, and merge
    the factors of `lora`; where the default device is the meta device, the header of the saved
    model's own file is checked alone."""
    stored, elsewhere = model, dict[str, Tensor]()
    tensors = dict[str, Tensor]()
    if saved.arguments.get('in_chans', saved.images['input_size'][0]) != model.in_chans:
        stored = _build(saved, {}, header.where)  # with the stem as it was saved
    expected = stored.state_dict()
    if lora is not None:
        expected |= _factors(lora, stored, header.where)
    if is_adapter(saved, header):
        expected, elsewhere = _split(expected)
    elif backbone is not None:
        raise LoadError(
            f"'{header.where}' holds its backbone; backbone='{backbone}' is for a model that holds "
            'head and classifier alone.'
        )
    size = timm.models.get_model_input_config(model.backbone)['input_size']
    what = f'{type(model.backbone).__name__} with {type(model.head).__name__} for images {size}'
    check_tensors(header, expected, what)
    if torch.get_default_device().type == 'meta':
        return
    if elsewhere:
        of_backbone = _find_backbone(saved, backbone, cache_dir, header.where)
        check_tensors(of_backbone, elsewhere, what)
        tensors = read_tensors(of_backbone, elsewhere)
        if not any_backbone:
            _check_digest(tensors, saved, header.where, of_backbone.where)
    tensors |= read_tensors(header, expected)
    if lora is not None:
        tensors = lora.merge(tensors)
        for name, value in tensors.items():
            if not is_finite(value):
                raise LoadError(
                    f"The weights of '{header.where}' are refused: the factors of LoRA make "
                    f'{name} infinite. Nothing was loaded.'
                )
    for name, wanted in model.state_dict().items():
        if tensors[name].shape != wanted.shape:
            tensors[name] = _adapt_stem(tensors[name], model.in_chans, wanted.shape, header.where)
    model.load_state_dict(tensors, strict=True, assign=True)
    rebuild_derived_buffers(model)
    model.to(torch.get_default_device())


def _factors(lora: LoRA, model: PooledModel, where: str) -> dict[str, Tensor]:
    """The factors that a saved model holds beside the tensors of `model`."""
    try:
        made = lora.factors(model.backbone)
    except ValueError as error:
        raise LoadError(
            f"The config.json of '{where}' asks for another backbone: {error}"
        ) from None
    return {f'backbone.{name}': value for name, value in made.items()}


def _split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What an adapter holds, and what comes from elsewhere: its backbone."""
    of_backbone = {key: value for key, value in tensors.items() if _is_of_backbone(key)}
    return {key: tensors[key] for key in tensors if key not in of_backbone}, of_backbone


def _check_digest(
    weights: Mapping[str, Tensor], saved: SavedConfig, where: str, place: str
) -> None:
    """Refuse other weights of the backbone than an adapter was trained with."""
    expected = saved.backbone_weights or {}
    sha256 = digest({key.removeprefix('backbone.'): value for key, value in weights.items()})
    if sha256 != expected['sha256']:
        raise LoadError(
            f"The weights of '{place}' (digest {sha256[:12]}) are not those that '{where}' was "
            f"trained with ('{expected['hf_hub_id']}', digest {str(expected['sha256'])[:12]}). "
            "Give backbone='local-dir:FOLDER' with the right ones, or any_backbone=True to take "
            'these, with other results than on the card.'
        )


def _adapt_stem(weight: Tensor, channels: int, shape: torch.Size, where: str) -> Tensor:
    """Weights of a stem for another number of image channels, as timm adapts them."""
    try:
        adapted: Tensor = adapt_input_conv(channels, weight)
    except (AssertionError, NotImplementedError, RuntimeError):
        adapted = weight
    if adapted.shape != shape:
        raise LoadError(
            f"The first layer of '{where}', {tuple(weight.shape)}, cannot be adapted to images of "
            f'{channels} channels.'
        )
    return adapted


def _check_size(model: nn.Module, saved: SavedConfig, header: Header | None, where: str) -> None:
    """Refuse what would fill memory that no stored tensor accounts for: buffers that are computed
    from the arguments; and, without weights, tensors that are larger by what config.json says."""
    tensors = model.state_dict()
    stored = header.path.stat().st_size if header else 0
    size = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in tensors)
    if size > MOST_DERIVED + 4 * stored:
        raise LoadError(
            f"The config.json of '{where}' is refused: tables computed from its arguments would "
            f'take {size} bytes, for {stored} bytes of weights. {TRUST}.'
        )
    if header is not None:
        return
    with torch.device('meta'):
        plain = timm.create_model(saved.arguments['backbone'], num_classes=0).state_dict()
    counts = [sum(value.numel() for value in state.values()) for state in (tensors, plain)]
    count = counts[0] - counts[1]
    if count > UNPROVEN:
        raise LoadError(
            f"The config.json of '{where}' is refused: without weights it asks for {count} values "
            f"beside those of timm's architecture; at most {UNPROVEN} are allowed. {TRUST}."
        )
