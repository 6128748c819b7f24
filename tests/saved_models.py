"""Saved models that tests damage, and ways to load them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import load_file, save_file

import timm_fisher

HEADS = {
    'sparse_fisher': {'code_dim': 3},
    '3g': {'reduce_dim': 8, 'blocks': 1},
    'gsnmf': {'components': 4},
    'dbm_idfk': {'hidden': [3, 2], 'rank': 4},
}
LOADERS = {
    'from_pretrained': timm_fisher.from_pretrained,
    'timm': lambda folder: timm.create_model(f'local-dir:{folder}', pretrained=True),
    'without weights': lambda folder: timm.create_model(f'local-dir:{folder}'),
}
Change = Callable[[dict[str, Any]], Any]


def write_originals(folder: Path) -> Path:
    """A saved model of each head, with five classes."""
    for head, arguments in HEADS.items():
        model = timm_fisher.create_model('test_resnet', head=head, num_classes=5, **arguments)
        timm_fisher.save_model(model, folder / head, label_names=list('abcde'))
    return folder


def edit(folder: Path, change: Change) -> None:
    """Change the content of config.json."""
    config = json.loads((folder / 'config.json').read_text())
    change(config)
    (folder / 'config.json').write_text(json.dumps(config))


def edit_weights(folder: Path, change: Change) -> None:
    """Change the tensors of model.safetensors."""
    weights = load_file(folder / 'model.safetensors')
    change(weights)
    save_file(weights, folder / 'model.safetensors')


def set_at(*path_and_value: Any) -> Change:
    """A change of a config: `set_at('model_args', 'head', 'x')`."""
    *path, last, value = path_and_value

    def change(config: dict[str, Any]) -> None:
        for key in path:
            config = config[key]
        config[last] = value

    return change


def argument(name: str, value: Any) -> Change:
    """A change of an argument of the model."""
    return set_at('model_args', name, value)


def without_backbone(folder: Path, **backbone_weights: str | None) -> None:
    """Make a saved model an adapter."""

    def drop(weights: dict[str, Any]) -> None:
        for key in [key for key in weights if key.startswith('backbone.')]:
            del weights[key]

    edit_weights(folder, drop)
    edit(folder, argument('backbone_weights', backbone_weights))


_MEASURE = """
import json, resource, sys, time
import timm, torch, timm_fisher

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

calls = {
    'from_pretrained': timm_fisher.from_pretrained,
    'timm': lambda folder: timm.create_model('local-dir:' + folder, pretrained=True),
    'without weights': lambda folder: timm.create_model('local-dir:' + folder),
}
calls[sys.argv[1]](sys.argv[2])
for folder in sys.argv[3:]:
    before, start = peak(), time.perf_counter()
    try:
        calls[sys.argv[1]](folder)
        error = ''
    except timm_fisher.LoadError as caught:
        error = str(caught)
    print(json.dumps([error, peak() - before, time.perf_counter() - start]), flush=True)
"""


def measure_loading(load: str, good: Path, folders: list[Path]) -> list[tuple[str, int, float]]:
    """Error, growth of memory in bytes, and seconds of loading each folder, in a process of its
    own: what this process has held before would hide the growth.

    Args:
        load: a key of `LOADERS`.
        good: a folder that is loaded first, for whatever is needed once.
        folders: that are measured.
    """
    done = subprocess.run(
        [sys.executable, '-c', _MEASURE, load, *map(str, [good, *folders])],
        check=True,
        capture_output=True,
        text=True,
        timeout=60 + 10 * len(folders),
        env={**os.environ, 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'},
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def copy(source: Path, target: Path) -> Path:
    """A saved model that a test may damage."""
    return Path(shutil.copytree(source, target))
