"""Accuracy of a saved or released model on a split of a data set.

    python recipes/evaluate.py --model NAME_OR_FOLDER_OR_HUB_ID --data-dir PATH

PATH is a folder with test/CLASS/IMAGE, or with the split that is asked for; or a file FILE.npz, as
recipes/train.py takes it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from predict import class_names, load_model
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from timm_fisher import PooledModel
from timm_fisher.training.config import Config
from timm_fisher.training.data import Split, create_datasets, load_folder, load_splits


def main() -> None:
    parser = argparse.ArgumentParser(description='Measure a model on a split of a data set.')
    parser.add_argument('--model', required=True, help='released name, folder or Hub id USER/NAME')
    parser.add_argument('--data-dir', required=True, help='folder of images, or FILE.npz')
    parser.add_argument('--split', default='test', choices=('train', 'val', 'test'))
    parser.add_argument('--backbone', help="local-dir:FOLDER of an adapter's backbone")
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--workers', type=int, default=2, help='processes that load images')
    args = parser.parse_args()
    try:
        model = load_model(args.model, args.backbone)
        result = evaluate(
            model, args.data_dir, args.split, batch_size=args.batch_size, workers=args.workers
        )
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    print(
        f'{args.model}, {args.split}: accuracy {result["accuracy"]:.2%}, balanced accuracy '
        f'{result["balanced_accuracy"]:.2%} of {result["samples"]} images'
    )


@torch.no_grad()
def evaluate(
    model: PooledModel, data_dir: str, split: str, *, batch_size: int = 32, workers: int = 2
) -> dict[str, Any]:
    """`accuracy`, `balanced_accuracy` and `samples` of a split, by the model's own preprocessing.

    Raises:
        ValueError: the model has no classes, there is no such split, or its classes are not those
            of the model.
    """
    class_names(model)  # refuses embeddings, and names that are not those of its classes
    images = load_split(data_dir, split, model)
    data_config = timm.data.resolve_model_data_config(model)
    dataset = create_datasets(Config(), {split: images}, data_config)[split]
    device = Accelerator().device
    model.to(device).eval()
    predicted, labels = [], []
    for x, y in tqdm(DataLoader(dataset, batch_size, num_workers=workers), split, disable=None):
        predicted += model(x.to(device)).argmax(1).tolist()
        labels += y.tolist()
    return {
        'accuracy': float(accuracy_score(labels, predicted)),
        'balanced_accuracy': float(balanced_accuracy_score(labels, predicted)),
        'samples': len(labels),
    }


def load_split(data_dir: str, split: str, model: PooledModel) -> Split:
    """The images of a split, labelled by the classes of a model."""
    names = model.pretrained_cfg.get('label_names') or None
    if data_dir.endswith('.npz'):
        if not Path(data_dir).is_file():
            raise ValueError(f"'{data_dir}' is no file.")
        splits, classes = load_splits(Config(data_dir=data_dir, dataset='npz'))
        images = splits[split]
    else:
        known = None if names is None else {name: i for i, name in enumerate(names)}
        images = load_folder(data_dir, split, known)
        index = images.dataset.reader.class_to_idx
        classes = sorted(index, key=index.__getitem__)
    if names is not None and classes != list(names):
        raise ValueError(
            f"The classes of '{data_dir}' are {classes}, those of the model {list(names)}."
        )
    if len(classes) != model.num_classes:
        raise ValueError(
            f"'{data_dir}' has the {len(classes)} classes {classes}; the model has "
            f'{model.num_classes}, without names.'
        )
    return images


if __name__ == '__main__':
    main()
