"""`create_model`, and the architecture `timm_fisher` that timm knows."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import timm
from timm.models import register_model

from timm_fisher.hub.load import LOADING, load
from timm_fisher.model import PooledModel
from timm_fisher.registry import check_arguments, nearest
from timm_fisher.specification import argument_names


def create_model(
    backbone: str,
    head: str | Sequence[dict[str, Any]] = 'avg',
    *,
    pretrained: bool = False,
    **arguments: Any,
) -> PooledModel:
    """`timm.create_model('timm_fisher', ...)` with the head's arguments beside the model's.

    ```python
    create_model('resnet50', head='avg + sparse_fisher@-2', code_dim=100, num_classes=67)
    ```

    Args:
        backbone, head, pretrained: as `PooledModel` takes them.
        **arguments: others of `PooledModel`, and of its `head_kwargs`.

    Raises:
        ValueError: an unknown backbone, head, stage or class-token mode.
        TypeError: an argument that neither model nor head has; the nearest ones are named.
    """
    of_model = set(inspect.signature(PooledModel).parameters)
    of_head = argument_names(head)
    for key in arguments:
        if key not in of_model | of_head:
            raise TypeError(
                f"Neither the model nor the head '{head}' has an argument '{key}'."
                f'{nearest(key, of_model | of_head)}'
            )
    for key in of_model & of_head & set(arguments):
        raise TypeError(
            f"Both the model and the head '{head}' have an argument '{key}'. Create the model by "
            f"timm.create_model('timm_fisher', ..., head_kwargs=dict({key}=...))."
        )
    for_head = {key: arguments.pop(key) for key in of_head - of_model if key in arguments}
    arguments['head_kwargs'] = (arguments.get('head_kwargs') or {}) | for_head
    model = timm.create_model(
        'timm_fisher', pretrained=pretrained, backbone=backbone, head=head, **arguments
    )
    return cast(PooledModel, model)


@register_model
def timm_fisher(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    pretrained_model_args: dict[str, Any] | None = None,
    **arguments: Any,
) -> PooledModel:
    """timm's entry point for a `PooledModel`; the arguments are those of the class.

    `pretrained=True` on the plain name loads the backbone's weights; on `hf-hub:` or `local-dir:`
    it loads everything that was saved, and takes the arguments of `timm_fisher.from_pretrained`,
    whose errors are those here.
    """
    if isinstance(pretrained_cfg, dict) and pretrained_cfg.get('source') in ('hf-hub', 'local-dir'):
        # timm has merged what config.json says into the caller's arguments.
        saved = pretrained_model_args or {}
        given = {key: arguments[key] for key in arguments if arguments[key] is not saved.get(key)}
        source = pretrained_cfg['source']
        return load(
            source,
            pretrained_cfg['hf_hub_id' if source == 'hf-hub' else 'file'],
            pretrained=pretrained,
            pretrained_cfg_overlay=pretrained_cfg_overlay,
            cache_dir=cache_dir,
            **given,
        )
    check_arguments('timm_fisher', PooledModel, arguments, given=LOADING)
    return PooledModel(
        **arguments,
        pretrained=pretrained,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        cache_dir=cache_dir,
    )
