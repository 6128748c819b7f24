"""`create_model`, and the architecture `timm_fisher` that timm knows."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models import register_model
from timm.models._builder import pretrained_cfg_for_features
from timm.models._features import FeatureGetterNet
from torch import nn

from timm_fisher.backbone import create_features
from timm_fisher.device import with_device_and_dtype
from timm_fisher.errors import ArgumentError
from timm_fisher.hub.load import LOADING, load
from timm_fisher.model import PooledModel
from timm_fisher.registry import check_arguments, nearest
from timm_fisher.specification import argument_names

OF_MODEL = frozenset(inspect.signature(PooledModel).parameters)
OF_MAPS = ('out_indices', 'feature_cls')  # timm's arguments beside features_only


def create_model(
    backbone: str,
    head: str | Sequence[dict[str, Any]] = 'avg',
    *,
    pretrained: bool = False,
    **arguments: Any,
) -> PooledModel:
    """`timm.create_model('timm_fisher', ...)`, shorter and with its types.

    ```python
    create_model('resnet50', head='avg + sparse_fisher@-2', code_dim=100, num_classes=67)
    ```

    Args:
        backbone, head, pretrained: as `PooledModel` takes them.
        **arguments: others of `PooledModel`, of the head and of the backbone.

    Raises:
        ValueError: an unknown backbone, head, stage or class-token mode.
        TypeError: an argument that neither model, head nor backbone has; the nearest ones are
            named.
    """
    # Here already, for timm drops arguments that are None.
    head_kwargs, others = _of_head(head, arguments)
    model = timm.create_model(
        'timm_fisher',
        pretrained=pretrained,
        backbone=backbone,
        head=head,
        head_kwargs=head_kwargs,
        **others,
    )
    return cast(PooledModel, model)


@register_model
@with_device_and_dtype
def timm_fisher(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    pretrained_model_args: dict[str, Any] | None = None,
    backbone_weights: dict[str, str | None] | None = None,
    **arguments: Any,
) -> nn.Module:
    """timm's entry point for a `PooledModel`; the arguments are those of the class, of its head,
    such as `code_dim`, which are `head_kwargs` then, and of its backbone, such as `output_stride`,
    which are `backbone_kwargs`. Where the class and the head share a name it is the class's. timm
    drops arguments that are None, unless they stand in `head_kwargs`.

    `pretrained=True` on the plain name loads the backbone's weights; on `hf-hub:` or `local-dir:`
    it loads everything that was saved, and takes the arguments of `timm_fisher.from_pretrained`,
    whose errors are those here. `device` and `dtype` are those of all parameters.

    `features_only=True` gives the backbone's maps of several stages instead, as timm does, from
    which stages `out_indices` says. Of what was saved they are those of the trained backbone.

    `backbone_weights` stands in a config.json; transformers, which loads the weights by itself,
    gives it to the factory, where nothing depends on it.
    """
    if 'global_pool' in arguments:
        raise ArgumentError(
            f'global_pool={arguments["global_pool"]!r} cannot be set: this model pools by its '
            'head, which is set by head=.'
        )
    if isinstance(pretrained_cfg, dict) and pretrained_cfg.get('source') in ('hf-hub', 'local-dir'):
        # timm has merged what config.json says into the caller's arguments.
        saved = pretrained_model_args or {}
        given = {key: arguments[key] for key in arguments if arguments[key] is not saved.get(key)}
        features_only = given.pop('features_only', False)
        maps = {key: given.pop(key) for key in OF_MAPS if features_only and key in given}
        source = pretrained_cfg['source']
        model = load(
            source,
            pretrained_cfg['hf_hub_id' if source == 'hf-hub' else 'file'],
            pretrained=pretrained,
            pretrained_cfg_overlay=pretrained_cfg_overlay,
            cache_dir=cache_dir,
            **given,
        )
        return _features_of(model, **maps) if features_only else model
    if isinstance(pretrained_cfg, str):
        raise ValueError(
            f"There is no tag '{pretrained_cfg}': the models of timm_fisher have none. Weights of "
            "the backbone are chosen by its own name, as in backbone='resnet50.a1_in1k'."
        )
    head_kwargs, arguments = _of_head(arguments.get('head', 'avg'), arguments)
    given = {key: arguments[key] for key in arguments if key in OF_MODEL}
    check_arguments('timm_fisher', PooledModel, given, given=LOADING)
    given['head_kwargs'] = head_kwargs
    options = given.pop('backbone_kwargs', None) or {}
    options = {**options, **{key: arguments[key] for key in arguments if key not in OF_MODEL}}
    given |= {
        'pretrained': pretrained,
        'pretrained_cfg_overlay': pretrained_cfg_overlay,
        'cache_dir': cache_dir,
    }
    try:
        if options.pop('features_only', False):
            return create_features(options, **given)
        return PooledModel(**given, backbone_kwargs=options)
    except TypeError as error:
        raise _explain_argument(error, options, **given) from error


def _of_head(
    head: str | Sequence[dict[str, Any]], arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`head_kwargs`, with those arguments that the head alone has, and the other arguments."""
    of_head = argument_names(head) - OF_MODEL
    others = {key: value for key, value in arguments.items() if key not in of_head}
    for_head = {key: value for key, value in arguments.items() if key in of_head}
    return {**(others.pop('head_kwargs', None) or {}), **for_head}, others


def _features_of(
    model: PooledModel,
    *,
    out_indices: int | tuple[int, ...] | None = None,
    feature_cls: str = 'getter',
) -> nn.Module:
    """The maps of a loaded model's backbone, by default of its last five stages at most."""
    if feature_cls != 'getter':
        raise ValueError(
            f"{feature_cls=} is not supported for a saved model. Use feature_cls='getter'."
        )
    features: Any = FeatureGetterNet(
        model,
        out_indices or min(5, len(model.feature_info)),
        prune=hasattr(model.backbone, 'prune_intermediate_layers'),
    )
    features.pretrained_cfg = features.default_cfg = pretrained_cfg_for_features(
        model.pretrained_cfg
    )
    return cast(nn.Module, features)


def _explain_argument(
    error: TypeError,
    options: Collection[str],
    *,
    backbone: str,
    head: str | Sequence[dict[str, Any]] = 'avg',
    **_: Any,
) -> TypeError:
    """What timm says of an argument that a backbone does not have, with the nearest known ones; any
    other error as it is."""
    match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if match is None or match[1] not in options:
        return error
    with torch.device('meta'):
        kinds: list[Any] = [PooledModel, type(timm.create_model(backbone))]
    known = {key for kind in kinds for key in inspect.signature(kind).parameters}
    known |= argument_names(head)
    return ArgumentError(
        f"Neither the model, its head {head!r:.100} nor its backbone '{backbone}' has an argument "
        f"'{match[1]}'.{nearest(match[1], known)}"
    )
