"""The backbone `pixels`: an image as it is, one descriptor of all of its pixels, binarised."""

from __future__ import annotations

from typing import Any

from timm.layers.helpers import to_2tuple
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

_CFG = {
    'input_size': (1, 28, 28),
    'fixed_input_size': True,
    'interpolation': 'bilinear',
    'crop_pct': 1.0,
    'mean': (0.0,),
    'std': (1.0,),
    'num_classes': 0,
}


class Pixels(nn.Module):
    """Images `[B, C, H, W]` in [0, 1] -> one descriptor `[B, C * H * W, 1, 1]`, row by row.

    Args:
        img_size: side or (height, width).
        in_chans: channels C of the image.
        threshold: what is above it becomes 1, all else 0.
        num_classes: 0, for there is nothing to classify with.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 28,
        in_chans: int = 1,
        threshold: float = 0.5,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        if num_classes:
            raise ValueError(
                f"'pixels' has no classifier, but {num_classes=}. Use it as the backbone of "
                'timm_fisher.create_model.'
            )
        height, width = to_2tuple(img_size)
        self.num_classes = 0
        self.threshold = threshold
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = in_chans * height * width
        reduction = height, width
        self.feature_info = [dict(num_chs=self.num_features, reduction=reduction, module='')]

    def forward_features(self, x: Tensor) -> Tensor:
        """Descriptor `[B, C * H * W, 1, 1]`."""
        return (x > self.threshold).to(x.dtype).flatten(1)[:, :, None, None]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The descriptor without its map, `[B, C * H * W]`."""
        return x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@register_model
def pixels(pretrained: bool = False, **arguments: Any) -> Pixels:
    """`Pixels`: the image itself as the only descriptor, for models of small binary images."""
    model: Pixels = build_model_with_cfg(
        Pixels, 'pixels', pretrained, pretrained_cfg=arguments.pop('pretrained_cfg', None) or _CFG,
        kwargs_filter=None, **arguments,
    )  # fmt: skip
    return model
