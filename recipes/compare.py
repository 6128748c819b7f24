"""Train several heads on one data set under identical conditions, and show what each brings.

    python recipes/compare.py --config recipes/configs/compare.yaml --data-dir PATH

Every run is one of recipes/train.py, with the same splits, seeds and budget. Each head's settings
are chosen from a grid by the validation accuracy of the first seed, and then run with all seeds;
the test split is only ever reported. A head that is trained may have a grid of its own.

Leaves in `--output`: table.md, results.json, plot.png (accuracy against size of the pooled vector)
and the runs; a comparison that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm.auto import tqdm

from timm_fisher.files import save_png, write
from timm_fisher.training import command_line
from timm_fisher.training.embeddings import parse_options
from timm_fisher.training.launch import launch
from timm_fisher.training.tables import percent, records

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

    def __post_init__(self) -> None:
        self.variants = {**BASELINES, **self.variants}
        unknown = set(self.only) - set(self.variants)
        if unknown:
            raise ValueError(
                f'--only names {sorted(unknown)}; the variants are {list(self.variants)}.'
            )
        command_line.check_lists(self, 'seeds')
        if self.data_dir:
            self.train = {**self.train, 'data_dir': self.data_dir}
        kept = {*BASELINES, *(self.only or self.variants)}
        self.variants = {name: self.variants[name] for name in self.variants if name in kept}


def main(comparison: Comparison) -> None:
    """Run all variants, writing the results so far after each of them."""
    for name, variant in comparison.variants.items():
        options, grid = split_options(variant, comparison)
        if parse_options(options, {key: values[0] for key, values in grid.items()}).unsupervised:
            raise ValueError(
                f"All stages of '{name}' are unsupervised; heads are compared by the accuracy of a "
                'classifier. Add a stage that trains it.'
            )
    output = Path(comparison.output)
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, variant in (progress := tqdm(comparison.variants.items(), disable=None)):
        progress.set_description(name)
        rows.append(compare_variant(name, variant, comparison, output))
        write_results(rows, comparison, output)
    print((output / 'table.md').read_text())


def compare_variant(
    name: str, variant: dict[str, Any], comparison: Comparison, output: Path
) -> dict[str, Any]:
    """Choose the settings of one head, run them with all seeds; a row of the table."""
    options, grid = split_options(variant, comparison)
    folder = output / name.replace(' ', '').replace('/', '-')
    tried = []
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        metrics = run(options, settings, folder, seed=comparison.seeds[0])
        tried.append({**settings, 'val_accuracy': metrics['best']['val_accuracy']})
    best = max(tried, key=lambda row: row['val_accuracy'])  # the first of equals
    chosen = {key: best[key] for key in grid}
    runs = [run(options, chosen, folder, seed=seed) for seed in comparison.seeds]
    split = 'test' if 'test' in runs[0] else 'val'
    return {
        'name': name,
        'chosen': chosen,
        'tried': tried,
        'split': split,
        'val_accuracy': [metrics['best']['val_accuracy'] for metrics in runs],
        'accuracy': [metrics[split]['accuracy'] for metrics in runs],
        'balanced_accuracy': [metrics[split]['balanced_accuracy'] for metrics in runs],
        'out_features': runs[0]['out_features'],
        'head_parameters': runs[0]['head_parameters'],
        'fit_seconds': [metrics['seconds']['fit'] for metrics in runs],
        'step_milliseconds': [
            1000 * metrics['seconds']['train'] / max(1, metrics['steps']) for metrics in runs
        ],
        'peak_memory_mb': [metrics['peak_memory_mb'] for metrics in runs],
    }


def split_options(
    variant: dict[str, Any], comparison: Comparison
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Options of the runs of a variant, and the grid that its settings are chosen from."""
    options = {**comparison.train, **variant}  # `stages` as a whole, too
    grid = options.pop('search', comparison.search)
    return options, grid


def run(
    options: dict[str, Any], settings: dict[str, Any], folder: Path, *, seed: int
) -> dict[str, Any]:
    """Metrics of a run with some options replaced; its folder is named after them, its output goes
    to a .log beside."""
    config = asdict(parse_options({**options, 'seed': seed}, settings))
    words = [f'{key.split(".")[-1]}{value}' for key, value in settings.items()]
    output = folder / '-'.join([*words, f's{seed}'])
    return launch(config, output, log=Path(f'{output}.log'))


def write_results(rows: list[dict[str, Any]], comparison: Comparison, output: Path) -> None:
    """table.md, results.json and plot.png of the rows so far."""
    write(output / 'table.md', describe(rows, comparison.seeds))
    results = {'seeds': comparison.seeds, 'train': comparison.train, 'rows': rows}
    write(output / 'results.json', json.dumps(results, indent=2) + '\n')
    plot(rows, output / 'plot.png')


def describe(rows: list[dict[str, Any]], seeds: list[int]) -> str:
    """Markdown; mean and standard deviation over the seeds."""
    split = rows[0]['split']
    lines = [
        {
            'head': row['name'],
            'pooled vector': row['out_features'],
            'parameters': row['head_parameters'],
            'validation': percent(row['val_accuracy']),
            split: percent(row['accuracy']),
            f'{split}, balanced': percent(row['balanced_accuracy']),
            'fit': f'{statistics.median(row["fit_seconds"]):.1f} s',
            'step': f'{statistics.median(row["step_milliseconds"]):.0f} ms',
            'peak memory': f'{statistics.median(row["peak_memory_mb"]):.0f} MB',
            'chosen': ', '.join(f'{k.split(".")[-1]} {v}' for k, v in row['chosen'].items()),
        }
        for row in rows
    ]
    note = (
        f'Mean and standard deviation over seeds {", ".join(map(str, seeds))}. Parameters: of head '
        'and classifier. Step: of training, its share of validation included; where the head is '
        'frozen, that of the classifier alone. Peak memory: of the process, with the backbone '
        'where features were not cached yet. Settings chosen by the validation accuracy of the '
        'first seed.'
    )
    return f'{records(lines)}\n\n{note}\n'


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against size of the pooled vector, with bars of one standard deviation."""
    figure = Figure(figsize=(9, 5.5), layout='tight')
    axes = figure.subplots()
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
    save_png(figure, path)


if __name__ == '__main__':
    command_line.run(main, Comparison)
