"""Accuracy of a saved or released model on a split of a data set.

    python recipes/evaluate.py --model NAME_OR_FOLDER_OR_HUB_ID --data-dir PATH

PATH is a folder with test/CLASS/IMAGE, or with the split that is asked for; or a file FILE.npz with
arrays x_test and y_test beside x_train and y_train. `--confusion FILE.png` draws what is taken for
what.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from sklearn.metrics import recall_score

from timm_fisher.explain import class_names
from timm_fisher.hub.pypi import from_pretrained_or_pypi
from timm_fisher.training.command_line import run
from timm_fisher.training.evaluate import accuracies, draw_confusion, predict
from timm_fisher.training.tables import records


@dataclass
class Evaluation:
    """Measure a model on a split of a data set.

    Args:
        model: released name, folder or Hub id USER/NAME.
        data_dir: folder of images, or FILE.npz.
        split: which of its splits.
        backbone: local-dir:FOLDER of an adapter's backbone.
        confusion: PNG file for the share of each class that is taken for each class.
        batch_size: images per step.
        workers: processes that load images.
    """

    model: str
    data_dir: str
    split: Literal['train', 'val', 'test'] = 'test'
    backbone: str | None = None
    confusion: Path | None = None
    batch_size: int = 32
    workers: int = 2


def main(settings: Evaluation) -> None:
    """Print accuracy, balanced accuracy and the share of each class that is right."""
    model = from_pretrained_or_pypi(settings.model, settings.backbone)
    model.to('cuda' if torch.cuda.is_available() else 'cpu')
    options = {'batch_size': settings.batch_size, 'workers': settings.workers}
    labels, predicted = predict(model, settings.data_dir, settings.split, **options)
    result = accuracies(labels, predicted)
    print(
        f'{settings.model}, {settings.split}: accuracy {result["accuracy"]:.2%}, balanced accuracy '
        f'{result["balanced_accuracy"]:.2%} of {result["samples"]} images'
    )
    names = class_names(model)
    shares = recall_score(
        labels, predicted, labels=range(len(names)), average=None, zero_division=np.nan
    )
    rows = zip(names, shares, np.bincount(labels, minlength=len(names)), strict=True)
    lines = [
        {'class': name, 'right': f'{share:.1%}' if n else '', 'images': n}
        for name, share, n in rows
    ]
    print(f'\n{records(lines)}')
    if settings.confusion:
        draw_confusion(labels, predicted, names, settings.confusion)


if __name__ == '__main__':
    run(main, Evaluation)
