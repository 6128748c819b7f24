"""Results of comparisons: a row for each run, and the tables and plots of such rows.

Rows are kept as JSON Lines, so that those of several machines or people are put together by
putting one file after the other. They may come from anybody, so their text is escaped.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from timm_fisher.files import save_png, write
from timm_fisher.hub.text import escape_markdown
from timm_fisher.training.tables import percent, records

# Columns of plots, by the value that they show.
AXES = {'out_features': 'pooled vector', 'step_milliseconds': 'step of training (ms)'}


@dataclass(frozen=True)
class Result:
    """One run of a comparison.

    Attributes:
        protocol: what all runs of the comparison share; the name of its configuration.
        data: name of the data set.
        name: of its line in the table.
        settings: dotted options of train.py that were chosen from a grid.
        backbone, head, head_kwargs, backbone_stage, seed: options of train.py.
        split: that accuracies are of: 'test', or 'val' where there is none.
        accuracy, balanced_accuracy: of that split, 0 to 1.
        val_accuracy: of the best epoch, the highest; settings are chosen by it.
        out_features: size of the pooled vector.
        head_parameters: of head and classifier.
        fit_seconds, step_milliseconds, peak_memory_mb: what it cost on `device`.
        commit, versions, command: what repeats it.
        diverged: a loss was not finite.
        knn_accuracy: of nearest neighbours, for a head that is only fitted.
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
    out_features: int
    head_parameters: int
    fit_seconds: float
    step_milliseconds: float
    peak_memory_mb: float
    device: str
    commit: str
    versions: dict[str, str]
    command: str
    diverged: bool = False
    knn_accuracy: float | None = None


def result_of(
    metrics: Mapping[str, Any], *, protocol: str, data: str, name: str, settings: dict[str, Any]
) -> Result:
    """The row of a run, from its metrics.json."""
    split = 'test' if 'test' in metrics else 'val'
    as_they_are = {
        field.name: metrics[field.name] for field in fields(Result) if field.name in metrics
    }
    return Result(
        **as_they_are,
        protocol=protocol,
        data=data,
        name=name,
        settings=settings,
        split=split,
        accuracy=metrics[split]['accuracy'],
        balanced_accuracy=metrics[split]['balanced_accuracy'],
        val_accuracy=metrics['best']['val_accuracy'],
        fit_seconds=metrics['seconds']['fit'],
        step_milliseconds=1000 * metrics['seconds']['train'] / max(1, metrics['steps']),
        knn_accuracy=metrics['knn']['accuracy'] if 'knn' in metrics else None,
    )  # fmt: skip


def read_results(path: Path) -> list[Result]:
    """Rows of a file.

    Raises:
        ValueError: a line is no row; the message has its number.
    """
    results = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            results.append(Result(**json.loads(line)))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"Line {number} of '{path}' is not a row of results: {error}"
            ) from error
    return results


def write_results(results: Iterable[Result], path: Path) -> None:
    """A file of rows."""
    write(path, ''.join(json.dumps(asdict(result)) + '\n' for result in results))


def merge(results: Iterable[Result]) -> list[Result]:
    """All rows; of several of one run the last, in the place of the first."""
    merged: dict[tuple[str, str], Result] = {}
    for result in results:
        merged[result.data, result.command] = result
    return list(merged.values())


def choose(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Rows by name, of the settings that validated best with the name's first seed, the first of
    equals; a row for each seed."""
    named: dict[str, list[Result]] = {}
    for result in results:
        named.setdefault(result.name, []).append(result)
    chosen = {}
    for name, rows in named.items():
        searched = [row for row in rows if row.seed == rows[0].seed]
        best = max(searched, key=lambda row: row.val_accuracy)
        chosen[name] = [row for row in rows if row.settings == best.settings]
    return chosen


def by_data(results: Iterable[Result]) -> dict[str, dict[str, list[Result]]]:
    """What `choose` gives, for each data set."""
    named: dict[str, list[Result]] = {}
    for result in results:
        named.setdefault(result.data, []).append(result)
    return {data: choose(rows) for data, rows in named.items()}


def describe(results: Iterable[Result]) -> str:
    """Markdown table; mean and standard deviation over the seeds. Rows are of one protocol."""
    chosen = by_data(results)
    names = list(dict.fromkeys(name for named in chosen.values() for name in named))
    seeds = max(len(rows) for named in chosen.values() for rows in named.values())
    lines = []
    for name in names:
        of_data = {data: named.get(name, []) for data, named in chosen.items()}
        rows = next(rows for rows in of_data.values() if rows)
        line = {'head': escape_markdown(name), 'pooled vector': str(rows[0].out_features)}
        for data, its_rows in of_data.items():
            prefix = f'{escape_markdown(data)}: ' if len(chosen) > 1 else ''
            cells = _accuracies(its_rows, seeds)
            line |= {f'{prefix}{title}': cell for title, cell in cells.items()}
        line['fit'] = f'{statistics.median(row.fit_seconds for row in rows):.1f} s'
        line['step'] = f'{statistics.median(row.step_milliseconds for row in rows):.0f} ms'
        lines.append(line)
    titles = [title for title in lines[0] if any(line.get(title) for line in lines)]
    return records(lines, titles)


def _accuracies(rows: list[Result], seeds: int) -> dict[str, str]:
    """The cells of a name and a data set."""
    if not rows:
        return {}
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
    text = (
        f'Mean and standard deviation over seeds {", ".join(map(str, _unique("seed", results)))}. '
        'Settings chosen by the validation accuracy of the first seed. Step: of training, its '
        'share of validation included unless all heads were trained in one pass; where the head '
        'is frozen, that of the classifier alone.'
    )
    if any(result.knn_accuracy is not None for result in results):
        text += ' k-NN: of heads that are only fitted, k chosen on validation images, cosine.'
    return text


def _unique(field: str, results: Iterable[Result]) -> list[Any]:
    return list(dict.fromkeys(getattr(result, field) for result in results))


def plot(results: Iterable[Result], path: Path) -> None:
    """Accuracy of each head, numbered as in the table, and the same against the size of the pooled
    vector and the time of a step, a row of plots for each data set; bars of one standard
    deviation."""
    chosen = by_data(results)
    numbers = {
        name: i for i, name in enumerate(dict.fromkeys(n for c in chosen.values() for n in c))
    }
    height = 1.5 + 0.22 * len(numbers)
    figure = Figure(figsize=(16, height * len(chosen)), layout='tight')
    plots = figure.subplots(len(chosen), 1 + len(AXES), squeeze=False)
    for (data, named), (of_heads, *others) in zip(chosen.items(), plots, strict=True):
        split = next(iter(named.values()))[0].split
        for name, rows in named.items():
            accuracies = [100 * row.accuracy for row in rows]
            mean, number = statistics.mean(accuracies), numbers[name]
            spread = statistics.stdev(accuracies) if len(rows) > 1 else 0.0
            style: dict[str, Any] = {'fmt': 'o', 'capsize': 3, 'color': f'C{number % 10}'}
            of_heads.errorbar(mean, number, xerr=spread, **style)
            for field, axes in zip(AXES, others, strict=True):
                x = statistics.median(getattr(row, field) for row in rows)
                axes.errorbar(x, mean, spread, alpha=0.7, **style)
                axes.annotate(
                    str(number + 1), (x, mean), xytext=(4, 3), textcoords='offset points',
                    fontsize=8, color=style['color'],
                )  # fmt: skip
        labels = [f'{name}  {number + 1}' for name, number in numbers.items()]
        of_heads.set_yticks(range(len(labels)), labels, fontsize=8, parse_math=False)
        of_heads.set(xlabel=f'{data}: {split} accuracy (%)', ylim=(len(labels) - 0.5, -0.5))
        for title, axes in zip(AXES.values(), others, strict=True):
            axes.set_xscale('log')
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set(xlabel=title, ylabel=f'{data}: {split} accuracy (%)')
        for axes in (of_heads, *others):
            axes.grid(alpha=0.3)
    save_png(figure, path)
