"""Compare pooled vectors for search: as they are, projected, whitened, and trained for it.

    python recipes/compare_retrieval.py --config recipes/configs/retrieval.yaml --data-dir PATH \
        --output runs/retrieval

Each image of the test split is searched among the others. For every head:

    full      its vectors on the frozen backbone, fitted to the training images
    PCA       the same, by the principal components of the training images
    whitened  likewise, divided by the deviations of the components to the power among
              `whiten` that has the best MAP@R on the validation images
    trained   a projection of the same size, with the head if it has parameters, trained by the
              stages of the configuration, with settings that had the best recall@1 there

Beside them is what a vector takes as float32, and the time of pooling the backbone's features on
this machine, a pass over the test images (their mean, on features that are kept).

The classes of val/ and test/ need not be those of train/. FILE.npz, of images `x` and classes `y`,
is cut so: the first half of the classes is trained on, the next quarter validates, the others are
searched. Its images are written to `--output` for that.

Leaves in `--output`: table.md, measurements.jsonl and the models of training; interrupted, it goes
on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from timm_fisher.files import keep_settings, write
from timm_fisher.layers import Projection, whitening
from timm_fisher.retrieval import evaluate_retrieval
from timm_fisher.training import command_line, embeddings
from timm_fisher.training.arrays import read_arrays, to_pixels
from timm_fisher.training.benchmark import timed
from timm_fisher.training.data import Split, load_splits
from timm_fisher.training.launch import combinations, file_name, launch, run_folder
from timm_fisher.training.measurements import (
    Measurement,
    table_name,
    table_of,
)
from timm_fisher.training.report import data_name
from timm_fisher.training.rows import read_rows, write_rows

MEASURES = {'recall_at_1': 'recall@1', 'map_at_r': 'MAP@R'}


@dataclass
class Comparison:
    """Compare heads for search on one data set.

    Args:
        output: folder of the comparison.
        data_dir: folder with train, val and test, or FILE.npz.
        seeds: of the training; the first chooses its settings.
        size: dimensions after the projection.
        whiten: strengths to choose from.
        train: options of train.py for every run; its stages train for search.
        search: options of train.py, dotted, and the values to choose from by recall@1 on the
            validation images.
        heads: by name in the table, options of train.py of its own.
    """

    output: str = 'runs/retrieval'
    data_dir: str = ''
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    size: int = 256
    whiten: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75, 1.0])
    train: dict[str, Any] = field(default_factory=dict)
    search: dict[str, list[Any]] = field(default_factory=dict)
    heads: dict[str, dict[str, Any]] = field(default_factory=lambda: {'avg': {'head': 'avg'}})

    def __post_init__(self) -> None:
        command_line.check_lists({'seeds': self.seeds, 'whiten': self.whiten, **self.search})
        if self.data_dir:
            folder, data = self.data_dir, Path(self.data_dir)
            if data.suffix == '.npz':
                folder = str(Path(self.output, data.stem))
            self.train = {**self.train, 'data_dir': folder}
        if not self.train.get('data_dir'):
            raise ValueError('No images are given; say --data-dir FOLDER or FILE.npz.')


def main(comparison: Comparison) -> None:
    heads = {name: {**comparison.train, **own} for name, own in comparison.heads.items()}
    trained = {name: {**own, 'projection': comparison.size} for name, own in heads.items()}
    for name, options in trained.items():
        if embeddings.parse_options(options).classifies:
            raise ValueError(
                f"A stage of '{name}' trains a classifier. Give each a loss of metric learning."
            )
    output = Path(comparison.output)
    free = ('output', 'seeds', 'heads', 'search')
    settings = {k: v for k, v in vars(comparison).items() if k not in free}
    keep_settings(output, settings)
    folder = Path(comparison.train['data_dir'])
    if comparison.data_dir.endswith('.npz') and not folder.exists():
        write_by_classes(Path(comparison.data_dir), folder)
    measured: list[Measurement] = []
    for name in heads:
        path, options = output / f'{file_name(name)}.jsonl', trained[name]
        frozen = {**heads[name], 'whiten': 0.0, 'seed': comparison.seeds[0]}
        if not path.exists():
            write_rows(measure_frozen(name, frozen, comparison), path)
        keep_settings(output / file_name(name), frozen)
        measured += read_rows(path, Measurement)
        for seed, settings, metrics in train(name, options, comparison):
            about = {
                'settings': {key.split('.')[-1]: value for key, value in settings.items()},
                'commit': metrics['commit'],
            }
            row, found = f'{name}, trained', metrics['test']
            measured.append(measurement(options, row, seed, found, comparison.size, **about))
        write_rows(measured, output / 'measurements.jsonl')
        write(output / 'table.md', f'{table_of(measured)}\n')
    print((output / 'table.md').read_text())


def train(
    name: str, options: dict[str, Any], comparison: Comparison
) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """Seed, settings and metrics of the runs with the settings that validated best."""

    def run(settings: dict[str, Any], seed: int) -> dict[str, Any]:
        config = embeddings.parse_options({**options, 'seed': seed}, settings)
        folder = run_folder(Path(comparison.output), name, settings, seed)
        return launch(asdict(config), folder, log=Path(f'{folder}.log'))

    tried = combinations(comparison.search)
    first, *others = comparison.seeds
    found = [run(settings, first) for settings in tried]
    best = int(np.argmax([metrics['best']['val_recall_at_1'] for metrics in found]))
    yield first, tried[best], found[best]
    for seed in others:
        yield seed, tried[best], run(tried[best], seed)


def write_by_classes(file: Path, folder: Path) -> None:
    """Images of a file of arrays as train/, val/ and test/, which share no class."""
    arrays = read_arrays(str(file))
    if not {'x', 'y'} <= set(arrays):
        raise ValueError(f"'{file}' must hold x and y; it has {sorted(arrays)}.")
    images = to_pixels(arrays['x'], arrays['x'].max(initial=0), f"'x' in '{file}'")
    classes, y = np.unique(arrays['y'], return_inverse=True)  # of texts no path is made
    partial = folder.with_name(f'{folder.name}.partial')
    for i, (pixels, label) in enumerate(zip(images, y, strict=True)):
        place = label / len(classes)
        split = 'train' if place < 0.5 else 'val' if place < 0.75 else 'test'
        path = partial / split / str(label) / f'{i:05}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    partial.rename(folder)


def measurement(
    options: dict[str, Any], row: str, seed: int, found: dict[str, float], size: int, **about: Any
) -> Measurement:
    """A line of the table, of vectors of some size; with other attributes of it."""
    table = table_name('retrieval', data_name(embeddings.parse_options(options)))
    shares = {title: found[key] for key, title in MEASURES.items()}
    costs = {'dimensions': float(size), 'KB': size * 4 / 1024, **about.pop('costs', {})}
    return Measurement(table, row, seed, shares, costs=costs, **about)


def measure_frozen(
    name: str, options: dict[str, Any], comparison: Comparison
) -> Iterator[Measurement]:
    """Lines of a head on the frozen backbone."""
    config = embeddings.parse_options(options)
    splits, _ = load_splits(config)
    model = embeddings.create_embedder(config)
    features = embeddings.cache_splits(model, splits, config)
    embeddings.fit_once(model, features['train'], None, config)
    vectors = {
        split: torch.from_numpy(embeddings.head_vectors(model, part)).float()
        for split, part in features.items()
    }
    seconds, _ = timed(lambda: embeddings.head_vectors(model, features['test']))
    pooling = {'ms': 1000 * seconds / len(vectors['test'])}
    line = partial(measurement, options, seed=config.seed)
    found, size = found_among(vectors['test'], splits['test']), vectors['test'].shape[1]
    yield line(f'{name}, full', found=found, size=size, costs=pooling)

    projection = Projection(size, comparison.size)
    projection.fit(vectors['train'], 0.0)
    with torch.no_grad():
        projected = {split: projection(x) for split, x in vectors.items()}
    variances = projected['train'].var(0)

    def whitened(split: str, strength: float) -> dict[str, float]:
        x = projected[split] * whitening(variances, strength)
        return found_among(F.normalize(x), splits[split])

    yield line(f'{name}, PCA', found=whitened('test', 0.0), size=comparison.size)
    of_validation = [whitened('val', strength)['map_at_r'] for strength in comparison.whiten]
    best = comparison.whiten[int(np.argmax(of_validation))]
    found, chosen = whitened('test', best), {'power': best}
    yield line(f'{name}, whitened', found=found, size=comparison.size, settings=chosen)


def found_among(vectors: Tensor, split: Split) -> dict[str, float]:
    """Each image among the others."""
    return evaluate_retrieval(vectors, split.labels, ks=(1,))


if __name__ == '__main__':
    command_line.run(main, Comparison)
