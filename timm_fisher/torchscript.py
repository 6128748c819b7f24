"""A model for `torch.jit.script`: the backbone scripted, all that follows it traced."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from timm_fisher.head import in_evaluation_mode, like, trace

if TYPE_CHECKING:
    from timm_fisher.model import PooledModel


def scriptable(model: PooledModel) -> nn.Module:
    """A module that `torch.jit.script` takes as far as it takes the backbone, and that gives a
    model's logits for any number of images, of the sizes that the backbone takes.

    It shares the model's tensors, and is for inference, whatever mode the model is in: what is
    traced would keep the mode, and loses some gradients, such as those of `torch.clamp`'s bounds.

    Raises:
        ValueError: the model reads an earlier stage, by a method of timm's that TorchScript does
            not know.
    """
    if any(reader.intermediate for reader in model.descriptors):
        raise ValueError(
            f'torch.jit.script takes no model that reads {type(model.backbone).__name__} by '
            'forward_intermediates, as stages before the last one are. Use torch.jit.trace or '
            'torch.export.'
        )
    backbone = copy.copy(model.backbone)
    backbone.forward = backbone.forward_features  # its pool is never called, nor always complete
    image = torch.zeros(2, *model.pretrained_cfg['input_size'], **like(backbone))
    with torch.no_grad(), in_evaluation_mode(model):
        (features,) = model.descriptors.features(model.backbone, image)
    rest = copy.copy(model)
    stand_in: Any = nn.Identity()  # for the backbone, of which no more is read here
    stand_in.feature_info = model.backbone.feature_info
    rest._modules = {**model._modules, 'backbone': stand_in}
    return Scripted(backbone, trace(rest, features, 'forward_head'))


class Scripted(nn.Module):
    """A scripted backbone, and `PooledModel.forward_head`, traced."""

    def __init__(self, backbone: nn.Module, rest: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.backbone, self.rest = backbone, rest

    def forward(self, x: Tensor) -> Tensor:
        """As `PooledModel.forward`."""
        logits: Tensor = self.rest.forward_head(self.backbone(x))
        return logits
