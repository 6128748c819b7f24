"""How the local descriptors of every timm architecture are read, as a Markdown table.

    python recipes/maintenance/sweep_backbones.py                 # all, half an hour
    python recipes/maintenance/sweep_backbones.py 'resnet*' vit_tiny_patch16_224

Nothing is downloaded and nothing computed: models are built on torch.device('meta'). The exit
status is 1 if an architecture is refused.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from tqdm.auto import tqdm

from timm_fisher import PooledModel
from timm_fisher.backbone import is_ours
from timm_fisher.explain import grids
from timm_fisher.training.command_line import run
from timm_fisher.training.tables import table


@dataclass
class Settings:
    """Try every timm architecture as a backbone.

    Args:
        patterns: names of architectures, or wildcards.
    """

    patterns: list[str] = field(default_factory=lambda: ['*'])


def main(settings: Settings) -> None:
    warnings.filterwarnings('ignore')
    names = [name for name in timm.list_models(settings.patterns) if not is_ours(name)]
    rules: dict[tuple[str, str], list[str]] = defaultdict(list)
    refused: list[str] = []
    for name in tqdm(names, disable=None):
        try:
            rules[try_backbone(name)].append(name)
        except Exception as error:  # whatever a third-party model raises belongs in the list
            refused.append(f'- refused: `{name}`: {type(error).__name__}: {error}')

    rows = [
        [rule, layout, str(len(read)), ', '.join(f'`{name}`' for name in read[:3])]
        for (rule, layout), read in sorted(rules.items(), key=lambda item: -len(item[1]))
    ]
    print(table(['read by', 'layout', 'architectures', 'for example'], rows))
    print(f'\n{len(names) - len(refused)} of {len(names)} architectures work.', *refused, sep='\n')
    if refused:
        sys.exit(1)


def try_backbone(name: str) -> tuple[str, str]:
    """The rule by which a backbone is read, and the layout of what it gives; whatever goes wrong is
    raised, also where the descriptors are not a grid of the image."""
    with torch.device('meta'):
        model = PooledModel(name, 'avg', num_classes=7).eval()
        image = torch.empty(1, *timm.models.get_model_input_config(model.backbone)['input_size'])
        features: Any = model.forward_features(image)
        (descriptors,) = model.descriptors([features])
        logits: Any = model.forward_head(features)
    if logits.shape != (1, 7):
        raise ValueError(f'logits of shape {tuple(logits.shape)}')
    (stage,), info = model.descriptors, model.backbone.feature_info[-1]
    channels = info['num_chs'] if stage.intermediate else model.backbone.num_features
    if model.num_features != channels:
        raise ValueError(f'{model.num_features} channels, not {channels}')
    size = image.shape[2:]
    (grid,) = grids(model, [features], size)  # refuses tokens that do not fill one
    if descriptors.shape[1] != math.prod(grid):
        raise ValueError(f'{descriptors.shape[1]} descriptors on a grid of {grid}')
    if stage.layout != 'NLC':
        strides = to_2tuple(info['reduction'])
        sides = [side / stride for side, stride in zip(size, strides, strict=True)]
        if name.startswith('mobilenetv5'):  # fuses its last stages on a grid of always this size
            sides = [16.0, 16.0]
        # Convolutions without padding, as Inception's, cost up to two rows.
        if not all(side - 2 < n < side + 1 for side, n in zip(sides, grid, strict=True)):
            raise ValueError(f'a grid of {grid}, where the strides give {sides}')
    rule = 'forward_intermediates' if stage.intermediate else 'forward_features'
    prefix = ', prefix tokens dropped' if stage.num_prefix_tokens else ''
    return f'`{rule}`', f'{stage.layout}{prefix}'


if __name__ == '__main__':
    run(main, Settings, positional='patterns')
