"""Train several heads on one data set under identical conditions, and show what each brings.

    python recipes/compare.py --config recipes/configs/compare.yaml --data-dir PATH

Every run is one of recipes/train.py, with the same splits, seeds and budget. Each head's settings
are chosen from a grid by the validation accuracy of the first seed, and then run with all seeds;
the test split is only ever reported. A head that is trained may have a grid of its own.

Leaves in `--output`: table.md, results.json, plot.png (accuracy against size of the pooled vector)
and the runs; a comparison that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import multiprocessing
import os
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonargparse
import matplotlib
import yaml
from tqdm.auto import tqdm

from timm_fisher.files import save_png, write

matplotlib.use('Agg')
import matplotlib.pyplot as plt

# Each run is a process of its own, forked from one that has imported the packages once.
forks = 'forkserver' in multiprocessing.get_all_start_methods()
PROCESSES = multiprocessing.get_context('forkserver' if forks else 'spawn')
if forks:
    heavy = ['accelerate', 'jsonargparse', 'matplotlib.pyplot', 'sklearn.datasets', 'timm_fisher']
    PROCESSES.set_forkserver_preload(heavy)

# What every table must hold: timm's pool, and what the Fisher vectors' normalisation alone brings.
BASELINES: dict[str, dict[str, Any]] = {
    'avg': {'head': 'avg'},
    'avg + power_l2': {'head': 'avg', 'head_kwargs': {'normalize': True}},
}


@dataclass
class Comparison:
    """Compare heads on one data set.

    Args:
        output: folder of the comparison.
        data_dir: as train.py takes it; empty for that of `train`.
        seeds: of the runs; the first chooses the settings.
        only: names of variants to run, besides the baselines; empty for all.
        train: options of train.py for every run.
        search: options of train.py, dotted, and the values to choose from on the validation split.
        variants: by name in the table, options of train.py of its own; `search` among them
            replaces that of all.
    """

    output: str = 'runs/compare'
    data_dir: str = ''
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    only: list[str] = field(default_factory=list)
    train: dict[str, Any] = field(default_factory=dict)
    search: dict[str, list[Any]] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)


def main() -> None:
    parser = jsonargparse.ArgumentParser(description='Compare heads on one data set.')
    parser.add_argument('--config', action='config', help='YAML file of these options')
    parser.add_class_arguments(Comparison)
    arguments = [a.replace('--data-dir', '--data_dir') for a in sys.argv[1:]]
    parsed = parser.instantiate(parser.parse_args(arguments))
    comparison = Comparison(**{key: parsed[key] for key in Comparison.__dataclass_fields__})
    variants = {**BASELINES, **comparison.variants}
    unknown = set(comparison.only) - set(variants)
    if unknown:
        parser.error(f'--only names {sorted(unknown)}; the variants are {list(variants)}.')
    if not comparison.seeds or len(set(comparison.seeds)) < len(comparison.seeds):
        parser.error(f'seeds is {comparison.seeds}; give one or more, all different.')
    if comparison.data_dir:
        comparison.train['data_dir'] = comparison.data_dir
    if comparison.only:
        variants = {key: variants[key] for key in variants if key in {*BASELINES, *comparison.only}}

    output = Path(comparison.output)
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, variant in (progress := tqdm(variants.items(), disable=None)):
        progress.set_description(name)
        rows.append(compare_variant(name, variant, comparison, output))
        write_results(rows, comparison, output)
    print((output / 'table.md').read_text())


def compare_variant(
    name: str, variant: dict[str, Any], comparison: Comparison, output: Path
) -> dict[str, Any]:
    """Choose the settings of one head, run them with all seeds; a row of the table."""
    options = {**comparison.train, **variant}  # `stages` as a whole, too
    search = options.pop('search', comparison.search)
    folder = output / name.replace(' ', '').replace('/', '-')

    candidates = []
    for values in itertools.product(*search.values()):
        chosen = dict(zip(search, values, strict=True))
        candidates.append((chosen, run(options, chosen, comparison.seeds[0], folder)))
    # The first of equals: a grid is read from left to right.
    chosen, first = max(candidates, key=lambda each: each[1]['best']['val_accuracy'])
    metrics = [first, *(run(options, chosen, seed, folder) for seed in comparison.seeds[1:])]
    split = 'test' if 'test' in first else 'val'
    return {
        'name': name,
        'chosen': chosen,
        'tried': [
            {**values, 'val_accuracy': each['best']['val_accuracy']} for values, each in candidates
        ],
        'split': split,
        'val_accuracy': [each['best']['val_accuracy'] for each in metrics],
        'accuracy': [each[split]['accuracy'] for each in metrics],
        'balanced_accuracy': [each[split]['balanced_accuracy'] for each in metrics],
        'out_features': first['out_features'],
        'head_parameters': first['head_parameters'],
        'fit_seconds': [each['seconds']['fit'] for each in metrics],
        'step_milliseconds': [
            1000 * each['seconds']['train'] / max(1, each['steps']) for each in metrics
        ],
        'peak_memory_mb': [each['peak_memory_mb'] for each in metrics],
    }


def train(arguments: list[str], log: Path) -> None:
    """train.py with these arguments, in a process of its own; what it says goes to a file."""
    with open(log, 'w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.argv = ['train.py', *arguments]
        importlib.import_module('train').main()


def run(options: dict[str, Any], chosen: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """Metrics of one run of train.py, from before if it has been run with these options."""
    options = copy.deepcopy(options)
    for dotted, value in chosen.items():
        *path, last = dotted.split('.')
        inner = options
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = value
    label = '-'.join(
        [*(f'{key.split(".")[-1]}{value}' for key, value in chosen.items()), f's{seed}']
    )
    output = folder / label
    options |= {'output': str(output), 'seed': seed}
    file, metrics = folder / f'{label}.yaml', output / 'metrics.json'
    text = yaml.safe_dump(options, sort_keys=False)
    if metrics.exists():
        if file.read_text() != text:
            raise ValueError(
                f"'{output}' holds a run with other options, see {file}. Give another --output."
            )
        return json.loads(metrics.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    write(file, text)
    arguments = ['--config', str(file)]
    if (output / 'config.yaml').exists():
        arguments += ['--resume', 'true']
    log = folder / f'{label}.log'
    process = PROCESSES.Process(target=train, args=(arguments, log))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f'{output} failed, see {log}:\n{log.read_text()[-3000:]}')
    return json.loads(metrics.read_text())


def write_results(rows: list[dict[str, Any]], comparison: Comparison, output: Path) -> None:
    """table.md, results.json and plot.png of the rows so far."""
    write(output / 'table.md', table(rows, comparison))
    results = {'seeds': comparison.seeds, 'train': comparison.train, 'rows': rows}
    write(output / 'results.json', json.dumps(results, indent=2) + '\n')
    plot(rows, output / 'plot.png')


def table(rows: list[dict[str, Any]], comparison: Comparison) -> str:
    """Markdown; mean and standard deviation over the seeds."""
    split = rows[0]['split']
    lines = [
        f'| head | pooled vector | parameters | validation | {split} | {split}, balanced | fit | '
        'step | peak memory | chosen |',
        '|---|---:|---:|---:|---:|---:|---:|---:|---:|---|',
    ]
    for row in rows:
        chosen = ', '.join(f'{k.split(".")[-1]} {v}' for k, v in row['chosen'].items())
        lines.append(
            f'| {row["name"]} | {row["out_features"]} | {row["head_parameters"]} | '
            f'{percent(row["val_accuracy"])} | {percent(row["accuracy"])} | '
            f'{percent(row["balanced_accuracy"])} | {statistics.median(row["fit_seconds"]):.1f} s '
            f'| {statistics.median(row["step_milliseconds"]):.0f} ms | '
            f'{statistics.median(row["peak_memory_mb"]):.0f} MB | {chosen} |'
        )
    lines.append('')
    lines.append(
        f'Mean and standard deviation over seeds {", ".join(map(str, comparison.seeds))}. '
        'Parameters: of head and classifier. Step: of training, its share of validation included; '
        'where the head is frozen, that of the classifier alone. Peak memory: of the process, with '
        'the backbone where features were not cached yet. Settings chosen by the validation '
        'accuracy of the first seed.'
    )
    return '\n'.join(lines) + '\n'


def percent(values: list[float], digits: int = 1) -> str:
    """`91.2 ± 0.3` of accuracies; the sample's standard deviation."""
    mean = f'{100 * statistics.mean(values):.{digits}f}'
    return f'{mean} ± {100 * statistics.stdev(values):.{digits}f}' if len(values) > 1 else mean


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against size of the pooled vector, a dot for each head, bars of one deviation."""
    figure, axes = plt.subplots(figsize=(9, 5.5))
    for i, row in enumerate(rows):
        mean = 100 * statistics.mean(row['accuracy'])
        spread = 100 * statistics.stdev(row['accuracy']) if len(row['accuracy']) > 1 else 0.0
        colour = f'C{i % 10}'
        axes.errorbar(row['out_features'], mean, spread, fmt='o', capsize=3, color=colour)
        axes.annotate(
            row['name'], (row['out_features'], mean), xytext=(6, 4), textcoords='offset points',
            fontsize=8, color=colour,
        )  # fmt: skip
    axes.set(xscale='log', xlabel='pooled vector', ylabel=f'{rows[0]["split"]} accuracy (%)')
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    save_png(figure, path)


if __name__ == '__main__':
    main()
