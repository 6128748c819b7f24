"""How the local descriptors of every timm architecture are read, as a Markdown table.

    python recipes/sweep_backbones.py                 # all of timm.list_models(), half an hour
    python recipes/sweep_backbones.py 'resnet*' vit_tiny_patch16_224

Nothing is downloaded and nothing computed: models are built on torch.device('meta'). The exit
status is 1 if an architecture is refused.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections import defaultdict

import timm
import torch
from timm.layers import to_2tuple
from tqdm.auto import tqdm

from timm_fisher import PooledModel
from timm_fisher.backbone import is_ours


def main() -> None:
    parser = argparse.ArgumentParser(description='Try every timm architecture as a backbone.')
    parser.add_argument('patterns', nargs='*', default=['*'], help='names or wildcards')
    patterns = parser.parse_args().patterns
    warnings.filterwarnings('ignore')

    names = [name for name in timm.list_models(patterns) if not is_ours(name)]
    rules: dict[str, list[str]] = defaultdict(list)
    refused: list[tuple[str, str]] = []
    for name in tqdm(names, disable=None):
        try:
            rules[try_backbone(name)].append(name)
        except Exception as error:  # whatever a third-party model raises belongs in the table
            refused.append((name, f'{type(error).__name__}: {error}'))

    print('| read by | layout | architectures | for example |')
    print('|---|---|---:|---|')
    for rule, found in sorted(rules.items(), key=lambda item: -len(item[1])):
        print(f'| {rule} | {len(found)} | {", ".join(f"`{name}`" for name in found[:3])} |')
    print(f'\n{len(names) - len(refused)} of {len(names)} architectures work.')
    for name, reason in refused:
        print(f'- refused: `{name}`: {reason}')
    sys.exit(bool(refused))


def try_backbone(name: str) -> str:
    """The rule by which a backbone is read.

    Raises:
        Exception: whatever goes wrong; a ValueError where the number of descriptors is not that of
            a grid.
    """
    with torch.device('meta'):
        model = PooledModel(name, 'avg', num_classes=7).eval()
        image = torch.empty(1, *timm.models.get_model_input_config(model.backbone)['input_size'])
        features = model.forward_features(image)
        number = model.descriptors(features).shape[1]
        logits = model.forward_head(features)
    if logits.shape != (1, 7):
        raise ValueError(f'logits of shape {tuple(logits.shape)}')
    info = model.backbone.feature_info[-1]
    channels = info['num_chs'] if model.descriptors.intermediate else model.backbone.num_features
    if model.num_features != channels:
        raise ValueError(f'{model.num_features} channels, not {channels}')
    strides = to_2tuple(info['reduction'])
    sides = [size / stride for size, stride in zip(image.shape[2:], strides, strict=True)]
    if name.startswith('mobilenetv5'):  # fuses its last stages on a grid of always the same size
        sides = [16.0, 16.0]
    if model.descriptors.layout == 'NLC':
        right = number in {math.prod(map(rounded, sides)) for rounded in (math.floor, math.ceil)}
    else:
        grid = features.shape[1:3] if model.descriptors.layout == 'NHWC' else features.shape[2:]
        # Convolutions without padding, as Inception's, cost up to two rows.
        right = all(side - 2 < n < side + 1 for side, n in zip(sides, grid, strict=True))
    if not right:
        raise ValueError(f'{number} descriptors, but the grid is {sides}')
    rule = 'forward_intermediates' if model.descriptors.intermediate else 'forward_features'
    prefix = ', prefix tokens dropped' if model.descriptors.num_prefix_tokens else ''
    return f'`{rule}` | {model.descriptors.layout}{prefix}'


if __name__ == '__main__':
    main()
