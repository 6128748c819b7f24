"""Train `avg` and `sparse_fisher` on scikit-learn's handwritten digits, from scratch.

    python recipes/quickstart.py

Does for each head what `accelerate launch recipes/train.py --config recipes/configs/digits.yaml`
does, prints a table, and leaves in `--output` a model in sparse_fisher/model and an image to try it
on, digit.png. Called again, it shows the runs that are there; interrupted, it goes on with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from timm_fisher.training import command_line
from timm_fisher.training.launch import launch
from timm_fisher.training.tables import records

CONFIG = Path(__file__).parent / 'configs/digits.yaml'
HEADS = ('avg', 'sparse_fisher')


@dataclass
class Quickstart:
    """Train two heads on handwritten digits.

    Args:
        output: folder of the runs.
    """

    output: Path = Path('runs/quickstart')


def main(quickstart: Quickstart) -> None:
    output = quickstart.output
    settings = yaml.safe_load(CONFIG.read_text())
    rows = []
    for head in HEADS:
        print(f'\n== {head}', flush=True)
        metrics = launch({**settings, 'head': head}, output / head)
        rows.append({
            'head': head, 'test accuracy': f'{metrics["test"]["accuracy"]:.2%}',
            'pooled vector': metrics['out_features'], 'parameters': metrics['parameters'],
            'time': f'{sum(metrics["seconds"].values()):.0f} s',
        })  # fmt: skip

    pixels = (load_digits().images[0] * (255 / 16)).astype(np.uint8)
    Image.fromarray(pixels).save(output / 'digit.png')
    folder = output / HEADS[-1]
    print(f'\n{records(rows)}')
    print(f'\nThe model is in {folder}/model, its training curve in {folder}/curve.png.')


if __name__ == '__main__':
    command_line.run(main, Quickstart)
