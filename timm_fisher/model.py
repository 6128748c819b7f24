"""`PooledModel`: a timm backbone whose global pool is a pooling head, and how to create one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors.torch import load_file
from timm.data.loader import adapt_to_chs
from timm.layers.helpers import to_2tuple
from timm.models import (
    get_model_input_config,
    group_parameters,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
)
from torch import Tensor, nn

from timm_fisher.compose import ConcatHeads
from timm_fisher.descriptors import StageDescriptors, find_descriptors, remove_unused
from timm_fisher.errors import LoadError
from timm_fisher.head import PoolingHead
from timm_fisher.hub import config as saved_config
from timm_fisher.hub import weights as checkpoint
from timm_fisher.registry import check_arguments, create_head, get_head, nearest

# What a pretrained_cfg says about images; the rest of it is about the backbone's own weights.
_DATA_KEYS = (
    'input_size', 'test_input_size', 'min_input_size', 'fixed_input_size', 'interpolation',
    'crop_pct', 'test_crop_pct', 'crop_mode', 'mean', 'std', 'license',
)  # fmt: skip
# Arguments that no saved model has.
_OF_THE_CALLER = ('pretrained', 'pretrained_cfg_overlay', 'cache_dir')
_FOR_LOADING = ('backbone_weights', 'any_backbone')


class PooledModel(nn.Module):
    """A timm backbone -> local descriptors -> pooling head -> linear classifier.

    Speaks timm's language, so that timm's own scripts take it. Parts of the backbone that the
    descriptors do not depend on (an old pre-classifier, the stages behind an earlier `stage`) are
    taken out. A backbone (`freeze_backbone`) or head that is frozen as a whole stays in eval mode
    under `model.train()`.

    Args:
        backbone: any name that `timm.create_model` takes, `hf-hub:` and `local-dir:` included.
        head: name of an installed head; see `timm_fisher.list_heads()`. Or several heads, each a
            dict of its `name`, its `stage` (by default the model's) and its arguments: their
            outputs are L2-normalised and concatenated.
        head_kwargs: arguments of a single head.
        backbone_kwargs: further arguments of the backbone, as `timm.create_model` takes them.
        num_classes: outputs of the classifier; 0 gives embeddings.
        in_chans: channels of the image; None for the backbone's own.
        img_size: input size, side or (height, width); None for the backbone's own.
        drop_rate: dropout between head and classifier.
        drop_path_rate: stochastic depth of the backbone.
        stage: -1 pools the backbone's output; -2, -3, ... an earlier stage of its `feature_info`.
        class_token: of a backbone that has one: 'drop' it, 'keep' the prefix tokens among the
            descriptors, or 'append' the class token to the pooled vector.
        last_stride: 1 keeps stride 1 in the last stage of a ResNet, without dilation, as the
            authors of covariance pooling do: four times the descriptors. With dilation it is
            `backbone_kwargs=dict(output_stride=16)`.
        pretrained: load the backbone's pretrained weights.
        pretrained_cfg_overlay: of the backbone, `dict(file=...)` for weights of your own.
        cache_dir: of downloaded weights.

    Raises:
        ValueError: an unknown backbone, head, stage or class-token mode.
        TypeError: an unknown argument of the head.
    """

    backbone: Any  # a timm model
    descriptors: StageDescriptors
    head: PoolingHead | ConcatHeads

    def __init__(
        self,
        backbone: str,
        head: str | Sequence[dict[str, Any]] = 'avg',
        *,
        head_kwargs: dict[str, Any] | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        num_classes: int = 1000,
        in_chans: int | None = None,
        img_size: int | tuple[int, int] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float | None = None,
        stage: int = -1,
        class_token: str = 'drop',
        last_stride: int | None = None,
        pretrained: bool = False,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        check_backbone(backbone)
        heads = _parse_heads(head, head_kwargs, stage)
        arguments: dict[str, Any] = dict(
            backbone_kwargs or {},
            num_classes=0,
            cache_dir=cache_dir,
            pretrained_cfg_overlay=pretrained_cfg_overlay,
        )
        requested = {'in_chans': in_chans, 'drop_path_rate': drop_path_rate}
        arguments |= {key: value for key, value in requested.items() if value is not None}

        with torch.inference_mode(False), torch.device('meta'):
            twin = timm.create_model(backbone, **arguments).eval()
            if isinstance(twin, PooledModel):
                raise ValueError(
                    f"'{backbone}' is a whole timm_fisher model, not a backbone. Load it by "
                    f"timm.create_model('{backbone}', pretrained=True)."
                )
            shape = get_model_input_config(twin)
            if img_size is not None and shape['fixed_input_size']:
                arguments['img_size'] = img_size
                twin = timm.create_model(backbone, **arguments).eval()
            input_size = shape['input_size'][:1] + to_2tuple(img_size or shape['input_size'][1:])
            image = torch.empty(1, *input_size)
            if last_stride is not None:
                _keep_last_stride(twin, last_stride)
            stages = [each_stage for _, each_stage, _ in heads]
            found, idle, dead = find_descriptors(
                twin, image, stages=stages, class_token=class_token
            )

        self.backbone = timm.create_model(backbone, pretrained=pretrained, **arguments)
        if last_stride is not None:
            _keep_last_stride(self.backbone, last_stride)
        remove_unused(self.backbone, idle, dead)
        own_channels = self.backbone.pretrained_cfg['input_size'][0]
        adapted = 'img_size' in arguments or input_size[0] != own_channels
        self.backbone_weights: dict[str, Any] | None = None
        if pretrained:
            self.backbone_weights = checkpoint.describe_backbone(
                self.backbone, adapted=adapted, cache_dir=cache_dir
            )
        self._always_frozen = [
            name for name, p in self.backbone.named_parameters() if not p.requires_grad
        ]
        places = [sorted(set(stages)).index(each_stage) for each_stage in stages]
        channels = [each.num_features for each in found]
        made = [
            create_head(name, channels[place], **options)
            for (name, _, options), place in zip(heads, places, strict=True)
        ]
        self.descriptors = found
        self.head = made[0] if isinstance(head, str) else ConcatHeads(made, places)
        self.head_drop = nn.Dropout(drop_rate)

        self.in_chans = input_size[0]
        self.num_features: int = channels[-1]
        self.head_hidden_size = self.head.out_features
        if class_token == 'append':
            self.head_hidden_size += self.num_features
        self.num_classes = num_classes
        self.classifier = _create_classifier(self.head_hidden_size, num_classes)
        self.pretrained_cfg = _wrap_cfg(self.backbone, input_size, num_classes)
        # What timm needs to build this model again; its factory records the rest.
        recorded: dict[str, Any] = {
            'backbone': backbone,
            'head': head,
            'head_kwargs': head_kwargs,
            'img_size': img_size,
            'stage': stage,
            'class_token': class_token,
            'last_stride': last_stride,
        }
        self._recorded_args = {key: value for key, value in recorded.items() if value is not None}

    @property
    def heads(self) -> list[tuple[PoolingHead, int]]:
        """Each head, and which of the model's descriptors it pools."""
        head = self.head
        return list(head.placed()) if isinstance(head, ConcatHeads) else [(head, 0)]

    @property
    def default_cfg(self) -> dict[str, Any]:
        """Alias of `pretrained_cfg`, as timm has it."""
        return self.pretrained_cfg

    def forward_features(self, x: Tensor) -> Tensor | list[Tensor]:
        """The backbone's plain tensor, as timm gives it, for images `[B, 3, H, W]`; for several
        stages a list of them, from early to late."""
        features = self.descriptors.features(self.backbone, x)
        return features if isinstance(self.head, ConcatHeads) else features[0]

    def forward_head(
        self, x: Tensor | list[Tensor], pre_logits: bool = False, head_loss: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Pool and classify.

        Args:
            x: what `forward_features` gives.
            pre_logits: stop before the classifier, at `[B, head_hidden_size]`.
            head_loss: give the head's own loss, a scalar, as a second result.

        Returns:
            Logits `[B, num_classes]`.
        """
        features = [x] if isinstance(x, Tensor) else x
        descriptors = self.descriptors(features)
        appended = self.descriptors.appended(features)
        asked: Any = descriptors if isinstance(self.head, ConcatHeads) else descriptors[0]
        if head_loss:
            pooled, loss = self.head.forward_with_loss(asked)
        else:
            pooled = self.head(asked)
        if appended is not None:
            pooled = torch.cat([pooled, appended], 1)
        pooled = self.head_drop(pooled)
        out = pooled if pre_logits else self.classifier(pooled)
        return (out, loss) if head_loss else out

    def forward(self, x: Tensor, head_loss: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits `[B, num_classes]` of images `[B, 3, H, W]`.

        With `head_loss`, the head's own loss is the second result. It comes through here so that
        `DistributedDataParallel` sees it.
        """
        return self.forward_head(self.forward_features(x), head_loss=head_loss)

    def get_classifier(self) -> nn.Module:
        """The last layer: `nn.Linear`, or `nn.Identity` without classes."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for another number of classes; device, dtype and mode stay.

        Raises:
            ValueError: `global_pool` is given; the pool of this model is its head.
        """
        if global_pool is not None:
            raise ValueError(
                f'{global_pool=} cannot be set: this model pools by its head. Create another model.'
            )
        like = next(iter([*self.classifier.parameters(), *self.parameters()]))
        self.num_classes = num_classes
        self.classifier = _create_classifier(self.head_hidden_size, num_classes)
        self.classifier.to(device=like.device, dtype=like.dtype).train(self.training)

    def train(self, mode: bool = True) -> PooledModel:
        """As `nn.Module.train`, but a backbone or head that is frozen as a whole stays in eval
        mode: its batch-norm statistics would move otherwise."""
        super().train(mode)
        for part in (self.backbone, self.head):
            trained = [parameter.requires_grad for parameter in part.parameters()]
            if trained and not any(trained):
                part.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> PooledModel:
        """As `nn.Module.requires_grad_`, but what timm froze in the backbone, or what the
        descriptors do not depend on, stays frozen."""
        super().requires_grad_(requires_grad)
        for name in self._always_frozen:
            self.backbone.get_parameter(name).requires_grad_(False)
        return self

    def freeze_backbone(self, frozen: bool = True) -> PooledModel:
        """Freeze the backbone, which then stays in eval mode, or train it again."""
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(not frozen and name not in self._always_frozen)
        return self.train(self.training)

    def project_(self) -> None:
        """Bring the head back to its feasible set; call it after each optimizer step."""
        self.head.project_()

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Take images of another size; a backbone that fixes one resamples its position embedding.

        Args:
            img_size: side or (height, width) of the image.

        Raises:
            ValueError: the backbone can neither take another size nor resample.
        """
        built = get_model_input_config(self.backbone)
        if built['fixed_input_size'] and to_2tuple(img_size) != built['input_size'][1:]:
            if not _can_resize(self.backbone):
                raise ValueError(
                    f'{type(self.backbone).__name__} was built for images {built["input_size"]} '
                    f'and cannot change to {img_size=}. Create it for that size.'
                )
            self.backbone.set_input_size(img_size)
        _set_input_size(self.pretrained_cfg, (self.in_chans, *to_2tuple(img_size)))
        self._recorded_args['img_size'] = img_size

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade the backbone's activations for a second forward pass."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that backbone or head want without weight decay."""
        names: set[str] = getattr(self.backbone, 'no_weight_decay', set)()
        of_head = {f'head.{name}' for name in self.head.no_weight_decay()}
        return {f'backbone.{name}' for name in names} | of_head

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """Layer numbers of parameter names, for layer-wise learning rates: the backbone's own
        layers first, then head and classifier together."""
        matcher = self.backbone.group_matcher(coarse=coarse)
        layers = {
            f'backbone.{name}': layer
            for name, layer in group_parameters(self.backbone, matcher, reverse=True).items()
        }
        return lambda name: layers.get(name, float('inf'))

    @property
    def _model_args(self) -> dict[str, Any]:
        """What timm's factory needs to build this model again.

        The backbone's part comes from the backbone, where timm keeps account of what a resize
        changed. A backbone that came from a folder or a repository is recorded as the architecture
        that it turned out to be: the saved model must not need that place again.
        """
        arguments, built = dict(self._recorded_args), dict(self.backbone._model_args)
        if ':' in arguments['backbone']:
            arguments['backbone'] = self.backbone.pretrained_cfg['architecture']
        size = built.pop('img_size', None)
        if size is not None:
            arguments['img_size'] = size
        for key in ('num_classes', 'in_chans', 'drop_path_rate'):
            built.pop(key, None)
        arguments['backbone_kwargs'] = built
        if self.backbone_weights is not None:
            arguments['backbone_weights'] = self.backbone_weights
        return arguments

    @_model_args.setter
    def _model_args(self, arguments: dict[str, Any]) -> None:
        # timm's factory adds what it was called with. What the model was built with stands: a
        # preset merges the caller's arguments with its own.
        arguments = {k: v for k, v in arguments.items() if k not in _FOR_LOADING}
        self._recorded_args = {**arguments, **self._recorded_args}


def create_model(
    backbone: str,
    head: str | Sequence[dict[str, Any]] = 'avg',
    *,
    pretrained: bool = False,
    **arguments: Any,
) -> PooledModel:
    """`timm.create_model('timm_fisher', ...)` with the head's arguments beside the model's.

    ```python
    create_model('resnet50', head='sparse_fisher', code_dim=100, num_classes=67)
    ```

    Args:
        backbone: any name that `timm.create_model` takes.
        head: name of an installed head, or several heads as `PooledModel` takes them.
        pretrained: load the backbone's pretrained weights.
        **arguments: those of `PooledModel` and of a single head.

    Raises:
        ValueError: an unknown backbone, head, stage or class-token mode.
        TypeError: an argument that neither model nor head has; the nearest ones are named.
    """
    of_model = set(inspect.signature(PooledModel).parameters)
    of_head = set()
    if isinstance(head, str):
        of_head = set(inspect.signature(get_head(head)).parameters) - {'in_features'}
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
    head_kwargs = (arguments.pop('head_kwargs', None) or {}) | for_head
    if head_kwargs or isinstance(head, str):
        arguments['head_kwargs'] = head_kwargs
    return cast(
        PooledModel,
        timm.create_model(
            'timm_fisher',
            pretrained=pretrained,
            backbone=backbone,
            head=head,
            **arguments,
        ),
    )


@register_model
def timm_fisher(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    pretrained_model_args: dict[str, Any] | None = None,
    any_backbone: bool = False,
    **arguments: Any,
) -> PooledModel:
    """timm's entry point for a `PooledModel`; the arguments are those of the class.

    `pretrained=True` on the plain name loads the backbone's weights; on `hf-hub:` or `local-dir:`
    it loads everything that was saved. What was saved as an adapter, head and classifier alone,
    takes the weights of its backbone from the Hub, or from where `backbone` says, such as
    'local-dir:FOLDER'; `any_backbone` takes them even if they are not those trained with.

    Raises:
        LoadError: what was saved is damaged, not of this model, or refused; or the Hub cannot be
            reached. Nothing is loaded then.
    """
    if isinstance(pretrained_cfg, dict) and pretrained_cfg.get('source') in saved_config.SOURCES:
        return _load(
            arguments,
            pretrained_model_args or {},
            dict(pretrained_cfg, **(pretrained_cfg_overlay or {})),
            pretrained=pretrained,
            any_backbone=any_backbone,
            cache_dir=cache_dir,
        )
    check_arguments('timm_fisher', PooledModel, arguments, given=_OF_THE_CALLER)
    return PooledModel(
        **arguments,
        pretrained=pretrained,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        cache_dir=cache_dir,
    )


def _load(
    arguments: dict[str, Any],
    saved: dict[str, Any],
    cfg: dict[str, Any],
    *,
    pretrained: bool,
    any_backbone: bool,
    cache_dir: str | Path | None,
) -> PooledModel:
    """A saved model, in the order: check its configuration and weights, build, load.

    Args:
        arguments: of the model that is wanted.
        saved: of the model that was saved.
        cfg: its pretrained configuration, which says where the weights are.
        pretrained: load them.
        any_backbone: of an adapter, take other weights of the backbone than it was trained with.
        cache_dir: of downloads.
    """
    where = cfg['hf_hub_id'] if cfg['source'] == 'hf-hub' else cfg['file']
    saveable = set(inspect.signature(PooledModel).parameters) - set(_OF_THE_CALLER)
    saved_config.check_config(saved, saveable | {'backbone_weights'}, where)
    cfg = saved_config.check_images(cfg, saved, where)
    origin = arguments.pop('backbone_weights', None)
    source = arguments['backbone'] if arguments['backbone'] != saved['backbone'] else None
    arguments['backbone'] = saved['backbone']
    check_arguments('timm_fisher', PooledModel, arguments, given=_OF_THE_CALLER)
    path = None
    if pretrained:
        path = checkpoint.find_file(checkpoint.WEIGHTS, cfg['source'], where, cache_dir)
    shapes = checkpoint.read_shapes(path, where) if path else {}
    adapter = checkpoint.is_adapter(shapes) if origin else False
    if source is not None and not adapter:
        raise LoadError(
            f"'{where}' holds its backbone ({saved['backbone']}); backbone='{source}' is for a "
            'model that holds head and classifier alone.'
        )
    # Saved weights are loaded at their own input size; the backbone then resamples positions.
    size, saved_size = arguments.get('img_size'), saved.get('img_size')
    resize = size != saved_size
    # The saved number of classes is bounded, the caller's is his own.
    num_classes, saved_classes = arguments.get('num_classes', 1000), saved.get('num_classes', 1000)

    try:
        cfg = resolve_pretrained_cfg('timm_fisher', cfg).to_dict()  # type: ignore[no-untyped-call]
        check_backbone(saved['backbone'])
        with saved_config.bounded() as plain_size:
            plain = timm.create_model(saved['backbone'], num_classes=0)
        allowed = saved_config.allowed_size(plain_size, shapes)
        timed = saved_config.may_take_long(saved)
        bounded_arguments = {**arguments, 'num_classes': saved_classes}
        with saved_config.bounded(allowed, timed=timed):
            twin = PooledModel(**{**bounded_arguments, 'img_size': saved_size if path else size})
        if path and resize and not _can_resize(twin.backbone):
            saved_size = size  # the weights may not depend on it
            with saved_config.bounded(allowed, timed=timed):
                twin = PooledModel(**bounded_arguments)
        if adapter:
            checkpoint.check_size(twin.backbone, plain, where)
        if num_classes != saved_classes:
            with torch.device('meta'):
                twin.reset_classifier(num_classes)
        if path:
            of_backbone = twin.backbone.state_dict()
            given = {f'backbone.{key}': tuple(value.shape) for key, value in of_backbone.items()}
            checkpoint.check_shapes({**given, **shapes} if adapter else shapes, twin, cfg, where)
        model = PooledModel(**{**arguments, 'img_size': saved_size if path else size})
        cfg |= {key: model.pretrained_cfg[key] for key in ('classifier', 'first_conv')}
        if path:
            weights = load_file(path)
            if adapter:
                weights |= checkpoint.fetch_backbone(
                    list(of_backbone),
                    origin,
                    saved,
                    source=source,
                    fixed_size=get_model_input_config(plain)['fixed_input_size'],
                    any_backbone=any_backbone,
                    cache_dir=cache_dir,
                    where=where,
                )
                found = {name: tuple(value.shape) for name, value in weights.items()}
                checkpoint.check_shapes(found, model, cfg, where)
            checkpoint.load_weights(model, weights, cfg)
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(
            f"No model can be built from the config.json of '{where}': "
            f'{type(error).__name__}: {error}'
        ) from error
    model.pretrained_cfg = cfg
    model.backbone_weights = None if any_backbone or not path else origin
    if resize and size is not None:
        model.set_input_size(size)
    return model


def _parse_heads(
    head: str | Sequence[dict[str, Any]], head_kwargs: dict[str, Any] | None, stage: int
) -> list[tuple[str, int, dict[str, Any]]]:
    """Name, stage and arguments of each head of a model."""
    if isinstance(head, str):
        return [(head, stage, head_kwargs or {})]
    if head_kwargs:
        raise TypeError(
            f'{head_kwargs=} is for a single head. Of several, each takes its arguments in its own '
            "dict: head=[dict(name='avg', normalize=True), ...]."
        )
    heads = []
    for each in [head] if isinstance(head, dict) else head:
        if head is each or not isinstance(each, dict) or not isinstance(each.get('name'), str):
            raise TypeError(
                f'Several heads are given as a list of dicts with a name, such as [dict(name='
                f"'gmm_fisher', stage=-2, components=64), ...]; got {each!r}."
            )
        arguments = dict(each)
        name, its_stage = arguments.pop('name'), arguments.pop('stage', stage)
        if not isinstance(its_stage, int):
            raise TypeError(f"stage={its_stage!r} of the head '{name}' is not a number like -2.")
        heads.append((name, its_stage, arguments))
    if not heads:
        raise ValueError('head is an empty list; give one head or more.')
    return heads


def _keep_last_stride(backbone: Any, last_stride: int) -> None:
    """Stride 1 in the last stage of a ResNet, in place; see `PooledModel`."""
    if last_stride != 1:
        raise ValueError(f'{last_stride=} is not 1, or None for the backbone as it is.')
    last = getattr(backbone, 'layer4', nn.Identity())
    layers = [each for each in last.modules() if not any(each.children())]
    strided = [each for each in layers if getattr(each, 'stride', 1) not in (1, (1, 1))]
    if not strided or not all(isinstance(each, nn.Conv2d) for each in strided):
        raise ValueError(
            f'{last_stride=} needs a last stage that only convolutions make smaller, as that of '
            f'resnet50; {type(backbone).__name__} has none here.'
        )
    for each in strided:
        each.stride = (1, 1)
    backbone.feature_info[-1]['reduction'] //= 2


def check_backbone(name: str) -> None:
    """Refuse a name that timm does not know, with the nearest ones (ValueError)."""
    source, architecture = timm.models.parse_model_name(name)
    architecture = timm.models.get_arch_name(architecture)
    if source is None and (not timm.is_model(architecture) or is_ours(architecture)):
        known = [known for known in timm.list_models() if not is_ours(known)]
        raise ValueError(
            f"Unknown backbone '{name}'.{nearest(architecture, known)} "
            'timm.list_models() lists all of them.'
        )


def is_ours(architecture: str) -> bool:
    """Whether a name of `timm.list_models()` is a whole model of this package, not a backbone."""
    return model_entrypoint(architecture).__module__ in (__name__, 'timm_fisher.presets')


def _can_resize(backbone: Any) -> bool:
    """Whether a backbone that was built for one input size takes another."""
    fixed = get_model_input_config(backbone)['fixed_input_size']
    return not fixed or hasattr(backbone, 'set_input_size')


def _set_input_size(cfg: dict[str, Any], input_size: tuple[int, ...]) -> None:
    """Another size of input in an image configuration; what it says of testing goes with the old
    one."""
    if tuple(cfg['input_size']) != input_size:
        for key in ('test_input_size', 'test_crop_pct'):
            cfg.pop(key, None)
    cfg['input_size'] = input_size


def _create_classifier(in_features: int, num_classes: int) -> nn.Module:
    return nn.Linear(in_features, num_classes) if num_classes > 0 else nn.Identity()


def _wrap_cfg(backbone: Any, input_size: tuple[int, ...], num_classes: int) -> dict[str, Any]:
    """The backbone's image configuration, with module names as seen from the wrapped model."""
    source = backbone.pretrained_cfg
    cfg = {key: source[key] for key in _DATA_KEYS if key in source}
    _set_input_size(cfg, input_size)
    # Of grey images timm's loader takes the average, its transform refuses three values.
    cfg |= {
        key: adapt_to_chs(cfg[key], input_size[0])  # type: ignore[no-untyped-call]
        for key in ('mean', 'std')
        if key in cfg
    }
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
