"""Train several heads on one data set under identical conditions, and show what each brings.

    python recipes/compare.py --config recipes/configs/probe.yaml --data-dir PATH

Every run is one of recipes/train.py, with the same splits, seeds and budget. Each head's settings
are chosen from a grid by the validation accuracy of the first seed, and then run with all seeds;
the test split is only ever reported. A head that is trained may have a grid of its own. With
`one_pass`, as in configs/probe.yaml, heads and settings are trained side by side on the cached
features of a frozen backbone, which is much faster; their models are not kept.

Leaves in `--output`: table.md, results.jsonl (a row for each run, of the search too), plot.png,
costs.png (accuracy against size of the pooled vector and time of training) and the runs; a
comparison that was interrupted goes on where it stopped, at the last run or pass.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from timm_fisher.files import write
from timm_fisher.training import command_line
from timm_fisher.training.config import Config
from timm_fisher.training.embeddings import parse_options
from timm_fisher.training.launch import combinations, launch, run_folder
from timm_fisher.training.probe import train_probes
from timm_fisher.training.report import command, data_name
from timm_fisher.training.results import (
    BASELINES,
    Result,
    choose,
    describe,
    note,
    plot,
    plot_costs,
    result_of,
)
from timm_fisher.training.rows import read_rows, write_rows


@dataclass
class Comparison:
    """Compare heads on one data set.

    Args:
        protocol: name of what all runs share, in their results.
        output: folder of the comparison.
        data_dir: as train.py takes it; empty for that of `train`.
        seeds: of the runs; the first chooses the settings.
        only: names of variants to run, besides the baselines; empty for all.
        known: file of results, such as recipes/results/probe.jsonl; runs that are in it, of
            whatever commit, on data of this name, are not repeated.
        one_pass: train all heads and settings of a seed side by side, as
            `timm_fisher.training.probe.train_probes` does.
        train: options of train.py for every run.
        search: options of train.py, dotted, and the values to choose from on the validation split.
        variants: by name in the table, options of train.py of its own; `search` among them
            replaces that of all.
    """

    protocol: str = 'compare'
    output: str = 'runs/compare'
    data_dir: str = ''
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    only: list[str] = field(default_factory=list)
    known: str = ''
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
        command_line.check_lists({'seeds': self.seeds})
        for grid in (self.search, *(v.get('search', {}) for v in self.variants.values())):
            command_line.check_lists(grid)
        if self.data_dir:
            self.train = {**self.train, 'data_dir': self.data_dir}
        kept = {*BASELINES, *(self.only or self.variants)}
        self.variants = {name: self.variants[name] for name in self.variants if name in kept}


def main(comparison: Comparison) -> None:
    """Run all variants, writing the results so far."""
    for name, variant in comparison.variants.items():
        options, grid = split_options(variant, comparison)
        if not parse_options(options, {key: values[0] for key, values in grid.items()}).classifies:
            raise ValueError(
                f"No stage of '{name}' trains a classifier, by whose accuracy heads are compared. "
                'Add one.'
            )
    known = read_rows(Path(comparison.known), Result) if comparison.known else []
    output = Path(comparison.output)
    output.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    # All together where they share a pass, else one by one.
    names = list(comparison.variants)
    for group in [names] if comparison.one_pass else [[name] for name in names]:
        for result in compare_variants(group, comparison, known):
            results.append(result)
            write_rows(results, output / 'results.jsonl')
        write(output / 'table.md', f'{describe(results)}\n\n{note(results)}\n')
        plot(results, output / 'plot.png')
        plot_costs(results, output / 'costs.png')
    print((output / 'table.md').read_text())


def compare_variants(
    names: list[str], comparison: Comparison, known: list[Result]
) -> Iterator[Result]:
    """Results of some heads as they come: of all settings with the first seed, then of those that
    validated best with the others."""
    first, *others = comparison.seeds
    runs = [Run(name, settings) for name in names for settings in settings_of(name, comparison)]
    searched = []
    for result in measure(runs, first, comparison, known):
        searched.append(result)
        yield result
    chosen = [Run(name, rows[0].settings) for name, rows in choose(searched).items()]
    for seed in others:
        yield from measure(chosen, seed, comparison, known)


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
    return combinations(grid)


def measure(
    runs: list[Run], seed: int, comparison: Comparison, known: list[Result]
) -> Iterator[Result]:
    """Results of runs with a seed as they come; those that are known, or have left their metrics
    in the output folder, are not run again."""
    known_as = {(row.data, row.command): row for row in known}
    configs = [run.config(comparison, seed) for run in runs]
    commands = [command(config, config.mixed_precision or 'no', 1) for config in configs]
    data = data_name(configs[0])
    missing = [i for i, words in enumerate(commands) if (data, words) not in known_as]
    if known:
        print(f'{len(runs) - len(missing)} of {len(runs)} runs of seed {seed} are known')
    measured = (train_all if comparison.one_pass else launch_each)(
        [runs[i] for i in missing], [configs[i] for i in missing], Path(comparison.output)
    )
    for run, words in zip(runs, commands, strict=True):
        about: dict[str, Any] = {
            'protocol': comparison.protocol,
            'data': data,
            'name': run.name,
            'settings': run.settings,
        }
        row = known_as.get((data, words))
        yield replace(row, **about) if row else result_of(next(measured), **about)


def train_all(runs: list[Run], configs: list[Config], output: Path) -> Iterator[dict[str, Any]]:
    """Metrics of runs in one pass."""
    if not runs:
        return
    named = {
        json.dumps([run.name, run.settings]): config
        for run, config in zip(runs, configs, strict=True)
    }
    about = [
        {**asdict(config), 'data_dir': str(Path(config.data_dir).resolve()), 'cache_dir': ''}
        for config in configs
    ]
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = output / f'pass-{key}.json'
    if not path.exists():
        write(path, json.dumps(train_probes(named), indent=2) + '\n')
    yield from json.loads(path.read_text()).values()


def launch_each(runs: list[Run], configs: list[Config], output: Path) -> Iterator[dict[str, Any]]:
    """Metrics of runs of train.py, one after the other; a run's folder is named after its
    settings, and its output goes to a .log beside."""
    for run, config in zip(runs, configs, strict=True):
        folder = run_folder(output, run.name, run.settings, config.seed)
        yield launch(asdict(config), folder, log=Path(f'{folder}.log'))


def split_options(
    variant: dict[str, Any], comparison: Comparison
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Options of the runs of a variant, and the grid that its settings are chosen from."""
    options = {**comparison.train, **variant}  # `stages` as a whole, too
    grid = options.pop('search', comparison.search)
    return options, grid


if __name__ == '__main__':
    command_line.run(main, Comparison)
