"""The images of a folder that are most like others, by the vectors of a saved or released model.

    python recipes/retrieve.py --model NAME_OR_FOLDER_OR_HUB_ID --gallery FOLDER \\
        --index runs/index --queries '[a.jpg, b.jpg]'

Leaves the vectors of the gallery in `--index`: the next call embeds new and changed images alone,
and one that was interrupted, or killed, continues. Prints the nearest images of each query and
leaves them in `--output`, in results.csv and contact.png. `--evaluate true` takes the name of its
folder as the label of each image, and prints and leaves, in metrics.json, how good the ranking is:
of each image among all others, or of the images of `--queries_dir` among those of the gallery. The
exit status is 1 if an image cannot be read, or the model has no vector for it.

Cells of results.csv that a spreadsheet would take for a formula begin with an apostrophe.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from timm_fisher import PooledModel
from timm_fisher.device import to_device
from timm_fisher.files import save_png, write
from timm_fisher.hub.pypi import from_pretrained_or_pypi
from timm_fisher.hub.text import csv_cell, shown
from timm_fisher.images import read_image
from timm_fisher.retrieval.index import Index, embed_files, list_images, update_index
from timm_fisher.retrieval.metrics import evaluate_retrieval
from timm_fisher.retrieval.search import Search
from timm_fisher.training.command_line import run
from timm_fisher.training.tables import records

MOST_ROWS, MOST_COLUMNS = 20, 10  # of the contact sheet
SIDE = 224  # pixels


@dataclass
class Settings:
    """Find the images of a folder that are most like others, or measure how well that works.

    Args:
        model: released name, folder or Hub id USER/NAME.
        gallery: folder of the images that are searched, with its subfolders.
        index: folder of their vectors, which are kept.
        queries: image files.
        topk: images to show for each.
        evaluate: measure the ranking; the label of an image is the name of its folder.
        queries_dir: folder of queries for that; by default each image of the gallery is one.
        output: folder of results.
        backbone: source of an adapter's backbone, such as local-dir:FOLDER.
        batch_size: images per step.
        workers: processes that load images.
    """

    model: str
    gallery: str
    index: Path
    queries: list[str] = field(default_factory=list)
    topk: int = 8
    evaluate: bool = False
    queries_dir: str | None = None
    output: Path = Path('runs/retrieve')
    backbone: str | None = None
    batch_size: int = 32
    workers: int = 2

    def __post_init__(self) -> None:
        if self.topk < 1:
            raise ValueError(f'--topk is {self.topk}; give 1 or more.')
        if self.queries_dir is not None and not self.evaluate:
            raise ValueError('--queries_dir is for --evaluate true; give files as --queries.')


def main(settings: Settings) -> None:
    for folder in filter(None, (settings.gallery, settings.queries_dir)):
        if Path(os.path.realpath(settings.output)).is_relative_to(os.path.realpath(folder)):
            raise ValueError(
                f"--output '{shown(settings.output)}' is in '{shown(folder)}': its pictures would "
                'be images to search. Give another.'
            )
    if settings.queries_dir is not None:
        folder = os.path.realpath(settings.queries_dir)
        if Path(folder).is_relative_to(os.path.realpath(settings.gallery)):
            raise ValueError(
                f"--queries_dir '{shown(settings.queries_dir)}' is in the gallery: each query "
                'would find itself. Leave it out: each image is searched among the others then.'
            )
    queries = [Path(query) for query in settings.queries]
    for path in queries:
        if not path.exists():
            raise ValueError(f"There is no file '{shown(path)}'.")
    model = from_pretrained_or_pypi(settings.model, settings.backbone)
    to_device(model, 'cuda' if torch.cuda.is_available() else 'cpu').eval()
    gallery = Path(settings.gallery)
    options: Any = {'batch_size': settings.batch_size, 'workers': settings.workers}
    index, problems = update_index(settings.index, gallery, model, **options)
    _warn(problems)
    print(f'{len(index.files)} images of {shown(gallery)} in {shown(settings.index)}')
    settings.output.mkdir(parents=True, exist_ok=True)
    if queries:
        problems += _search(model, queries, index, gallery, settings)
    if settings.evaluate:
        problems += _evaluate(model, index, settings)
    if problems:
        sys.exit(1)


def _embed(
    model: PooledModel, paths: Sequence[Path], batch_size: int, workers: int = 0
) -> tuple[dict[Path, Tensor], list[str]]:
    """Vectors of queries; what was skipped is printed."""
    vectors: dict[Path, Tensor] = {}
    problems = []
    batches = [paths[i : i + batch_size] for i in range(0, len(paths), batch_size)]
    for embedded, wrong in embed_files(model, batches, workers):
        vectors |= embedded
        problems += wrong
    _warn(problems)
    return vectors, problems


def _search(
    model: PooledModel, queries: Sequence[Path], index: Index, gallery: Path, settings: Settings
) -> list[str]:
    """Print, write and draw the nearest images; what is wrong with queries that were skipped."""
    vectors, problems = _embed(model, queries, settings.batch_size)
    table = [('query', 'rank', 'image', 'similarity')]
    rows: dict[Path, list[tuple[Path, float]]] = {}
    if vectors:
        paths = [gallery / path for path in index.files]
        nearest = Search(index.vectors)(torch.stack([*vectors.values()]), settings.topk)
        for query, values, places in zip(vectors, *map(Tensor.tolist, nearest), strict=True):
            rows[query] = [(paths[i], value) for i, value in zip(places, values, strict=True)]
            print(shown(query), *(f'  {v:.4f}  {shown(p)}' for p, v in rows[query]), sep='\n')
            for rank, (path, value) in enumerate(rows[query], 1):
                cells = csv_cell(shown(query)), str(rank), csv_cell(shown(path)), f'{value:.6f}'
                table.append(cells)
        _draw(rows, settings.output / 'contact.png')
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(table)
    write(settings.output / 'results.csv', text.getvalue())
    print(f'-> {shown(settings.output)}')
    return problems


def _draw(rows: dict[Path, list[tuple[Path, float]]], path: Path) -> None:
    """A row for each query, at most `MOST_ROWS`: the query, then its nearest images."""
    chosen = dict(list(rows.items())[:MOST_ROWS])
    columns = 1 + min(MOST_COLUMNS, max(map(len, chosen.values())))
    figure = Figure(figsize=(1.5 * columns, 1.8 * len(chosen)), layout='constrained')
    axes = figure.subplots(len(chosen), columns, squeeze=False)
    for (query, nearest), line in zip(chosen.items(), axes, strict=True):
        cells = [(query, 'query'), *((image, f'{value:.3f}') for image, value in nearest)]
        for (image, title), axis in zip(cells, line, strict=False):
            picture = read_image(image)
            picture.thumbnail((SIDE, SIDE))
            axis.imshow(picture)
            axis.set_title(title, fontsize=8)
        for axis in line:
            axis.axis('off')
    save_png(figure, path)


def _evaluate(model: PooledModel, index: Index, settings: Settings) -> list[str]:
    """Print and write the metrics; what is wrong with queries that were skipped."""
    problems: list[str] = []
    labels = _labels(index.files, settings.gallery)
    if settings.queries_dir is None:
        metrics = evaluate_retrieval(index.vectors, labels)
    else:
        folder = Path(settings.queries_dir)
        paths = [folder / path for path in list_images(folder)]
        vectors, problems = _embed(model, paths, settings.batch_size, settings.workers)
        if not vectors:
            raise ValueError(f"No image of '{shown(folder)}' can be embedded.")
        names = [path.relative_to(folder).as_posix() for path in vectors]
        of_queries = _labels(names, settings.queries_dir)
        queries = torch.stack([*vectors.values()])
        metrics = evaluate_retrieval(queries, of_queries, index.vectors, labels)
    write(settings.output / 'metrics.json', json.dumps(metrics, indent=2) + '\n')
    print(records([{'metric': name, 'value': value} for name, value in metrics.items()]))
    return problems


def _labels(paths: Iterable[str], folder: str) -> list[str]:
    """Names of the folders that images are in, as timm reads them."""
    labels = {path: PurePosixPath(path).parent.name for path in paths}
    without = [path for path, label in labels.items() if not label]
    if without:
        raise ValueError(
            f"'{shown(without[0])}' of '{shown(folder)}' is in no subfolder, whose name would be "
            'its label.'
        )
    return [*labels.values()]


def _warn(problems: Sequence[str]) -> None:
    for problem in problems:
        print(f'Skipped: {shown(problem)}', file=sys.stderr)


if __name__ == '__main__':
    run(main, Settings)
