"""Settings of a training run, chosen from a grid by validation accuracy."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm_fisher.training.launch import launch


def grid(search: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations of values, the last option varying fastest; one empty one of no options."""
    return [
        dict(zip(search, values, strict=True)) for values in itertools.product(*search.values())
    ]


def choose(
    options: Mapping[str, Any], search: Mapping[str, Sequence[Any]], folder: Path, *, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run each combination with one seed, and choose the one that validates best, the first of
    equals.

    Args:
        options: of `timm_fisher.training`, for all runs.
        search: dotted options, such as `stages.NAME.lr`, and the values to choose from.
        folder: of the runs; a search that was interrupted goes on there.
        seed: of the runs.

    Returns:
        What was chosen, and all combinations, each with its `val_accuracy`.
    """
    tried = []
    for settings in grid(search):
        metrics = run(options, settings, folder, seed=seed)
        tried.append({**settings, 'val_accuracy': metrics['best']['val_accuracy']})
    best = max(tried, key=lambda row: row['val_accuracy'])
    return {key: best[key] for key in search}, tried


def run(
    options: Mapping[str, Any], settings: Mapping[str, Any], folder: Path, *, seed: int
) -> dict[str, Any]:
    """Metrics of the run of one combination and seed, from before if it has been run; its folder is
    named after them, its output goes to a .log beside."""
    options = with_settings(options, settings)
    words = [f'{key.split(".")[-1]}{value}' for key, value in settings.items()]
    output = folder / '-'.join([*words, f's{seed}'])
    return launch({**options, 'seed': seed}, output, log=Path(f'{output}.log'))


def with_settings(options: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options with some values replaced; a dotted name is one of a nested table."""
    changed = copy.deepcopy(dict(options))
    for dotted, value in settings.items():
        *path, last = dotted.split('.')
        table = changed
        for key in path:
            table = table.setdefault(key, {})
        table[last] = value
    return changed
