"""How good a model is on a split of a data set."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.figure import Figure
from sklearn.metrics import (
    ConfusionMatrixDisplay,
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
)
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from timm_fisher import PooledModel
from timm_fisher.device import to_device
from timm_fisher.explain import class_names
from timm_fisher.files import save_png
from timm_fisher.training.arrays import array_names
from timm_fisher.training.config import Config
from timm_fisher.training.data import (
    Split,
    create_datasets,
    load_folder,
    load_splits,
    refuse_non_finite,
)


def accuracies(labels: Sequence[int], predicted: Sequence[int]) -> dict[str, Any]:
    """`accuracy`, the share that is right, `balanced_accuracy`, its mean over the classes that the
    labels have, and `samples`, the number of images."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # a class that no label of a split has
        balanced = balanced_accuracy_score(labels, predicted)
    return {
        'accuracy': float(accuracy_score(labels, predicted)),
        'balanced_accuracy': float(balanced),
        'samples': len(labels),
    }


def evaluate(
    model: PooledModel, data_dir: str, split: str, *, batch_size: int = 32, workers: int = 2
) -> dict[str, Any]:
    """`accuracies` of what `predict` gives, whose arguments and errors it has."""
    return accuracies(*predict(model, data_dir, split, batch_size=batch_size, workers=workers))


def predict(
    model: PooledModel, data_dir: str, split: str, *, batch_size: int = 32, workers: int = 2
) -> tuple[list[int], list[int]]:
    """Classes of the images of a split, and those that the model predicts, by its own
    preprocessing, on its device.

    Args:
        model: with a classifier.
        data_dir: folder with SPLIT/CLASS/IMAGE, or a file of arrays, FILE.npz, with x_test and
            y_test among them.
        split: 'train', 'val' or 'test', or the name of another subfolder.
        batch_size: images per step.
        workers: processes that load images.

    Raises:
        ValueError: the model has no classes, there is no such split, or its classes are not those
            of the model; an image that cannot be read, or for which the model's output is NaN.
    """
    class_names(model)  # refuses embeddings, and names that are not those of its classes
    images = _load_split(data_dir, split, model)
    data_config = timm.data.resolve_model_data_config(model)
    dataset = create_datasets(Config(), {split: images}, data_config)[split]
    device = next(model.parameters()).device
    loader = DataLoader(dataset, batch_size, num_workers=workers)
    was_training = model.training
    to_device(model, device).eval()
    predicted: list[int] = []
    try:
        for x, _ in tqdm(loader, split, disable=None):
            with torch.inference_mode():
                logits = model(x.to(device))
            places = range(len(predicted), len(predicted) + len(logits))
            refuse_non_finite(logits, dataset.name, places)
            predicted += logits.argmax(1).tolist()
    finally:
        model.train(was_training)
    return images.labels.tolist(), predicted


def draw_confusion(
    labels: Sequence[int], predicted: Sequence[int], names: Sequence[str], path: Path
) -> None:
    """Percent of each class (row) that is taken for each class."""
    size = 2 + 0.4 * len(names)
    figure = Figure(figsize=(size, size), layout='tight')
    counts = confusion_matrix(labels, predicted, labels=range(len(names)))
    shares = 100 * counts / counts.sum(1, keepdims=True).clip(1)
    ConfusionMatrixDisplay(shares, display_labels=names).plot(
        ax=figure.subplots(), cmap='Blues', values_format='.0f', xticks_rotation=90, colorbar=False
    )
    save_png(figure, path)


def _load_split(data_dir: str, split: str, model: PooledModel) -> Split:
    names = model.pretrained_cfg.get('label_names')
    if data_dir.endswith('.npz'):
        if split != 'test' or 'x_test' not in array_names(data_dir):
            raise ValueError(
                f"Of '{data_dir}' only test images in arrays of their own, x_test and y_test, can "
                f'be measured: which others were {split} images depended on the run, whose '
                'metrics.json has the accuracy.'
            )
        splits, classes = load_splits(Config(data_dir=data_dir, dataset='npz'))
        images = splits['test']
    else:
        known = {name: i for i, name in enumerate(names)} if names else None
        images = load_folder(data_dir, split, known)
        classes = list(images.dataset.reader.class_to_idx)
    if len(classes) != model.num_classes or (names and classes != list(names)):
        raise ValueError(
            f"'{data_dir}' has the {len(classes)} classes {classes}; the model has "
            f'{model.num_classes}, {list(names) if names else "without names"}.'
        )
    return images
