"""Which parts of an image carried a decision, to read, to compute and to draw.

```python
image = explain.read_image('photo.jpg')
x = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(image)[None]
logits, heat = explain.explain(model, x)
name = explain.class_names(model)[logits[0].argmax()]
explain.overlay(model, x[0], heat[0], title=name).savefig('overlay.png')
```

A part's contribution is gradient times input, at the local descriptors that the head pools. For
average pooling and a linear classifier that is exactly what the descriptor adds to the logit, as in
class activation maps (Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR
2016); for other heads it is so to first order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from timm.data.config import resolve_model_data_config
from torch import Tensor

from timm_fisher.images import read_image as read_image  # public here, too
from timm_fisher.model import PooledModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def class_names(model: PooledModel) -> list[str]:
    """Names of the classes by index, or the indices themselves where the model has no names.
    ValueError if it has no classes, or another number of names."""
    if not model.num_classes:
        raise ValueError('This model has num_classes=0: it gives embeddings, and no class.')
    names = model.pretrained_cfg.get('label_names') or range(model.num_classes)
    if len(names) != model.num_classes:
        raise ValueError(f'This model has {model.num_classes} classes, but {len(names)} names.')
    return list(map(str, names))


def grids(
    model: PooledModel, features: Sequence[Tensor], size: Sequence[int]
) -> list[tuple[int, int]]:
    """Rows and columns of the local descriptors, for each stage that the model reads.

    Args:
        model: whose descriptors they are.
        features: a list of what `PooledModel.forward_features` gives.
        size: height and width of the images.

    Raises:
        ValueError: tokens that do not fill a grid of the backbone's stride.
    """
    places: list[tuple[int, int]] = []
    for reader, tensor in zip(model.descriptors, features, strict=True):
        grid = reader.grid(model.backbone, tensor, size)
        if grid is None:
            number = tensor.shape[1] - reader.num_prefix_tokens
            raise ValueError(f'the places of the {number} tokens of this backbone are unknown.')
        places.append(grid)
    return places


def contributions(model: PooledModel, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What each local descriptor adds to the largest logit, to first order: gradient times value.

    Args:
        model: which is left in evaluation mode.
        images: `[B, C, H, W]`, preprocessed as the model wants it, on its device.

    Returns:
        Logits `[B, num_classes]`; and for each stage `[B, rows, columns]`, of either sign.

    Raises:
        ValueError: the model has no classes, or its descriptors are no parts of an image.
    """
    class_names(model)  # refuses embeddings
    model.eval()
    with torch.no_grad():
        stages = model.descriptors.features(model.backbone, images)
    places = grids(model, stages, images.shape[2:])
    if all(grid == (1, 1) for grid in places):
        raise ValueError('this model pools one descriptor of the whole image.')
    with torch.enable_grad():
        stages = [tensor.detach().requires_grad_() for tensor in stages]
        logits = model.classify(model.pool(stages, images.shape[2:]))
        slopes = torch.autograd.grad(logits.max(1).values.sum(), stages)
    products = [slope * tensor.detach() for slope, tensor in zip(slopes, stages, strict=True)]
    maps = [
        # Without the prefix tokens, which may be kept among the descriptors.
        shares[:, -math.prod(grid) :].sum(2).unflatten(1, grid)
        for shares, grid in zip(model.descriptors(products), places, strict=True)
    ]
    return logits.detach(), maps


def explain(model: PooledModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """As `contributions`, but of all stages together, on the images' own grid: logits
    `[B, num_classes]`, and maps `[B, H, W]` of what speaks for (above zero) or against the class
    that won. The mean of a map is the sum of all contributions."""
    logits, maps = contributions(model, images)
    # Per area, so that stages of different grids add up.
    enlarged = [
        F.interpolate(stage[:, None] * stage[0].numel(), images.shape[2:], mode='bilinear')
        for stage in maps
    ]
    return logits, torch.stack(enlarged).sum(0)[:, 0]


@torch.no_grad()
def attention(model: PooledModel, images: Tensor) -> Tensor | None:
    """Attention of the heads that have a method `attention` (`PoolingHead`): the mean over their
    queries, as maps `[B, H, W]` on the images' own grid, each with the largest value 1. None if the
    model has no such head.

    Args:
        model: which is left in evaluation mode.
        images: `[B, C, H, W]`, preprocessed as the model wants it, on its device.
    """
    if not any(hasattr(type(head), 'attention') for head, _ in model.heads):
        return None
    model.eval()
    features, size = model.descriptors.features(model.backbone, images), images.shape[2:]
    maps = []
    for grid, (head, x, _) in zip(
        [grids(model, features, size)[place] for _, place in model.heads],
        model.inputs_of_heads(features, size),
        strict=True,
    ):
        look = getattr(type(head), 'attention', None)  # not a layer of this name
        if look is not None:
            # Without the prefix tokens, which may be kept among the descriptors.
            weights = look(head, x).mean(1)[:, -math.prod(grid) :].unflatten(1, grid)
            maps.append(F.interpolate(weights[:, None].float(), size, mode='bilinear')[:, 0])
    total = torch.stack([one / one.amax((1, 2), keepdim=True) for one in maps]).mean(0)
    return total / total.amax((1, 2), keepdim=True)


def picture(model: PooledModel, image: Tensor) -> Tensor:
    """What the model sees of a preprocessed image `[C, H, W]`: `[H, W, C]`, or `[H, W]` of one
    channel, from 0 to 1, on the CPU."""
    data = resolve_model_data_config(model)
    mean, std = (torch.tensor(data[key])[:, None, None] for key in ('mean', 'std'))
    return (image.cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).squeeze(2)


def overlay(
    model: PooledModel,
    image: Tensor,
    heat: Tensor,
    *,
    weights: Tensor | None = None,
    title: str = '',
) -> Figure:
    """A preprocessed image `[C, H, W]`, and beside it the image under what speaks for the class
    that won, the `heat` `[H, W]` of `explain`, and under the `weights` `[H, W]` of `attention`, if
    there are any; the title is one line above all. ModuleNotFoundError if matplotlib is not
    installed."""
    try:
        import matplotlib.pyplot  # noqa: F401, a notebook shows figures once this is imported
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'Overlays are drawn by matplotlib: pip install "timm_fisher[recipes]"'
        ) from None
    seen = picture(model, image).numpy()
    height, width = seen.shape[:2]
    # Not by pyplot, which would open a window.
    maps = {'': None, 'for the class': heat}
    if weights is not None:
        maps['attention'] = weights
    number = len(maps)
    figure = Figure(figsize=(4.5 * number, 0.6 + 4.5 * height / width), layout='constrained')
    for axis, (name, values) in zip(figure.subplots(1, number), maps.items(), strict=True):
        axis.imshow(seen, cmap='gray', vmin=0, vmax=1)
        axis.set_axis_off()
        if values is not None:
            axis.imshow(values.clamp(min=0).cpu().numpy(), cmap='inferno', alpha=0.6)
        if number > 2:
            axis.set_title(name)
    figure.suptitle(title, parse_math=False)
    return figure
