"""`PooledModel`: a timm backbone whose global pool is a pooling head."""

# No future annotations: torch.fx hands those of `forward` to TorchScript, which takes no text.

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from timm.layers.helpers import to_2tuple
from timm.models import group_parameters
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_fisher.backbone import check_number, create_backbone, resize, set_size, wrap_cfg
from timm_fisher.compose import ConcatHeads
from timm_fisher.descriptors import Descriptors, StageDescriptors, read_last
from timm_fisher.head import PoolingHead, Unpooled, like
from timm_fisher.layers import PreNorm, Projection, create_classifier
from timm_fisher.lora import LoRA
from timm_fisher.registry import check_output, create_head
from timm_fisher.specification import parse_heads
from timm_fisher.torchscript import scriptable


class PooledModel(nn.Module):
    """A timm backbone -> local descriptors -> pooling head -> linear classifier.

    Speaks timm's language, so that timm's own scripts take it. Parts of the backbone that the
    descriptors do not depend on (an old pre-classifier, the stages behind an earlier `stage`) are
    taken out.

    Args:
        backbone: any name that `timm.create_model` takes, `hf-hub:` and `local-dir:` included.
        head: name of an installed head; see `timm_fisher.list_heads()`. Or several heads, whose
            outputs are L2-normalised and concatenated: `'avg + sparse_fisher@-2'`, where stage -2
            is that of the second one, and `avg` takes its form `normalize=True`; or a list of
            dicts, each of a `name`, its `stage` (by default the model's) and its arguments.
        head_kwargs: arguments of a head that is named; of several, each goes to the only one that
            has it.
        backbone_kwargs: further arguments of the backbone, as `timm.create_model` takes them.
        lora: train low-rank changes of the backbone's weights in place of them: arguments of
            `timm_fisher.lora.LoRA`, as in `dict(r=8, targets=['qkv', 'proj'])`; {} for its own.
        num_classes: outputs of the classifier; 0 gives embeddings.
        in_chans: channels of the image; None for the backbone's own.
        img_size: input size, side or (height, width); None for the backbone's own.
        projection: dimensions that pooled vectors are brought to, by a linear map that `fit` starts
            from their principal components; None leaves them as they are.
        pre_norm: batch norm without weights between head and classifier, as probes of frozen
            backbones have it.
        drop_rate: dropout between head and classifier. As timm has it, rates are not saved.
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

    if TYPE_CHECKING:  # for torch.jit reads annotations and takes no union of modules
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
        lora: dict[str, Any] | None = None,
        num_classes: int = 1000,
        in_chans: int | None = None,
        img_size: int | tuple[int, int] | None = None,
        projection: int | None = None,
        pre_norm: bool = False,
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
        heads = parse_heads(head, head_kwargs, stage)
        stages = sorted({place for _, place, _ in heads})
        requested = {
            'in_chans': in_chans,
            'drop_path_rate': drop_path_rate,
            'pretrained_cfg_overlay': pretrained_cfg_overlay,
            'cache_dir': cache_dir,
        }
        requested = {key: value for key, value in requested.items() if value is not None}
        self.lora = None if lora is None else LoRA.of(lora)
        built = create_backbone(
            backbone,
            {**(backbone_kwargs or {}), **requested},
            img_size=img_size,
            heads=heads,
            class_token=class_token,
            last_stride=last_stride,
            lora=self.lora,
            pretrained=pretrained,
        )
        self.backbone, self.backbone_weights = built.module, built.weights
        self.descriptors = built.descriptors
        parameters = self.backbone.named_parameters()
        self._always_frozen = [name for name, p in parameters if not p.requires_grad]
        self._stages_left = len(getattr(self.backbone, 'feature_info', ())) + 1 + stages[-1]
        places = [stages.index(place) for _, place, _ in heads]
        channels = [reader.num_features for reader in self.descriptors]
        made = []
        for (name, _, options), place in zip(heads, places, strict=True):
            made.append(create_head(name, channels[place], **options))
            if place == len(stages) - 1:
                check_number(name, made[-1], built)
            if torch.get_default_device().type != 'meta':  # where a saved model is built again
                check_output(name, channels[place], options)
        single = isinstance(head, str) and len(made) == 1
        self.head = made[0] if single else ConcatHeads(made, places)
        self.head_drop = nn.Dropout(drop_rate)

        self.in_chans = built.input_size[0]
        self.num_features: int = channels[-1]
        self.head_hidden_size = self.head.out_features
        if class_token == 'append':
            self.head_hidden_size += self.num_features
        self.projection: nn.Module = nn.Identity()
        if projection is not None:
            self.projection = Projection(self.head_hidden_size, projection)
            self.head_hidden_size = projection
        self.num_classes = num_classes
        self.pre_norm = PreNorm(self.head_hidden_size) if pre_norm else nn.Identity()
        self.classifier = create_classifier(self.head_hidden_size, num_classes)
        self.pretrained_cfg = wrap_cfg(
            self.backbone.pretrained_cfg, built.input_size, built.pool_size, num_classes
        )
        # What the caller gave, for timm's factory to build this model again. A backbone from a
        # folder or a repository is recorded as what it turned out to be, without that place or a
        # file of weights.
        self._built_args = dict(self.backbone._model_args)
        if ':' in backbone:
            backbone = self.backbone.pretrained_cfg['architecture']
            backbone_kwargs = {**built.arguments, **(backbone_kwargs or {})}
            img_size = img_size or self._built_args.get('img_size')
        files = ('checkpoint_path', 'pretrained_cfg_overlay')
        options = {k: v for k, v in (backbone_kwargs or {}).items() if k not in files}
        given: dict[str, Any] = {
            'head_kwargs': head_kwargs or None,
            'backbone_kwargs': options or None,
            'lora': lora,
            'img_size': img_size,
            'projection': projection,
            'pre_norm': pre_norm or None,
            'stage': stage if stage != -1 else None,
            'class_token': class_token if class_token != 'drop' else None,
            'last_stride': last_stride,
        }
        given = {key: value for key, value in given.items() if value is not None}
        self._given = {'backbone': backbone, 'head': head, **given}

    @property
    def heads(self) -> list[tuple[PoolingHead, int]]:
        """Each head, and which of the model's descriptors it pools."""
        head = self.head
        return list(head.placed()) if isinstance(head, ConcatHeads) else [(head, 0)]

    @property
    def default_cfg(self) -> dict[str, Any]:
        """Alias of `pretrained_cfg`, as timm has it."""
        return self.pretrained_cfg

    @property
    def output_fmt(self) -> str:
        """Layout of the last of what `forward_features` gives: NCHW, NHWC or NLC."""
        return cast(str, self.descriptors[-1].layout)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Those stages of the backbone that are left in it, with module names of this model."""
        stages = self.backbone.feature_info[: self._stages_left]
        return [{**stage, 'module': f'backbone.{stage["module"]}'} for stage in stages]

    def forward_features(self, x: Tensor) -> Tensor | list[Tensor]:
        """The backbone's plain tensor, as timm gives it, for images `[B, 3, H, W]`; for several
        stages a list of them, from early to late."""
        features = self.descriptors.features(self.backbone, x)
        return features if isinstance(self.head, ConcatHeads) else features[0]

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, **options: Any
    ) -> Any:
        """Maps of some stages of `feature_info`, as timm's backbones give them.

        Args:
            x: images `[B, 3, H, W]`.
            indices: stages, or how many of the last ones; None for all.
            **options: of the backbone's `forward_intermediates`, such as `intermediates_only`.
        """
        stages, _ = feature_take_indices(len(self.feature_info), indices)
        return self.backbone.forward_intermediates(x, indices=stages, **options)

    def forward_head(self, x: Tensor | list[Tensor], pre_logits: bool = False) -> Tensor:
        """Logits `[B, num_classes]` of what `forward_features` gives.

        Args:
            x: one tensor, or one for each stage.
            pre_logits: stop before the classifier, at `[B, head_hidden_size]`.
        """
        pooled = self.pool(x)
        return self.head_drop(self.pre_norm(pooled)) if pre_logits else self.classify(pooled)

    def forward_head_with_loss(self, x: Tensor | list[Tensor]) -> tuple[Tensor, Tensor]:
        """As `forward_head`, and the heads' unsupervised loss, a scalar."""
        pooled, loss = self._pool_with_loss(x, self.pretrained_cfg['input_size'][1:])
        return self.classify(pooled), loss

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, num_classes]` of images `[B, 3, H, W]`."""
        return self.classify(self.pool(self.forward_features(x), x.shape[2:]))

    def forward_with_loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, and the heads' unsupervised loss, a scalar."""
        pooled, loss = self._pool_with_loss(self.forward_features(x), x.shape[2:])
        return self.classify(pooled), loss

    def pool(self, x: Tensor | list[Tensor], size: Sequence[int] | None = None) -> Tensor:
        """Pooled vectors `[B, head_hidden_size]`, before `pre_norm` and dropout.

        Args:
            x: what `forward_features` gives: one tensor, or one for each stage.
            size: height and width of the images; by default those of `pretrained_cfg`.
        """
        return cast(Tensor, self.projection(self.pool_unprojected(x, size)))

    def pool_unprojected(
        self, x: Tensor | list[Tensor], size: Sequence[int] | None = None
    ) -> Tensor:
        """As `pool`, without the projection."""
        size = self.pretrained_cfg['input_size'][1:] if size is None else size
        features, arguments, context = self._read(x, size)
        return self._append(self.head(arguments, **context), features)

    def classify(self, pooled: Tensor) -> Tensor:
        """Logits `[B, num_classes]` of what `pool` gives."""
        return cast(Tensor, self.classifier(self.head_drop(self.pre_norm(pooled))))

    def _pool_with_loss(
        self, x: Tensor | list[Tensor], size: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """As `pool`, and the heads' unsupervised loss."""
        features, descriptors, context = self._read(x, size)
        pooled, loss = self.head.forward_with_loss(descriptors, **context)
        return self.projection(self._append(pooled, features)), loss

    def _read(
        self, x: Tensor | list[Tensor], size: Sequence[int]
    ) -> tuple[list[Tensor], Any, dict[str, Any]]:
        """Features of each stage, and what `head` takes: descriptors, and what else it asks for."""
        # Not `isinstance(x, Tensor)`: torch.fx traces with a placeholder.
        features = x if isinstance(x, list) else [x]
        _, descriptors, contexts = zip(*self.inputs_of_heads(features, size), strict=True)
        if isinstance(self.head, ConcatHeads):
            return features, list(descriptors), {'contexts': contexts} if any(contexts) else {}
        return features, descriptors[0], contexts[0]

    def inputs_of_heads(
        self, features: Sequence[Tensor], size: Sequence[int]
    ) -> list[tuple[PoolingHead, Tensor, dict[str, Any]]]:
        """Each head, the descriptors `[B, N, C]` that it pools, and what else it asks for.

        Args:
            features: a list of what `forward_features` gives.
            size: height and width of the images.
        """
        descriptors, made = self.descriptors(features), []
        for head, place in self.heads:
            reader = cast(Descriptors, self.descriptors[place])
            context = reader.context(head, self.backbone, features[place], size)
            made.append((head, descriptors[place], context))
        return made

    def _append(self, pooled: Tensor, features: list[Tensor]) -> Tensor:
        """Pooled vectors, and the class token behind them if the model appends it."""
        append = self.descriptors.class_token == 'append'
        return torch.cat([pooled, features[-1][:, 0]], 1) if append else pooled

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` takes in the model's place, see `scriptable`."""
        return scriptable(self)

    def get_classifier(self) -> nn.Module:
        """The last layer: `nn.Linear`, or `nn.Identity` without classes."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for other classes, without their names; device, dtype and mode stay.

        Raises:
            ValueError: `global_pool` is given; the pool of this model is its head.
        """
        if global_pool is not None:
            raise ValueError(
                f'{global_pool=} cannot be set: this model pools by its head. Create another model.'
            )
        where = like(nn.ModuleList([self.classifier, self.backbone, self.head]))
        self.num_classes = num_classes
        self.classifier = create_classifier(self.head_hidden_size, num_classes)
        self.classifier.to(**where).train(self.training)
        self.pretrained_cfg |= {'label_names': None, 'label_descriptions': None}

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, but what is frozen stays in eval mode, as its batch-norm statistics
        would move otherwise: backbone or head as a whole, and batch norms of a LoRA backbone."""
        super().train(mode)
        for part in (self.backbone, self.head):
            trained = [parameter.requires_grad for parameter in part.parameters()]
            if trained and not any(trained):
                part.eval()
        for module in self.backbone.modules():
            if self.lora is not None and isinstance(module, _BatchNorm):
                module.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As `nn.Module.requires_grad_`, but what timm froze in the backbone, or what the
        descriptors do not depend on, stays frozen."""
        super().requires_grad_(requires_grad)
        for name, parameter in self.backbone.named_parameters():
            if name in self._always_frozen:
                parameter.requires_grad_(False)
        return self

    def freeze_backbone(self, frozen: bool = True) -> Self:
        """Freeze the backbone, which then stays in eval mode, or train it again."""
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(not frozen and name not in self._always_frozen)
        return self.train(self.training)

    def project_(self) -> None:
        """Bring the heads back to their feasible sets; call it after each optimizer step."""
        for head, _ in self.heads:
            head.project_()

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Take images of another size, side or (height, width), or patches of another; a backbone
        that fixes them resamples its position embedding and patch embedding.

        Raises:
            ValueError: the backbone can neither take another size nor resample, or it has lora.
        """
        if patch_size is not None and self.lora is not None:
            raise ValueError('Patches keep their size beside lora. Load the model with it merged.')
        size = to_2tuple(img_size or self.pretrained_cfg['input_size'][1:])
        resize(self.backbone, size, None if patch_size is None else to_2tuple(patch_size))
        input_size = (self.in_chans, *size)
        pool_size = self.descriptors.grid(self.backbone, input_size)
        set_size(self.pretrained_cfg, input_size, pool_size)
        if img_size is not None:
            self._given['img_size'] = img_size

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Take out what some stages of `feature_info` do not need, as timm's models do.

        Args:
            indices: stages to keep, or how many of the last ones.
            prune_norm: take out the backbone's last norm, too.
            prune_head: take out head and classifier: `forward` gives local descriptors
                `[B, N, C]` then. They also go where the stage that they read does.

        Returns:
            The stages, counted from the first.
        """
        number = len(self.feature_info)
        stages, last = feature_take_indices(number, indices)
        self.backbone.prune_intermediate_layers(
            stages, prune_norm=prune_norm, prune_head=prune_head
        )
        if prune_head or last < number - 1:
            self.num_features = self.feature_info[last]['num_chs']
            self._stages_left = last + 1
            self.descriptors = read_last(
                self.backbone, last, self.num_features, self.pretrained_cfg['input_size']
            )
            self.head = Unpooled(self.num_features)
            self.projection = self.pre_norm = nn.Identity()
            self.head_hidden_size = self.num_features
            self.reset_classifier(0)
        return stages

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade the backbone's activations for a second forward pass."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that backbone or heads want without weight decay."""
        return {
            f'{name}.{parameter}'
            for name, part in self.named_modules()
            if part is self.backbone or isinstance(part, PoolingHead)
            for parameter in getattr(part, 'no_weight_decay', set)()
        }

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
        """What timm's factory needs to build this model again: what the caller gave, and what a
        resize has changed in the backbone since."""
        arguments, now = dict(self._given), self.backbone._model_args
        changed = {key: now[key] for key in now if now[key] != self._built_args.get(key)}
        changed.pop('img_size', None)
        if changed:
            arguments['backbone_kwargs'] = {**arguments.get('backbone_kwargs', {}), **changed}
        if self.backbone_weights is not None:
            arguments['backbone_weights'] = self.backbone_weights
        return arguments

    @_model_args.setter
    def _model_args(self, arguments: dict[str, Any]) -> None:
        """Nothing: timm's factory adds what it was called with, which the model knows."""
