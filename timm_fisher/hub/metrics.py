"""metrics.json of a saved model: checked before a card reports it, and kept free of local paths."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm_fisher.hub.text import problem

MEASURES = {'accuracy': 'Accuracy', 'balanced_accuracy': 'Balanced accuracy'}
LARGEST = 2**20  # bytes of metrics.json
LONGEST_TEXT = 200
LONGEST_COMMAND = 10_000
MOST_ENTRIES = 100  # of `seeds` and `versions`
# What a local path begins with: ~user/, /, a drive or \\; but not the // of https://.
_ABSOLUTE = r'(?:~[\w.-]*/|/(?!/)|[A-Za-z]:[\\/](?!/)|\\\\)'
_PATH = rf'(?:local-dir:|file://|(?={_ABSOLUTE}))'
_WHOLE = re.compile(rf'((?:--?[\w.-]+=)?{_PATH})(.+)')
_IN_WORD = re.compile(rf'((?:^|(?<=[=,:({{\[])){_PATH})([^,)}}\]]+)')
_QUOTED_OR_WORD = re.compile(r"""'[^'\n]*'|"[^"\n]*"|[^\s'"]+""")


def read_metrics(metrics: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """metrics.json, or what one would hold, as plain JSON values without local paths.

    Raises:
        ValueError: not readable JSON, not a table, or too large.
    """
    place = f"'{metrics}'" if isinstance(metrics, str | Path) else 'metrics'
    try:
        if isinstance(metrics, str | Path):
            with open(metrics, 'rb') as file:
                text: str | bytes = file.read(LARGEST + 1)
        else:
            text = json.dumps(metrics)
        if len(text) > LARGEST:
            raise ValueError(f'more than {LARGEST} bytes')
        table = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f'{place} is not readable JSON: {error}.') from error
    if not isinstance(table, dict):
        raise ValueError(f'metrics are {str(table)[:200]}, not a table of results.')
    plain: dict[str, Any] = _without_paths(table)
    return plain


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: hide_paths(each) if key == 'command' else _without_paths(each)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [_without_paths(each) for each in value]
    if isinstance(value, str):
        return _last_name(_WHOLE, value) if _WHOLE.fullmatch(value) else hide_paths(value)
    return value


def hide_paths(text: Any) -> Any:
    """A command in which of absolute paths, and of folders after `local-dir:`, the last name stays;
    what is not a text comes back as it is."""

    def hide(match: re.Match[str]) -> str:
        word = match[0]
        if word[0] not in '\'"':
            return _last_name(_IN_WORD, word)
        inner = word[1:-1]
        whole = _WHOLE.fullmatch(inner)
        return word[0] + (_last_name(_WHOLE, inner) if whole else hide_paths(inner)) + word[0]

    return _QUOTED_OR_WORD.sub(hide, text) if isinstance(text, str) else text


def _last_name(pattern: re.Pattern[str], text: str) -> str:
    def shorten(match: re.Match[str]) -> str:
        name = re.split(r'[\\/]', match[2].rstrip('\\/'))[-1]
        return match[1] + name if name else match[0]

    return pattern.sub(shorten, text)


def check_metrics(metrics: Mapping[str, Any], model: Any) -> None:
    """Refuse metrics that a card cannot report, or that are not of this model.

    Args:
        metrics: as `read_metrics` gives them.
        model: `PooledModel`.

    Raises:
        ValueError: a part is not of the form that training writes, or the run was of another model.
    """
    for split in ('test', 'val'):
        if split in metrics:
            table = _table(metrics, split)
            _check_shares(split, {key: table[key] for key in MEASURES if key in table})
            if 'accuracy' not in table:
                raise ValueError(f"metrics['{split}'] has no 'accuracy', only {sorted(table)}.")
            _check_number(table, 'samples')
    _check_number(metrics, 'seed')
    seeds, versions, best = (_table(metrics, key) for key in ('seeds', 'versions', 'best'))
    _check_shares('seeds', seeds)
    _check_number(best, 'epoch')
    texts = [('dataset', metrics.get('dataset')), ("best']['stage", best.get('stage'))]
    texts += [(f"versions']['{key}", value) for key, value in versions.items()]
    texts += [(name, key) for name in ('seeds', 'versions') for key in _table(metrics, name)]
    command = metrics.get('command', '')
    if not isinstance(command, str) or len(command) > LONGEST_COMMAND:
        raise ValueError(
            f"metrics['command'] is {str(command)[:200]!r}, not a text of at most "
            f'{LONGEST_COMMAND} characters.'
        )
    texts += [('command', line) for line in command.split('\n')]
    for name, text in texts:
        wrong = '' if text is None else problem(text, LONGEST_COMMAND if name == 'command' else 200)
        if wrong:
            raise ValueError(f"metrics['{name:.200}'] {wrong}.")
    if metrics and not {'test', 'val'} & set(metrics):
        raise ValueError(f"metrics have no 'test' and no 'val', only {sorted(metrics)}.")
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


def _table(metrics: Mapping[str, Any], key: str) -> dict[str, Any]:
    table = metrics.get(key, {})
    if not isinstance(table, dict):
        raise ValueError(f"metrics['{key}'] is {str(table)[:200]}, not a table.")
    if len(table) > MOST_ENTRIES:
        raise ValueError(f"metrics['{key}'] has {len(table)} entries; at most {MOST_ENTRIES} fit.")
    return table


def _check_shares(where: str, table: Mapping[str, Any]) -> None:
    for name, value in table.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(
                f"metrics['{where}']['{name:.200}'] is {value!r:.200}, not a number from 0 to 1."
            )


def _check_number(table: Mapping[str, Any], key: str) -> None:
    value = table.get(key)
    if value is not None and type(value) is not int:
        raise ValueError(f'{key} of the metrics is {value!r:.200}, not a whole number.')
