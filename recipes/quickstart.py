"""Train `avg` and `sparse_fisher` on scikit-learn's handwritten digits, from scratch, on a CPU.

    python recipes/quickstart.py

Runs `accelerate launch recipes/train.py --config recipes/configs/digits.yaml` once for each head,
prints a table, and leaves a model in runs/quickstart/sparse_fisher/model and an image to try it on
in runs/quickstart/digit.png.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

RECIPES = Path(__file__).parent
OUTPUT = Path('runs/quickstart')
HEADS = ('avg', 'sparse_fisher')


def main() -> None:
    shutil.rmtree(OUTPUT, ignore_errors=True)
    rows = []
    for head in HEADS:
        print(f'\n== {head}', flush=True)
        start = time.perf_counter()
        subprocess.run(
            [
                *(sys.executable, '-m', 'accelerate.commands.launch'),
                # What `accelerate launch` would otherwise say that it assumes.
                *('--cpu', '--num_processes', '1', '--num_machines', '1'),
                *('--mixed_precision', 'no', '--dynamo_backend', 'no'),
                *('--num_cpu_threads_per_process', str(os.cpu_count())),
                *(str(RECIPES / 'train.py'), '--config', str(RECIPES / 'configs/digits.yaml')),
                *('--head', head, '--output', str(OUTPUT / head)),
            ],
            check=True,
        )
        metrics = json.loads((OUTPUT / head / 'metrics.json').read_text())
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
