"""The command line of every recipe: a dataclass whose fields are the options."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import jsonargparse

from timm_fisher.errors import ArgumentError, LoadError, PushError
from timm_fisher.registry import nearest

T = TypeVar('T')
# What a user can mend. Each message is a sentence that says how.
MISTAKES = (
    ArgumentError, FloatingPointError, ImportError, LoadError, OSError, PushError, ValueError,
)  # fmt: skip


def run(
    main: Callable[[T], object],
    settings: type[T],
    *,
    positional: str | None = None,
    arguments: Sequence[str] | None = None,
) -> None:
    """Call `main` with the settings of the command line, see `parse`. An error of
    MISTAKES becomes a sentence and exit status 2, with the traceback under `python -X dev`; an
    interruption, by Ctrl-C or SIGTERM, a sentence and exit status 130."""
    chosen = parse(settings, positional=positional, arguments=arguments)
    with suppress(ValueError):  # only the main thread may set handlers
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(chosen)
    except KeyboardInterrupt as error:
        print(str(error) or 'Interrupted.', file=sys.stderr)
        sys.exit(130)  # as a shell says it of SIGINT
    except MISTAKES as error:
        if sys.flags.dev_mode:
            raise
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)


def parse(
    settings: type[T], *, positional: str | None = None, arguments: Sequence[str] | None = None
) -> T:
    """Settings from a command line: `--config FILE` (YAML), then overrides.

    `--data-dir` and `--data_dir` are the same; fields of nested settings have dotted names, such as
    `--stages.NAME.lr` of a stage that the file has, or `--stages` as a whole. Exits with a message
    on an error, a ValueError of the dataclass included.

    Args:
        settings: a dataclass; the first line of its docstring describes the command.
        positional: field whose value, or list of values, is given without a name.
        arguments: None for those of this process.
    """
    parser = _Parser(description=(settings.__doc__ or '').partition('\n')[0])
    parser.add_argument('--config', action='config', help='YAML file of these options')
    parser.add_class_arguments(settings, skip={positional} if positional else set())
    if positional:
        _add_positional(parser, settings, positional)
    names = [field.name for field in dataclasses.fields(settings)]  # type: ignore[arg-type]
    words = list(map(_with_underscores, sys.argv[1:] if arguments is None else arguments))
    given = parser.parse_args(words)
    _refuse_new_names(parser, words, given)
    parsed = parser.instantiate(given)
    if positional and not parsed[positional]:  # jsonargparse gives them no default
        names.remove(positional)
    try:
        return settings(**{name: parsed[name] for name in names})
    except ValueError as error:
        parser.error(str(error))


def check_lists(lists: Mapping[str, Any]) -> None:
    """ValueError unless each option, by its name, is a list of one value or more, all different."""
    for name, values in lists.items():
        different = {json.dumps(value) for value in values} if isinstance(values, list) else ()
        if not different or len(different) < len(values):
            raise ValueError(f'{name} is {values}; give one or more, all different.')


class _Parser(jsonargparse.ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """As the base class, with the nearest valid names for an unknown one."""
        unknown = re.findall(r"--([\w.]+)|[Oo]ption '([\w.]+)'", str(message))
        known = {action.dest.split('.')[-1] for action in self._actions}
        for name in {(a or b).split('.')[-1] for a, b in unknown} - known:
            message = f'{message}.{nearest(name, known)}'
        super().error(message, ex)
        raise AssertionError('unreachable')


def _add_positional(parser: _Parser, settings: type[Any], name: str) -> None:
    kind = get_type_hints(settings)[name]
    required = inspect.signature(settings).parameters[name].default is inspect.Parameter.empty
    if get_origin(kind) is list:
        parser.add_argument(name, nargs='+' if required else '*', type=get_args(kind)[0])
    else:
        parser.add_argument(name, nargs=None if required else '?', type=kind)


def _refuse_new_names(parser: _Parser, words: list[str], given: jsonargparse.Namespace) -> None:
    """A mistyped NAME in `--stages.NAME.lr` would add a stage; in a dict of dicts
    `--train.head_kwargs.p` would drop all of head_kwargs but p."""
    named, others, rest = [], [], iter(words)
    for word in rest:
        match = re.match(r'--(\w+)\.([^.=]+)\.[^=]+(=)?', word)
        field, name, has_value = match.groups() if match else ('config', '', '')
        values = given[field]
        if isinstance(values, dict) and isinstance(values.get(name), jsonargparse.Namespace):
            named.append((field, name))
            if not has_value:
                next(rest)
        elif match and isinstance(values, dict):
            hint = f"give all of --{field}.{name} '{{...}}', or change the file"
            parser.error(f'{word} reaches too deep; {hint}.')
        else:
            others.append(word)
    known = parser.parse_args(others) if named else given
    for field, name in named:
        if name not in known[field]:
            hint = nearest(name, known[field])
            parser.error(f"{field} has no '{name}', only {list(known[field])}.{hint}")


def _with_underscores(argument: str) -> str:
    """`--data-dir=a-b` -> `--data_dir=a-b`; a name in the middle, as of a stage, stays."""
    pattern = r'^(--[\w-]+)(\.[\w.-]+(?=\.))?(\.[\w-]+)?'
    match = re.match(pattern, argument)
    if match is None:
        return argument
    first, middle, last = (part or '' for part in match.groups())
    name = f'--{first[2:].replace("-", "_")}{middle}{last.replace("-", "_")}'
    return name + argument[match.end() :]
