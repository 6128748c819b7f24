"""Results of comparisons: a row for each run, and the tables and plots of such rows.

Rows are kept as JSON Lines, so that those of several machines or people are put together by
putting one file after the other. They may come from anybody, so their text is escaped.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from timm_fisher.files import save_png
from timm_fisher.hub.text import escape_markdown, problem
from timm_fisher.training.tables import percent, records

# What every table must hold: timm's pool, and what the Fisher vectors' normalisation alone brings.
BASELINES: dict[str, dict[str, Any]] = {
    'avg': {'head': 'avg'},
    'avg + power_l2': {'head': 'avg', 'head_kwargs': {'normalize': True}},
}
AXES = {'out_features': 'pooled vector', 'train_seconds': 'training (s)'}  # of plots
LONGEST = 500  # characters of a text that a table shows


@dataclass(frozen=True)
class Result:
    """One run of a comparison.

    Attributes:
        protocol: what all runs of the comparison share; the name of its configuration.
        data: name of the data set.
        name: of the head with its settings, as the table has it.
        settings: dotted options of train.py that were chosen from a grid.
        backbone, head, head_kwargs, backbone_stage, seed: options of train.py.
        split: that accuracies are of: 'test', or 'val' where there is none.
        accuracy, balanced_accuracy: of that split, 0 to 1.
        val_accuracy: the highest of an epoch, 0 to 1; settings are chosen by it.
        best_stage: stage of training that this epoch was in.
        out_features: size of the pooled vector.
        head_parameters: of head and classifier.
        fit_seconds, train_seconds, steps, peak_memory_mb: what it cost on `device`; training
            includes validation, unless many heads were trained in one pass.
        commit, versions, command: what repeats it.
        diverged: a loss was not finite; only a probe's row can say so.
        knn_accuracy: of nearest neighbours, for a head that is only fitted.

    Raises:
        ValueError: a value that a table cannot show; rows may come from anybody.
    """

    protocol: str
    data: str
    name: str
    settings: dict[str, Any]
    backbone: str
    head: Any
    head_kwargs: dict[str, Any]
    backbone_stage: int
    seed: int
    split: str
    accuracy: float
    balanced_accuracy: float
    val_accuracy: float
    best_stage: str
    out_features: int
    head_parameters: int
    fit_seconds: float
    train_seconds: float
    steps: int
    peak_memory_mb: float
    device: str
    commit: str
    versions: dict[str, str]
    command: str
    diverged: bool = False
    knn_accuracy: float | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r'\w+', str(self.protocol)) or self.split not in ('test', 'val'):
            raise ValueError(f'protocol {self.protocol!r}, split {self.split!r}')
        settings = [f'{key} {value}' for key, value in dict(self.settings).items()]
        shown = [self.data, self.name, self.backbone, self.best_stage, self.device, *settings]
        for text in shown:
            if wrong := problem(text, LONGEST):
                raise ValueError(f'a text {wrong}')
        shares = [self.accuracy, self.balanced_accuracy, self.val_accuracy]
        shares += [] if self.knn_accuracy is None else [self.knn_accuracy]
        costs = [self.out_features, self.fit_seconds, self.train_seconds, self.seed]
        if not all(isinstance(v, int | float) and math.isfinite(v) for v in [*shares, *costs]):
            raise ValueError(f'numbers that are none among {[*shares, *costs]}')
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError(f'accuracies {shares} outside 0 to 1')


def result_of(
    metrics: Mapping[str, Any], *, protocol: str, data: str, name: str, settings: dict[str, Any]
) -> Result:
    """The row of a run, from its metrics.json."""
    split = 'test' if 'test' in metrics else 'val'
    common = {field.name: metrics[field.name] for field in fields(Result) if field.name in metrics}
    return Result(
        **common,
        protocol=protocol,
        data=data,
        name=name,
        settings=settings,
        split=split,
        accuracy=metrics[split]['accuracy'],
        balanced_accuracy=metrics[split]['balanced_accuracy'],
        val_accuracy=metrics['best']['val_accuracy'],
        best_stage=metrics['best'].get('stage', ''),
        fit_seconds=metrics['seconds']['fit'],
        train_seconds=metrics['seconds']['train'],
        knn_accuracy=metrics['knn']['accuracy'] if 'knn' in metrics else None,
    )


def merge(results: Iterable[Result]) -> list[Result]:
    """All rows; of several of one run the last, in the place of the first."""
    merged: dict[tuple[str, str], Result] = {}
    for result in results:
        merged[result.data, result.command] = result
    return list(merged.values())


def choose(results: Iterable[Result]) -> dict[str, list[Result]]:
    """By name, and backbone where there are several, rows of the settings that validated best with
    the seed of the search, that with which most settings were tried. One row for each seed; ties
    go to the first."""
    results = list(results)
    several = len({result.backbone for result in results}) > 1
    named: dict[str, list[Result]] = {}
    for result in results:
        label = f'{result.name}, {result.backbone}' if several else result.name
        named.setdefault(label, []).append(result)
    chosen = {}
    for label, rows in named.items():
        runs = {(row.seed, json.dumps(row.settings)) for row in rows}
        tried = Counter(seed for seed, _ in runs)
        seed = max((row.seed for row in rows), key=lambda seed: tried[seed])
        searched = [row for row in rows if row.seed == seed]
        best = max(searched, key=lambda row: row.val_accuracy)
        of_seeds = {row.seed: row for row in rows if row.settings == best.settings}
        chosen[label] = list(of_seeds.values())
    return chosen


def by_data(results: Iterable[Result]) -> dict[str, dict[str, list[Result]]]:
    """What `choose` gives, for each data set."""
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(result.data, []).append(result)
    return {data: choose(rows) for data, rows in grouped.items()}


def describe(results: Iterable[Result]) -> str:
    """Markdown table; mean and standard deviation over the seeds. Rows are of one protocol."""
    results = list(results)
    chosen = by_data(results)
    seeds = max(len(rows) for named in chosen.values() for rows in named.values())
    stages, devices = (
        {getattr(row, field) for row in results} for field in ('best_stage', 'device')
    )
    prefixes = {data: f'{escape_markdown(data)}: ' if len(chosen) > 1 else '' for data in chosen}
    lines = []
    for label in _labels(chosen):
        of_data = {data: named[label] for data, named in chosen.items() if label in named}
        vector = next(iter(of_data.values()))[0].out_features
        line = {'head': escape_markdown(label), 'pooled vector': str(vector)}
        for data, measured in of_data.items():
            cells = _accuracies(measured, seeds)
            if len(stages) > 1:
                best = Counter(row.best_stage for row in measured)
                cells['best in'] = ', '.join(f'{escape_markdown(k)} {n}' for k, n in best.items())
            if len(devices) == 1:  # else times cannot be compared
                cells['fit'] = f'{statistics.median(row.fit_seconds for row in measured):.1f} s'
                taken = statistics.median(row.train_seconds for row in measured)
                cells['training'] = f'{taken:.0f} s'
            line |= {f'{prefixes[data]}{title}': cell for title, cell in cells.items()}
        lines.append(line)
    kinds = ('validation', 'val', 'test', 'k-NN', 'best in', 'chosen', 'fit', 'training')
    columns = [f'{prefix}{kind}' for prefix in prefixes.values() for kind in kinds]
    titles = ['head', 'pooled vector', *columns]
    return records(lines, [title for title in titles if any(line.get(title) for line in lines)])


def _labels(chosen: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(label for named in chosen.values() for label in named))


def _accuracies(rows: list[Result], seeds: int) -> dict[str, str]:
    """The cells of a head and a data set."""
    neighbours = [row.knn_accuracy for row in rows if row.knn_accuracy is not None]
    fewer = f' ({len(rows)} of {seeds} seeds)' if len(rows) < seeds else ''
    settings = rows[0].settings.items()
    return {
        'validation': percent([row.val_accuracy for row in rows]),
        rows[0].split: percent([row.accuracy for row in rows]) + fewer,
        'k-NN': percent(neighbours) if neighbours else '',
        'chosen': escape_markdown(', '.join(f'{k.split(".")[-1]} {v}' for k, v in settings)),
    }


def note(results: Iterable[Result]) -> str:
    """What a reader of the table must know."""
    results = list(results)
    seeds, devices = (
        ', '.join(str(value) for value in dict.fromkeys(getattr(row, field) for row in results))
        for field in ('seed', 'device')
    )
    text = f'Mean and standard deviation over seeds {seeds}.'
    if any(result.settings for result in results):
        text += ' Settings are chosen by the validation accuracy of the first seed.'
    if len({result.best_stage for result in results}) > 1:
        text += ' Best in: stages that the best epochs were in, and how many.'
    text += (
        f' Times are medians, on {escape_markdown(devices)}; what else ran there is in them. '
        'Training includes validation, unless all heads were trained in one pass.'
    )
    if any(result.knn_accuracy is not None for result in results):
        text += ' k-NN: of heads that are only fitted, k chosen on validation images, cosine.'
    return text


def plot(results: Iterable[Result], path: Path) -> None:
    """Accuracy of each head, numbered, in a column for each data set; bars of one standard
    deviation."""
    chosen = by_data(results)
    numbers = _numbers(chosen)
    figure = Figure(figsize=(4 + 4 * len(chosen), 1.2 + 0.22 * len(numbers)), layout='tight')
    columns = figure.subplots(1, len(chosen), squeeze=False, sharey=True)[0]
    for (data, named), axes in zip(chosen.items(), columns, strict=True):
        for label, rows in named.items():
            mean, spread = _mean(rows)
            axes.errorbar(mean, numbers[label], xerr=spread, **_style(numbers[label]))
        axes.set_xlabel(_accuracy(data, named), parse_math=False)
        axes.grid(alpha=0.3)
    labels = [f'{label}  {number}' for label, number in numbers.items()]
    columns[0].set_yticks(range(1, len(labels) + 1), labels, fontsize=8, parse_math=False)
    columns[0].set_ylim(len(labels) + 0.5, 0.5)
    save_png(figure, path)


def plot_costs(results: Iterable[Result], path: Path) -> None:
    """Accuracy against the size of the pooled vector and against the time of training, a row of
    plots for each data set; heads have the numbers of `plot`."""
    chosen = by_data(results)
    numbers = _numbers(chosen)
    figure = Figure(figsize=(12, 5 * len(chosen)), layout='tight')
    plots = figure.subplots(len(chosen), len(AXES), squeeze=False)
    for (data, named), of_data in zip(chosen.items(), plots, strict=True):
        for (field, title), axes in zip(AXES.items(), of_data, strict=True):
            for label, rows in named.items():
                mean, spread = _mean(rows)
                x = statistics.median(getattr(row, field) for row in rows)
                style = _style(numbers[label])
                axes.errorbar(x, mean, spread, alpha=0.7, **style)
                axes.annotate(
                    str(numbers[label]), (x, mean), xytext=(4, 3), textcoords='offset points',
                    fontsize=8, color=style['color'],
                )  # fmt: skip
            axes.set_xscale('log')
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(title)
            axes.set_ylabel(_accuracy(data, named), parse_math=False)
            axes.grid(alpha=0.3)
    save_png(figure, path)


def _numbers(chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    return {label: number for number, label in enumerate(_labels(chosen), 1)}


def _mean(rows: list[Result]) -> tuple[float, float]:
    """Of the accuracy in percent, with its standard deviation."""
    accuracies = [100 * row.accuracy for row in rows]
    return statistics.mean(accuracies), statistics.stdev(accuracies) if len(rows) > 1 else 0.0


def _style(number: int) -> dict[str, Any]:
    return {'fmt': 'o', 'capsize': 3, 'color': f'C{number % 10}'}


def _accuracy(data: str, named: Mapping[str, list[Result]]) -> str:
    return f'{data}: {next(iter(named.values()))[0].split} accuracy (%)'
