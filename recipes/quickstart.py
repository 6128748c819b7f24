"""Train `avg` and `sparse_fisher` on scikit-learn's handwritten digits, from scratch.

    python recipes/quickstart.py

Does for each head what `accelerate launch recipes/train.py --config recipes/configs/digits.yaml`
does, prints a table, and leaves a model in runs/quickstart/sparse_fisher/model and an image to try
it on in runs/quickstart/digit.png.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from timm_fisher.training.launch import launch

CONFIG = Path(__file__).parent / 'configs/digits.yaml'
OUTPUT = Path('runs/quickstart')
HEADS = ('avg', 'sparse_fisher')


def main() -> None:
    """Train each head, and show what it brings."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    settings = yaml.safe_load(CONFIG.read_text())
    rows = []
    for head in HEADS:
        print(f'\n== {head}', flush=True)
        start = time.perf_counter()
        metrics = launch({**settings, 'head': head}, OUTPUT / head)
        rows.append((head, metrics, time.perf_counter() - start))

    pixels = (load_digits().images[0] * (255 / 16)).astype(np.uint8)
    Image.fromarray(pixels).save(OUTPUT / 'digit.png')

    print(f'\n{"head":<16}{"test accuracy":>14}{"pooled vector":>15}{"parameters":>12}{"time":>9}')
    for head, metrics, seconds in rows:
        print(
            f'{head:<16}{metrics["test"]["accuracy"]:>14.2%}{metrics["out_features"]:>15}'
            f'{metrics["parameters"]:>12}{seconds:>7.0f} s'
        )
    folder = OUTPUT / HEADS[-1]
    print(f'\nThe model is in {folder}/model, its training curve in {folder}/curve.png.')


if __name__ == '__main__':
    main()
