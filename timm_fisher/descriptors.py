"""Local descriptors `[B, N, C]` from any timm backbone.

`find_descriptors` looks at a backbone once, on the meta device, and decides how to read it:

1. `forward_features` gives a map (NCHW or NHWC): flatten it.
2. `forward_features` gives tokens: drop the prefix tokens. Their number is believed only if what
   is left is the grid that `feature_info` promises, so that no class token passes for a descriptor.
3. Anything else, and every stage but the last: `forward_intermediates`, which gives NCHW maps.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from timm.layers.helpers import to_2tuple
from torch import Tensor, nn

from timm_fisher.head import PoolingHead, in_evaluation_mode, like

CLASS_TOKEN_MODES = ('drop', 'keep', 'append')


class Descriptors(nn.Module):
    """Reads one stage of a backbone as local descriptors. Has no parameters.

    Args:
        stage: -1 for the backbone's output, -2 for the stage before its last one, and so on, as
            `feature_info` counts them.
        layout: of what `features` returns: 'NCHW', 'NHWC' or 'NLC'.
        num_features: channels C of one descriptor.
        num_prefix_tokens: tokens ahead of the grid, in the layout 'NLC'.
        class_token: 'drop' it, 'keep' the prefix tokens among the descriptors, or leave the class
            token to be appended ('append') to the pooled vector.
        has_class_token: the first of the prefix tokens is a class token.
        intermediate: read by `forward_intermediates` instead of `forward_features`.
    """

    def __init__(
        self,
        *,
        stage: int,
        layout: str,
        num_features: int,
        num_prefix_tokens: int = 0,
        class_token: str = 'drop',
        has_class_token: bool = False,
        intermediate: bool = False,
    ) -> None:
        super().__init__()
        self.stage = stage
        self.layout = layout
        self.num_features = num_features
        self.num_prefix_tokens = num_prefix_tokens
        self.class_token = class_token
        self.has_class_token = has_class_token
        self.intermediate = intermediate

    def features(self, backbone: Any, x: Tensor) -> Tensor:
        """The backbone's plain tensor for images `[B, 3, H, W]`: a map, or tokens."""
        if not self.intermediate:
            return cast(Tensor, backbone.forward_features(x))
        options: dict[str, Any] = {'norm': True} if self.stage == -1 else {}
        return _intermediates(backbone, x, [self.stage], **options)[0]

    def forward(self, features: Tensor) -> Tensor:
        """Descriptors `[B, N, C]` of a backbone's plain tensor."""
        if self.layout == 'NCHW':
            return features.flatten(2).transpose(1, 2)
        if self.layout == 'NHWC':
            return features.flatten(1, 2)
        return features if self.class_token == 'keep' else features[:, self.num_prefix_tokens :]

    def grid(self, backbone: Any, features: Tensor, size: Sequence[int]) -> tuple[int, int] | None:
        """Rows and columns of what `features` gives for images of a height and width, None if they
        are no grid."""
        if self.layout == 'NLC':
            return token_grid(backbone, size, features.shape[1] - self.num_prefix_tokens)
        rows, columns = features.shape[2:] if self.layout == 'NCHW' else features.shape[1:3]
        return rows, columns

    def can_give(self, name: str) -> bool:
        """Whether a head can have what it asks for by this name; see `PoolingHead`."""
        if name == 'class_token':
            return self.has_class_token
        return self.class_token != 'keep'  # the prefix tokens are no part of a grid

    def context(
        self, head: PoolingHead, backbone: Any, features: Tensor, size: Sequence[int]
    ) -> dict[str, Any]:
        """What a head asks for beside the descriptors.

        Args:
            head: that pools this stage.
            backbone: which gave the features.
            features: as `forward` takes them.
            size: height and width of the images.

        Raises:
            ValueError: the head asks for a grid, and images of this size have another number.
        """
        given: dict[str, Any] = {}
        if 'class_token' in head.asks_for and self.can_give('class_token'):
            given['class_token'] = features[:, 0]
        if 'grid' in head.asks_for and self.can_give('grid'):
            given['grid'] = self.grid(backbone, features, size)
            if given['grid'] is None:
                raise ValueError(
                    f'{features.shape[1]} tokens are not those of images of {tuple(size)}. Call '
                    'the model with images, or set_input_size() before forward_head().'
                )
        return given

    def extra_repr(self) -> str:
        rule = 'forward_intermediates' if self.intermediate else 'forward_features'
        text = f'{rule}, stage={self.stage}, {self.layout}, {self.num_features} channels'
        prefix = f', {self.num_prefix_tokens} prefix tokens: {self.class_token}'
        return text + prefix * bool(self.num_prefix_tokens)


class StageDescriptors(nn.ModuleList):
    """Reads one or more stages of a backbone. Has no parameters.

    Args:
        stages: one `Descriptors` for each stage, in ascending order.
        one_pass: `forward_intermediates` gives the output, as `forward_features` does, beside the
            earlier stages; otherwise the backbone runs twice.

    Attributes:
        class_token: what becomes of that of the last stage.
    """

    def __init__(self, stages: Sequence[Descriptors], *, one_pass: bool) -> None:
        super().__init__(stages)
        self.one_pass = one_pass
        self.class_token = stages[-1].class_token

    def __iter__(self) -> Iterator[Descriptors]:
        return cast(Iterator[Descriptors], super().__iter__())

    def features(self, backbone: Any, x: Tensor) -> list[Tensor]:
        """One plain tensor for each stage, for images `[B, 3, H, W]`."""
        *stages, final = (reader.stage for reader in self)
        if final != -1:
            return _intermediates(backbone, x, [*stages, final])
        if self.one_pass:
            output, maps = backbone.forward_intermediates(x, indices=stages, output_fmt='NCHW')
            return [*maps, output]
        maps = _intermediates(backbone, x, stages) if stages else []
        return [*maps, cast(Descriptors, self[-1]).features(backbone, x)]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Descriptors `[B, N, C]` of each stage; N and C are its own."""
        return [read(tensor) for read, tensor in zip(self, features, strict=True)]

    @torch.no_grad()
    def grid(self, backbone: Any, input_size: Sequence[int]) -> tuple[int, int] | None:
        """Rows and columns of the last stage for an image (channels, height, width), None if they
        are no grid."""
        meta, image = _on_meta(backbone, input_size)
        last = cast(Descriptors, self[-1])
        return last.grid(backbone, self.features(meta, image)[-1], input_size[1:])


def read_last(
    backbone: Any, stage: int, channels: int, input_size: Sequence[int]
) -> StageDescriptors:
    """What reads a backbone that was pruned, and ends at a stage, counted from the first, of so
    many channels, for an image (channels, height, width)."""
    meta, image = _on_meta(backbone, input_size)
    last = _from_features(meta, meta.forward_features(image), image, 'drop')
    if last is None or last.num_features != channels:
        last = Descriptors(stage=stage, layout='NCHW', num_features=channels, intermediate=True)
    return StageDescriptors([last], one_pass=False)


def _on_meta(backbone: Any, input_size: Sequence[int]) -> tuple[Any, Tensor]:
    """A copy on the meta device, which takes neither time nor memory, and an image for it."""
    tensors = [*backbone.parameters(), *backbone.buffers()]
    with in_evaluation_mode(backbone), torch.no_grad():
        backbone.train()  # empties what timm's attention keeps, which cannot be copied
        memo = {id(tensor): tensor.to('meta') for tensor in tensors}
        meta = copy.deepcopy(backbone, memo).eval()
    return meta, torch.empty(1, *input_size, device='meta', dtype=like(backbone)['dtype'])


def _intermediates(backbone: Any, x: Tensor, stages: list[int], **options: Any) -> list[Tensor]:
    """Maps NCHW of some stages, without running what lies behind the last of them."""
    options |= dict(stop_early=True, output_fmt='NCHW', intermediates_only=True)
    return list(backbone.forward_intermediates(x, indices=stages, **options))


def find_descriptors(
    backbone: Any, image: Tensor, *, stages: Sequence[int] = (-1,), class_token: str = 'drop'
) -> tuple[StageDescriptors, tuple[int, int] | None, set[str], set[str]]:
    """Decide how to read a timm backbone, and what of it the descriptors do not depend on.

    Args:
        backbone: a timm model without classifier, best built on `torch.device('meta')`, where
            looking costs nothing.
        image: an input `[B, C, H, W]` on the same device.
        stages: as `Descriptors` takes them.
        class_token: as `Descriptors` takes it. With several stages it is about the output.

    Returns:
        The descriptors; rows and columns of the last stage's, None if they are no grid; names of
        the largest modules that hold parameters and never run; and names of parameters elsewhere
        that no gradient reaches, such as of a last layer's class token.

    Raises:
        ValueError: no such stage or mode, or the backbone has no class token there.
    """
    if class_token not in CLASS_TOKEN_MODES:
        raise ValueError(f'{class_token=} is not one of {", ".join(CLASS_TOKEN_MODES)}.')
    readers, features, ran = [], [], set()
    with torch.enable_grad():
        for stage in sorted(set(stages)):
            mode = class_token if stage == -1 or -1 not in stages else 'drop'
            descriptors, tensor, names = _find_stage(backbone, image, stage, mode)
            readers.append(descriptors)
            features.append(tensor)
            ran |= names
        unused = _unused_parts(backbone, features, ran)
        one_pass = _gives_output(backbone, image, readers, features[-1])
    grid = readers[-1].grid(backbone, features[-1], image.shape[2:])
    return StageDescriptors(readers, one_pass=one_pass), grid, *unused


def _find_stage(
    backbone: Any, image: Tensor, stage: int, class_token: str
) -> tuple[Descriptors, Tensor, set[str]]:
    """Descriptors of one stage, the backbone's tensor there, and the modules that ran for it."""
    name = type(backbone).__name__
    number = len(getattr(backbone, 'feature_info', None) or ())
    if not isinstance(stage, int) or not -max(number, 1) <= stage <= -1:
        raise ValueError(
            f'{stage=} does not exist in {name}: give -1 for its output'
            + (f', or -2 ... -{number} for an earlier stage.' if number > 1 else '.')
        )
    descriptors = None
    with _record_calls(backbone) as ran:
        if stage == -1:
            features = backbone.forward_features(image)
            descriptors = _from_features(backbone, features, image, class_token)
        if descriptors is None:
            ran.clear()
            descriptors = Descriptors(stage=stage, layout='NCHW', num_features=0, intermediate=True)
            try:
                features = descriptors.features(backbone, image)
            except (RuntimeError, AttributeError) as error:
                raise ValueError(f'{name} cannot be read at {stage=}: {error}') from error
            descriptors.num_features = features.shape[1]
    if class_token != 'drop' and not descriptors.num_prefix_tokens:
        raise ValueError(
            f'{class_token=} needs tokens ahead of the grid, and {name} has none at {stage=}.'
        )
    if class_token == 'append' and not descriptors.has_class_token:
        raise ValueError(
            f"class_token='append' needs a class token; the {descriptors.num_prefix_tokens} prefix "
            f"tokens of this {name} are registers. Use 'drop' or 'keep'."
        )
    return descriptors, features, ran


def _gives_output(
    backbone: Any, image: Tensor, readers: Sequence[Descriptors], output: Tensor
) -> bool:
    """Whether `forward_intermediates` gives the output beside earlier maps: the same shape,
    computed by the same operations from the same parameters."""
    *stages, final = (reader.stage for reader in readers)
    if not stages or final != -1 or readers[-1].intermediate:
        return False
    try:
        beside, _ = backbone.forward_intermediates(image, indices=stages, output_fmt='NCHW')
    except (RuntimeError, AttributeError):
        return False
    same_shape = isinstance(beside, Tensor) and beside.shape == output.shape
    return same_shape and operations(beside) == operations(output)


def _from_features(
    backbone: Any, features: Any, image: Tensor, class_token: str
) -> Descriptors | None:
    """Rules 1 and 2, or None where they do not hold."""
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        return None
    if features.ndim == 4:
        layout = str(getattr(backbone, 'output_fmt', 'NCHW'))
        channels = features.shape[3 if layout == 'NHWC' else 1]
        return Descriptors(stage=-1, layout=layout, num_features=channels)
    prefix = getattr(backbone, 'num_prefix_tokens', 0)
    if token_grid(backbone, image.shape[2:], features.shape[1] - prefix) is None:
        return None
    return Descriptors(
        stage=-1,
        layout='NLC',
        num_features=features.shape[2],
        num_prefix_tokens=prefix,
        class_token=class_token,
        has_class_token=prefix > 0 and getattr(backbone, 'cls_token', None) is not None,
    )


def token_grid(backbone: Any, size: Sequence[int], number: int) -> tuple[int, int] | None:
    """Rows and columns of so many tokens of images of a height and width; None if they do not fill
    a grid of the backbone's stride."""
    strides = to_2tuple(backbone.feature_info[-1]['reduction'])
    height, width = (side / stride for side, stride in zip(size, strides, strict=True))
    grids = ((rounded(height), rounded(width)) for rounded in (math.floor, math.ceil))
    return next((grid for grid in grids if math.prod(grid) == number), None)


@contextmanager
def _record_calls(backbone: Any) -> Iterator[set[str]]:
    """Names of the modules that are called meanwhile."""
    ran: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.add(name))
        for name, module in backbone.named_modules()
    ]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def _unused_parts(
    backbone: Any, features: Sequence[Tensor], ran: set[str]
) -> tuple[set[str], set[str]]:
    """See `find_descriptors`; `ran` are the names of modules that did."""
    reached = set().union(*(operations(tensor)[0] for tensor in features))
    dead = {
        name for name, p in backbone.named_parameters() if p.requires_grad and id(p) not in reached
    }
    # Whatever holds something that ran has run, too.
    parts = (other.split('.') for other in ran)
    ran = {'.'.join(part[:depth]) for part in parts for depth in range(1, len(part) + 1)}
    idle: set[str] = set()
    for name, module in backbone.named_modules():  # a module comes before its children
        inside = {key for key, _ in module.named_parameters(prefix=name)}
        # Code that never calls a list of modules may still loop over it, and code that prunes a
        # backbone asks its old head to reset itself: take out what is in them.
        container = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)
        container |= hasattr(module, 'reset')
        if name and inside and inside <= dead and name not in ran and not container:
            idle.add(name)
            dead -= inside
    return idle, dead


def operations(tensor: Tensor) -> tuple[set[int], Counter[str]]:
    """Ids of the parameters that a tensor's autograd graph begins with, and how often each
    operation occurs. Cheaper than a backward pass."""
    parameters: set[int] = set()
    operations: Counter[str] = Counter()
    seen, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, 'variable'):  # the end of a branch, torch's AccumulateGrad
            parameters.add(id(node.variable))
        operations[node.name()] += 1
        todo += [following for following, _ in node.next_functions]
    return parameters, operations


class Unused(nn.Identity):
    """Stands where a module of the backbone was taken out."""

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to resize: a backbone tells each of its stages."""


def remove_unused(backbone: Any, idle: set[str], dead: set[str]) -> None:
    """Take what `find_descriptors` found unused out of a backbone, in place: idle modules reach
    neither optimizer nor checkpoint; dead parameters are frozen, for DDP stops on those without a
    gradient."""
    for name in idle:
        backbone.set_submodule(name, Unused())
    for name in dead:
        backbone.get_parameter(name).requires_grad_(False)
