"""Which heads a model has: `'NAME[@STAGE] [+ NAME[@STAGE]]...'`, or a list of dicts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from timm_fisher.errors import ArgumentError
from timm_fisher.registry import get_head, nearest

# What a head named beside others ends with, as the others do by default. (A list says it all.)
BESIDE_OTHERS: dict[str, dict[str, Any]] = {
    'avg': {'normalize': True},
    'cls': {'normalize': True},
}


class HeadSpec(NamedTuple):
    """A head of a model: its name, the stage that it pools and its arguments."""

    name: str
    stage: int
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return self.name if self.stage == -1 else f'{self.name}@{self.stage}'


def parse_heads(
    head: str | Sequence[dict[str, Any]],
    head_kwargs: Mapping[str, Any] | None = None,
    stage: int = -1,
) -> list[HeadSpec]:
    """The heads of a model, in order.

    Args:
        head: names of heads with `+` between them, each with its stage behind an `@` or without,
            where `avg` and `cls` beside others have `normalize=True` unless `head_kwargs` says
            otherwise; or a list of dicts, each of a `name`, its `stage` and its arguments.
        head_kwargs: arguments of heads that are named; of several, each goes to the only one that
            has it.
        stage: of heads that do not say theirs.

    Raises:
        TypeError: `head` is neither; an argument that no head has, or more than one; or
            `head_kwargs` for a list.
        ValueError: an empty list or name, an unknown head, a stage that is not a negative whole
            number or is given twice.
    """
    if isinstance(head, str):
        return _parse_names(head, head_kwargs or {}, stage)
    if head_kwargs:
        raise ArgumentError(
            f'{head_kwargs=} is for heads that are named. In a list, each takes its arguments in '
            "its own dict: head=[dict(name='avg', normalize=True), ...]."
        )
    heads = []
    for given in head if isinstance(head, list | tuple) else [None]:
        if not isinstance(given, dict) or not isinstance(given.get('name'), str):
            raise ArgumentError(
                "Heads are given by their names, as in 'gem' or 'avg + sparse_fisher@-2', or as a "
                "list of dicts with a name, such as [dict(name='gmm_fisher', stage=-2, "
                f'components=64), ...]; got {head!r:.200}.'
            )
        arguments = dict(given)
        name, own_stage = arguments.pop('name'), arguments.pop('stage', stage)
        if not isinstance(own_stage, int):
            raise ArgumentError(
                f"stage={own_stage!r} of the head '{name}' is not a number like -2."
            )
        heads.append(HeadSpec(name, own_stage, arguments))
    if not heads:
        raise ValueError('head is an empty list; give one head or more.')
    return heads


def argument_names(head: str | Sequence[dict[str, Any]]) -> set[str]:
    """Names of all arguments that heads take as `head_kwargs`; none of a list, whose dicts hold
    them. Errors as those of `parse_heads`."""
    heads = parse_heads(head) if isinstance(head, str) else []
    return set().union(*(_signature(spec.name) for spec in heads))


def _parse_names(text: str, head_kwargs: Mapping[str, Any], stage: int) -> list[HeadSpec]:
    heads = []
    for part in text.split('+'):
        name, at, own_stage = (word.strip() for word in part.partition('@'))
        if not name:
            raise ValueError(
                f"A name is missing in head='{text}'. Give heads as in 'avg + sparse_fisher@-2'."
            )
        if at and not re.fullmatch(r'-[1-9][0-9]{0,3}', own_stage):
            raise ValueError(
                f"head='{text}' has a stage '{own_stage}' of '{name}', which is not a negative "
                "whole number as in 'sparse_fisher@-2'."
            )
        if at and stage != -1:
            raise ValueError(
                f"head='{text}' names a stage, and stage={stage} is given as well. Give one of "
                'them; stage=-1 stands for none.'
            )
        heads.append(HeadSpec(name, int(own_stage) if at else stage, {}))
    if len(heads) == 1:
        return [heads[0]._replace(arguments=dict(head_kwargs))]
    try:
        known = [_signature(spec.name) for spec in heads]
    except ValueError as error:
        raise ValueError(f"head='{text}': {error}") from None
    heads = [spec._replace(arguments=dict(BESIDE_OTHERS.get(spec.name, {}))) for spec in heads]
    for key, value in head_kwargs.items():
        owners = [spec for spec, names in zip(heads, known, strict=True) if key in names]
        if not owners:
            near = nearest(key, set().union(*known))
            raise ArgumentError(f"None of the heads '{text}' has an argument '{key}'.{near}")
        if len(owners) > 1:
            raise ArgumentError(
                f"More than one of the heads '{text}' has an argument '{key}'. Give a list: head="
                f"[dict(name='{owners[0].name}', {key}={value!r}), ...]."
            )
        owners[0].arguments[key] = value
    return heads


def _signature(name: str) -> set[str]:
    """Names of the arguments of an installed head."""
    return set(inspect.signature(get_head(name)).parameters) - {'in_features'}
