"""metrics.json of a saved model: checked before a card reports it, and kept free of local paths."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm_fisher.hub.text import hide_paths, problem

MEASURES = {'accuracy': 'Accuracy', 'balanced_accuracy': 'Balanced accuracy'}
LONGEST_TEXT = 200
LONGEST_COMMAND = 10_000
MOST_ENTRIES = 100  # of a table


def read_metrics(metrics: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """metrics.json, or what one would hold, as plain JSON values without local paths.

    Raises:
        ValueError: not readable JSON, or not a table.
    """
    place = f"'{metrics}'" if isinstance(metrics, str | Path) else 'metrics'
    try:
        if isinstance(metrics, str | Path):
            table = json.loads(Path(metrics).read_bytes())
        else:
            table = json.loads(json.dumps(metrics))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f'{place} is not readable JSON: {error}.') from error
    if not isinstance(table, dict):
        raise ValueError(f'metrics are {str(table)[:200]}, not a table of results.')
    plain: dict[str, Any] = hide_paths(table)
    return plain


def check_metrics(metrics: Mapping[str, Any], model: Any) -> None:
    """Refuse metrics, as `read_metrics` gives them, that a card cannot report, or that are not of
    this `PooledModel`, by a ValueError."""
    tables = {name: metrics.get(name, {}) for name in ('test', 'val', 'best', 'seeds', 'versions')}
    for name, table in tables.items():
        if not isinstance(table, dict) or len(table) > MOST_ENTRIES:
            raise ValueError(
                f"metrics['{name}'] is {str(table)[:200]!r}, not a table of at most {MOST_ENTRIES} "
                'entries.'
            )
        for key, value in table.items():
            is_share = type(value) in (int, float) and 0 <= value <= 1
            if (name == 'seeds' or key in MEASURES) and not is_share:
                raise ValueError(
                    f"metrics['{name}'][{key!a:.200}] is {value!r:.200}, not a number from 0 to 1."
                )
    if metrics and not any('accuracy' in tables[split] for split in ('test', 'val')):
        raise ValueError(f"metrics have no 'accuracy' of 'test' or 'val', only {sorted(metrics)}.")
    shown = [metrics.get('dataset'), metrics.get('seed'), *tables['seeds']]
    shown += [tables[split].get('samples') for split in ('test', 'val')]
    shown += [tables['best'].get(key) for key in ('stage', 'epoch')]
    shown += [text for pair in tables['versions'].items() for text in pair]
    texts = [(str(text), LONGEST_TEXT) for text in shown]
    texts.append((str(metrics.get('command', '')).replace('\n', ' '), LONGEST_COMMAND))
    for text, longest in texts:
        if wrong := problem(text, longest):
            raise ValueError(f'A text of the metrics, {text[:60]!a}, {wrong}.')
    here = {
        'head': json.loads(json.dumps(model._model_args['head'])),
        'out_features': model.head_hidden_size,
        'parameters': sum(parameter.numel() for parameter in model.parameters()),
    }
    for key, value in here.items():
        if metrics.get(key, value) != value:
            raise ValueError(
                f'These metrics are of another model: {key} is {str(metrics[key])[:200]} there, '
                f'{str(value)[:200]} here.'
            )
