"""Accuracy of a saved or released model on a split of a data set.

    python recipes/evaluate.py --model NAME_OR_FOLDER_OR_HUB_ID --data-dir PATH

PATH is a folder with test/CLASS/IMAGE, or with the split that is asked for; or a file FILE.npz, as
recipes/train.py takes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from timm_fisher.hub.pypi import from_pretrained_or_pypi
from timm_fisher.training.command_line import run
from timm_fisher.training.evaluate import evaluate


@dataclass
class Evaluation:
    """Measure a model on a split of a data set.

    Args:
        model: released name, folder or Hub id USER/NAME.
        data_dir: folder of images, or FILE.npz.
        split: which of its splits.
        backbone: local-dir:FOLDER of an adapter's backbone.
        batch_size: images per step.
        workers: processes that load images.
    """

    model: str
    data_dir: str
    split: Literal['train', 'val', 'test'] = 'test'
    backbone: str | None = None
    batch_size: int = 32
    workers: int = 2


def main(settings: Evaluation) -> None:
    """Print accuracy and balanced accuracy."""
    model = from_pretrained_or_pypi(settings.model, settings.backbone)
    model.to('cuda' if torch.cuda.is_available() else 'cpu')
    options = {'batch_size': settings.batch_size, 'workers': settings.workers}
    result = evaluate(model, settings.data_dir, settings.split, **options)
    print(
        f'{settings.model}, {settings.split}: accuracy {result["accuracy"]:.2%}, balanced accuracy '
        f'{result["balanced_accuracy"]:.2%} of {result["samples"]} images'
    )


if __name__ == '__main__':
    run(main, Evaluation)
