"""LoRA: trains low-rank changes of a backbone's weights, which stay as they are (Hu et al., ICLR
2022), by peft.

The weight W of a layer becomes W + (alpha / r) B A, with A `[r, in]` random and B `[out, r]` zero
at first. In a state dict the factors stand beside the layer's own tensors, as `LAYER.lora_A.weight`
and `LAYER.lora_B.weight`, and merging needs no peft.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from timm_fisher.descriptors import StageDescriptors, operations
from timm_fisher.errors import ArgumentError
from timm_fisher.registry import check_arguments, nearest

A, B = '.lora_A.weight', '.lora_B.weight'
# Subclasses are left out: some change their weight, such as by standardization, before they use it.
LAYERS = (nn.Linear, nn.Conv2d, Conv2dSame)


@dataclass(frozen=True)
class LoRA:
    """What is trained of a backbone.

    Args:
        r: rank of the changes.
        alpha: the changes are scaled by alpha / r.
        targets: layers to change, by their names or the ends of their names, such as 'qkv' or
            'mlp.fc1'; none for all linear layers and convolutions without groups, dilation or
            standardized weights.

    Raises:
        ValueError: a value of another type, or out of range.
    """

    r: int = 8
    alpha: int = 16
    targets: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, value, most in (('r', self.r, 1024), ('alpha', self.alpha, 2**20)):
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(
                    f'{name} of lora is {value!r:.100}; give a whole number from 1 to {most}.'
                )
        targets = self.targets
        if not isinstance(targets, list | tuple) or any(type(name) is not str for name in targets):
            raise ValueError(f'targets of lora are {targets!r:.100}; give a list of names.')

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """From its arguments, checked by their names."""
        if not isinstance(arguments, Mapping):
            raise ArgumentError(f"lora is a dict, such as {{'r': 8}}, not {arguments!r:.100}.")
        check_arguments('lora', cls, arguments)
        return cls(**arguments)

    def layers(self, backbone: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
        """The layers that are changed, by name, of a backbone without factors; those that its
        descriptors do not depend on are left out.

        Raises:
            ValueError: a target that is no such layer.
        """
        found = {
            name: layer
            for name, layer in backbone.named_modules()
            if type(layer) in LAYERS and layer.weight.requires_grad and _is_simple(layer)
        }
        if not found:
            raise ValueError(f'{type(backbone).__name__} has no layer that lora can change.')
        if not self.targets:
            return found
        chosen: dict[str, nn.Linear | nn.Conv2d] = {}
        for target in self.targets:
            names = [name for name in found if f'.{name}'.endswith(f'.{target}')]
            if not names:
                raise ValueError(
                    f"'{target}' of lora's targets is no linear layer and no convolution without "
                    f'groups and dilation in {type(backbone).__name__}, on which the head depends.'
                    f'{nearest(target, found)}'
                )
            chosen |= {name: found[name] for name in names}
        return chosen

    def factors(self, backbone: nn.Module) -> dict[str, Tensor]:
        """The factors that a backbone without them would have, on the meta device, by name."""
        made = {}
        for name, layer in self.layers(backbone).items():
            out, into, *kernel = layer.weight.shape
            like = layer.weight.to('meta')
            made[f'{name}{A}'] = like.new_empty(self.r, into, *kernel)
            made[f'{name}{B}'] = like.new_empty(out, self.r, *(1 for _ in kernel))
        return made

    def add_to(
        self, backbone: nn.Module, read: StageDescriptors, input_size: Sequence[int]
    ) -> None:
        """Give the layers of a backbone factors that are trained; nothing else of it is then.

        Args:
            backbone: of which `read` reads descriptors.
            input_size: channels, height and width of an image.

        Raises:
            ValueError: a target that cannot be changed.
            ImportError: peft is missing.
        """
        names = '|'.join(map(re.escape, self.layers(backbone)))
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ImportError(
                'Factors of LoRA that are trained need peft: pip install "timm_fisher[lora]". '
                'A saved model with its factors merged needs none.'
            ) from error
        config = LoraConfig(r=self.r, lora_alpha=self.alpha, target_modules=names)
        inject_adapter_in_model(config, backbone)
        _check_called(backbone, read, input_size)
        backbone.register_state_dict_post_hook(_to_stored)
        backbone.register_load_state_dict_pre_hook(_from_stored)

    def merge(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict whose weights are changed by the factors in it, which it has no more."""
        merged = {name: value for name, value in state.items() if not is_factor(name)}
        for name in state:
            if name.endswith(A):
                layer = name.removesuffix(A)
                weight, a, b = (state[key] for key in (f'{layer}.weight', name, f'{layer}{B}'))
                change = b.flatten(1).double() @ a.flatten(1).double() * (self.alpha / self.r)
                merged[f'{layer}.weight'] = (weight + change.view_as(weight)).to(weight.dtype)
        return merged


def is_factor(name: str) -> bool:
    """Whether a tensor of a state dict is a factor of LoRA."""
    return name.endswith((A, B))


def _check_called(backbone: nn.Module, read: StageDescriptors, input_size: Sequence[int]) -> None:
    """Refuse factors of a layer that the backbone never calls: it takes the layer's weight."""
    with torch.enable_grad():
        was_training = backbone.training
        features = read.features(backbone.eval(), torch.zeros(1, *input_size))
        backbone.train(was_training)
    reached = set().union(*(operations(tensor)[0] for tensor in features))
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad and id(parameter) not in reached:
            layer = name.partition('.lora_')[0]
            raise ValueError(
                f"{type(backbone).__name__} does not call its layer '{layer}', so lora cannot "
                "change it. Give targets without it, such as ['mlp.fc1', 'mlp.fc2']."
            )


def _is_simple(layer: Any) -> bool:
    if isinstance(layer, nn.Linear):
        return True
    # Of a convolution, peft takes over kernel, stride and padding alone.
    return (layer.groups, layer.dilation, layer.padding_mode) == (1, (1, 1), 'zeros')


def _stored(name: str) -> str:
    """Name of a tensor in the state dict, from that in peft's modules."""
    return re.sub(r'\.base_layer\b|(?<=\.lora_[AB])\.default\b', '', name)


def _to_stored(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    tensors = list(state.items())
    state.clear()
    for name, value in tensors:
        state[_stored(name) if name.startswith(prefix) else name] = value


def _from_stored(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, _parameter in module.named_parameters(prefix=prefix.removesuffix('.')):
        if _stored(name) in state:
            state[name] = state.pop(_stored(name))
