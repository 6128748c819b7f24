"""Train several heads on one data set under identical conditions, and show what each brings.

    python recipes/compare.py --config recipes/configs/compare.yaml --data-dir PATH

Every run is one of recipes/train.py, with the same splits, seeds and budget. Each head's settings
are chosen from a grid by the validation accuracy of the first seed, and then run with all seeds;
the test split is only ever reported. A head that is trained may have a grid of its own. With
`one_pass`, as in configs/probe.yaml, heads and settings are trained side by side on the cached
features of a frozen backbone, which is much faster; their models are not kept.

Leaves in `--output`: table.md, results.json, plot.png (accuracy against size of the pooled vector)
and the runs; a comparison that was interrupted goes on where it stopped, at the last run or pass.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from timm_fisher.files import save_png, write
from timm_fisher.training import command_line
from timm_fisher.training.config import Config
from timm_fisher.training.embeddings import parse_options
from timm_fisher.training.launch import launch
from timm_fisher.training.probe import train_probes
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
        one_pass: train all heads and settings of a seed side by side, as
            `timm_fisher.training.probe.train_probes` does.
        train: options of train.py for every run.
        search: options of train.py, dotted, and the values to choose from on the validation split.
        variants: by name in the table, options of train.py of its own; `search` among them
            replaces that of all.
    """

    output: str = 'runs/compare'
    data_dir: str = ''
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    only: list[str] = field(default_factory=list)
    one_pass: bool = False
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
    # All together where they share a pass, else one by one.
    names = list(comparison.variants)
    for group in [names] if comparison.one_pass else [[name] for name in names]:
        rows += compare_variants(group, comparison, output)
        write_results(rows, comparison, output)
    print((output / 'table.md').read_text())


def compare_variants(
    names: list[str], comparison: Comparison, output: Path
) -> list[dict[str, Any]]:
    """Choose the settings of some heads, run them with all seeds; rows of the table."""
    first, *others = comparison.seeds
    searched = [Run(name, values) for name in names for values in settings_of(name, comparison)]
    results = measure(searched, first, comparison, output)
    tried: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for run, metrics in zip(searched, results, strict=True):
        row = {**run.settings, 'val_accuracy': metrics['best']['val_accuracy']}
        tried[run.name].append({**row, 'diverged': metrics.get('diverged', False)})
    # The first of equals.
    best = [max(tried[name], key=lambda row: row['val_accuracy']) for name in names]
    chosen = [
        Run(name, {key: row[key] for key in row if key not in ('val_accuracy', 'diverged')})
        for name, row in zip(names, best, strict=True)
    ]
    seeds = [[results[searched.index(run)] for run in chosen]]
    seeds += [measure(chosen, seed, comparison, output) for seed in others]
    return [
        describe_runs(run, tried[run.name], list(metrics))
        for run, *metrics in zip(chosen, *seeds, strict=True)
    ]


@dataclass
class Run:
    """A variant with settings from its grid."""

    name: str
    settings: dict[str, Any]

    def config(self, comparison: Comparison, seed: int) -> Config:
        """The configuration of the run."""
        options, _ = split_options(comparison.variants[self.name], comparison)
        return parse_options({**options, 'seed': seed}, self.settings)


def settings_of(name: str, comparison: Comparison) -> list[dict[str, Any]]:
    """All settings of a variant's grid."""
    _, grid = split_options(comparison.variants[name], comparison)
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def measure(
    runs: list[Run], seed: int, comparison: Comparison, output: Path
) -> list[dict[str, Any]]:
    """Metrics of runs with a seed, one after the other or in one pass, or those that are there."""
    if not comparison.one_pass:
        return [launch_run(run, seed, comparison, output) for run in runs]
    configs = {json.dumps([run.name, run.settings]): run.config(comparison, seed) for run in runs}
    places = {
        'data_dir': str(Path(comparison.train.get('data_dir', '')).resolve()),
        'cache_dir': '',
    }
    about = [{**asdict(config), **places} for config in configs.values()]
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = output / f'pass-{key}.json'
    if not path.exists():
        write(path, json.dumps(train_probes(configs), indent=2) + '\n')
    return list(json.loads(path.read_text()).values())


def launch_run(run: Run, seed: int, comparison: Comparison, output: Path) -> dict[str, Any]:
    """Metrics of a run of train.py; its folder is named after its settings, its output goes to a
    .log beside."""
    words = [f'{key.split(".")[-1]}{value}' for key, value in run.settings.items()]
    folder = output / run.name.replace(' ', '').replace('/', '-') / '-'.join([*words, f's{seed}'])
    return launch(asdict(run.config(comparison, seed)), folder, log=Path(f'{folder}.log'))


def describe_runs(
    run: Run, tried: list[dict[str, Any]], runs: list[dict[str, Any]]
) -> dict[str, Any]:
    """A row of the table, of the runs with all seeds."""
    split = 'test' if 'test' in runs[0] else 'val'
    return {
        'name': run.name,
        'chosen': run.settings,
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
        'knn_accuracy': [metrics['knn']['accuracy'] for metrics in runs if 'knn' in metrics],
    }


def split_options(
    variant: dict[str, Any], comparison: Comparison
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Options of the runs of a variant, and the grid that its settings are chosen from."""
    options = {**comparison.train, **variant}  # `stages` as a whole, too
    grid = options.pop('search', comparison.search)
    return options, grid


def write_results(rows: list[dict[str, Any]], comparison: Comparison, output: Path) -> None:
    """table.md, results.json and plot.png of the rows so far."""
    write(output / 'table.md', describe(rows, comparison))
    results = {'seeds': comparison.seeds, 'train': comparison.train, 'rows': rows}
    write(output / 'results.json', json.dumps(results, indent=2) + '\n')
    plot(rows, output / 'plot.png')


def describe(rows: list[dict[str, Any]], comparison: Comparison) -> str:
    """Markdown; mean and standard deviation over the seeds."""
    split, neighbours = rows[0]['split'], any(row['knn_accuracy'] for row in rows)
    lines = [
        {
            'head': row['name'],
            'pooled vector': row['out_features'],
            'parameters': row['head_parameters'],
            'validation': percent(row['val_accuracy']),
            split: percent(row['accuracy']),
            f'{split}, balanced': percent(row['balanced_accuracy']),
            **({'k-NN': knn(row)} if neighbours else {}),
            'fit': f'{statistics.median(row["fit_seconds"]):.1f} s',
            'step': f'{statistics.median(row["step_milliseconds"]):.0f} ms',
            'peak memory': f'{statistics.median(row["peak_memory_mb"]):.0f} MB',
            'chosen': ', '.join(f'{k.split(".")[-1]} {v}' for k, v in row['chosen'].items()),
        }
        for row in rows
    ]
    note = (
        f'Mean and standard deviation over seeds {", ".join(map(str, comparison.seeds))}. '
        'Parameters: of head and classifier. Step: of training, its share of validation included '
        'unless all were trained in one pass; where the head is frozen, that of the classifier '
        'alone. Peak memory: of the process, with the backbone where features were not cached yet. '
        'Settings chosen by the validation accuracy of the first seed.'
    )
    if neighbours:
        note += ' k-NN: of heads that are only fitted, k chosen on validation images, cosine.'
    return f'{records(lines)}\n\n{note}\n'


def knn(row: dict[str, Any]) -> str:
    """The accuracy of nearest neighbours, where a row has it."""
    return percent(row['knn_accuracy']) if row['knn_accuracy'] else ''


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
