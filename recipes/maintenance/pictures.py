"""Draw what heads look at and what they confuse, from models trained as recipes/configs/probe.yaml
says, at the rates that recipes/results/probe.jsonl has for these images.

    python recipes/maintenance/pictures.py --data-dir trashnet

Writes to `--output`, for the test images of a data set: DATA_overlays.png, the same photographs
under several heads; DATA_classes.png, the share of each class that is right; DATA_confusion.png,
what the last head takes for what; DATA_tsne.png, the pooled vectors of the first and the last.
Models stay in `--runs`, and are not trained again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import recall_score

import timm_fisher
from timm_fisher import PooledModel
from timm_fisher.explain import class_names, explain, picture
from timm_fisher.files import save_png
from timm_fisher.training.command_line import run
from timm_fisher.training.data import load_folder
from timm_fisher.training.evaluate import draw_confusion, predict
from timm_fisher.training.launch import launch
from timm_fisher.training.results import BASELINES, Result, choose
from timm_fisher.training.rows import read_rows
from timm_fisher.training.tsne import plot_tsne
from timm_fisher.vectors import Prepared

RECIPES = Path(__file__).resolve().parents[1]
COLOURS = 224  # of the overlays, which would fill a page's megabyte otherwise


@dataclass
class Settings:
    """Draw what heads look at and what they confuse.

    Args:
        data_dir: folder of images with train, val and test.
        heads: by their names in probe.yaml.
        images: photographs of the overlays: one of each of so many classes.
        output: folder of the pictures.
        runs: folder of the models.
        seed: of their training.
    """

    data_dir: Path
    heads: list[str] = field(
        default_factory=lambda: [
            'avg', 'bilinear (128)', 'sparse_fisher (128 x 32)', 'isqrt_cov (64)', 'ep (32)',
            'avg + sparse_fisher (96 x 64) of stage -2',
        ]
    )  # fmt: skip
    images: int = 3
    output: Path = RECIPES.parent / '.github/pictures'
    runs: Path = Path('runs/pictures')
    seed: int = 0


def main(settings: Settings) -> None:
    data = settings.data_dir.resolve().name
    models = {name: train(name, data, settings) for name in settings.heads}
    labels: list[int] = []
    predicted: dict[str, list[int]] = {}
    for name, model in models.items():
        labels, predicted[name] = predict(model, str(settings.data_dir), 'test')
    classes = class_names(model)
    settings.output.mkdir(parents=True, exist_ok=True)
    beginning = settings.output / data
    draw_classes(labels, predicted, classes, Path(f'{beginning}_classes.png'))
    draw_confusion(labels, predicted[name], classes, Path(f'{beginning}_confusion.png'))

    reader = load_folder(str(settings.data_dir), 'test', None).dataset.reader
    paths = [Path(reader.filename(i, absolute=True)) for i in range(len(labels))]
    first = [labels.index(c) for c in range(min(settings.images, len(classes)))]
    draw_overlays(models, [paths[i] for i in first], Path(f'{beginning}_overlays.png'))
    ends = (settings.heads[0], name)
    vectors = {name: timm_fisher.embed(models[name], paths).numpy() for name in ends}
    plot_tsne(vectors, np.array(labels), classes, Path(f'{beginning}_tsne.png'))
    print(f'-> {beginning}_*.png')


def train(name: str, data: str, settings: Settings) -> PooledModel:
    """A model of probe.yaml at the rate that validated best, on the images given."""
    config = yaml.safe_load((RECIPES / 'configs/probe.yaml').read_text())
    variants = {**BASELINES, **config['variants']}
    chosen = choose(r for r in read_rows(RECIPES / 'results/probe.jsonl', Result) if r.data == data)
    if name not in variants or name not in chosen:
        known = [each for each in variants if each in chosen]
        raise ValueError(f"There is no result of '{name}' on '{data}', only of {known}.")
    options = {**config['train'], **variants[name]}
    options.pop('search', None)
    rate = chosen[name][0].settings['stages.only.lr']
    options['stages'] = {'only': {**options['stages']['only'], 'lr': rate}}
    folder = settings.runs / data / name.replace(' ', '')
    launch({**options, 'data_dir': str(settings.data_dir), 'seed': settings.seed}, folder)
    return timm_fisher.from_pretrained(folder / 'model').eval()


def draw_overlays(models: Mapping[str, PooledModel], paths: Sequence[Path], path: Path) -> None:
    """A row for each photograph: as it is, and under what speaks for the class, by head."""
    columns = 1 + len(models)
    figure = Figure(figsize=(1.5 * columns, 1.85 * len(paths)), layout='constrained')
    axes = figure.subplots(len(paths), columns, squeeze=False)
    for column, (name, model) in enumerate(models.items(), 1):
        x = torch.stack([*map(Prepared([], model).prepare, paths)])
        logits, heat = explain(model, x)
        shares, best = logits.softmax(1).max(1)
        for row, (image, values) in enumerate(zip(x, heat, strict=True)):
            seen = picture(model, image).numpy()
            axes[row, 0].imshow(seen)
            axes[row, column].imshow(seen)
            axes[row, column].imshow(values.clamp(min=0).numpy(), cmap='inferno', alpha=0.6)
            words = f'{class_names(model)[best[row]]}, {shares[row]:.0%}'
            above = f'{name.replace(" of stage", chr(10) + "of stage")}\n' if row == 0 else ''
            axes[row, column].set_title(above + words, fontsize=6, parse_math=False)
    for row, photograph in enumerate(paths):
        axes[row, 0].set_title(photograph.parent.name, fontsize=6, parse_math=False)
    for axis in axes.flat:
        axis.set_axis_off()
    save_png(figure, path)
    with Image.open(path) as drawn:
        few_colours = drawn.convert('RGB').quantize(COLOURS)
    few_colours.save(path, optimize=True)


def draw_classes(
    labels: Sequence[int],
    predicted: Mapping[str, Sequence[int]],
    classes: Sequence[str],
    path: Path,
) -> None:
    """Share of each class that is right, in bars for each head."""
    figure = Figure(figsize=(3 + 0.8 * len(classes), 4), layout='tight')
    axis = figure.subplots()
    width = 0.8 / len(predicted)
    for i, (name, of_head) in enumerate(predicted.items()):
        shares = 100 * recall_score(labels, of_head, labels=range(len(classes)), average=None)
        axis.bar(np.arange(len(classes)) + i * width, shares, width, label=name)
    places = np.arange(len(classes)) + width * (len(predicted) - 1) / 2
    axis.set_xticks(places, classes, rotation=30 if len(classes) < 10 else 90)
    axis.set(ylabel='right (%)', ylim=(max(0, axis.dataLim.ymin), 100))
    axis.legend(fontsize=7, loc='center left', bbox_to_anchor=(1, 0.5))
    save_png(figure, path)


if __name__ == '__main__':
    run(main, Settings)
