"""Heads by name, over the entry points of the group `timm_fisher.heads`.

A head's module is imported when it is first asked for, so a broken plug-in hurts only whoever asks
for it. Built-in heads come through the same door.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch
from torch import Tensor

from timm_fisher.errors import ArgumentError
from timm_fisher.head import CONTEXT, PoolingHead, example

GROUP = 'timm_fisher.heads'
VARIABLE = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def list_heads() -> list[str]:
    """Names of the installed heads, sorted. Imports none of them."""
    return sorted(entry_points(group=GROUP).names)


def get_head(name: str) -> type[PoolingHead]:
    """The class of an installed head, by a name of `list_heads()`.

    Raises:
        ValueError: no head has this name, or two distributions claim it.
        ImportError: the head's distribution is installed but broken.
        TypeError: the entry point is not a subclass of `PoolingHead`.
    """
    entry = _find(name)
    try:
        head = entry.load()
    except Exception as error:
        raise ImportError(
            f'{title(name)} ({entry.value}) cannot be imported: {type(error).__name__}: {error}'
        ) from error
    if not (isinstance(head, type) and issubclass(head, PoolingHead)):
        raise TypeError(
            f'{title(name)} ({entry.value}) is {head!r}, not a subclass of timm_fisher.PoolingHead.'
        )
    return head


def create_head(name: str, in_features: int, /, **arguments: Any) -> PoolingHead:
    """Build an installed head.

    Args:
        name: one of `list_heads()`.
        in_features: channels of one descriptor.
        **arguments: the head's own keyword arguments, checked against its signature.

    Raises:
        TypeError: an argument that the head does not take; the nearest one is named.
        ValueError: `in_features` is not a positive whole number, the head refuses a value, or
            does not set its sizes.
        RuntimeError: the head's constructor fails otherwise.
    """
    if not _is_size(in_features):
        raise ValueError(f'in_features of a head is a positive whole number, not {in_features!r}.')
    head = get_head(name)
    check_arguments(f"Head '{name}'", head, arguments, given=('in_features',))
    try:
        made = head(in_features, **arguments)
    except Exception as error:
        kinds = {TypeError: ArgumentError, ValueError: ValueError}
        kind = next((kinds[k] for k in kinds if isinstance(error, k)), RuntimeError)
        reason = f'{type(error).__name__}: {error}' if kind is RuntimeError else error
        raise kind(f'{title(name)} cannot be built: {reason}') from error
    _, *asked = inspect.signature(made.forward).parameters.values()
    for parameter in asked:
        given = parameter.name in CONTEXT or parameter.kind in VARIABLE
        if not given and parameter.default is parameter.empty:
            raise TypeError(
                f"{title(name)} asks for '{parameter.name}' in forward, which models do not give. "
                f'Beside the descriptors there are: {", ".join(CONTEXT)}. Give it a default.'
            )
    taken = inspect.signature(made.forward_with_loss).parameters
    missing = [key for key in made.asks_for if key not in taken]
    if missing and not any(parameter.kind in VARIABLE for parameter in taken.values()):
        raise TypeError(
            f"{title(name)} asks for '{missing[0]}' in forward, but its forward_with_loss does not "
            'take it. Give both the same keywords.'
        )
    sizes = [getattr(made, key, None) for key in ('in_features', 'out_features')]
    if sizes[0] != in_features or not all(map(_is_size, sizes)):
        raise ValueError(
            f'{title(name)} must set in_features to {in_features} and out_features to a '
            f'positive whole number in __init__; it sets {sizes[0]!r} and {sizes[1]!r}.'
        )
    return made


def check_output(name: str, in_features: int, arguments: Mapping[str, Any]) -> None:
    """Refuse a head whose `forward` returns no tensor `[B, out_features]`. It is tried on the meta
    device, where that costs next to nothing, or, if it does not run there, on the CPU; a head that
    runs on neither fails where it is used.

    Raises:
        TypeError: it returns no tensor.
        ValueError: it returns a tensor of another shape.
    """
    for device in ('meta', 'cpu'):
        try:
            with torch.random.fork_rng([]), torch.device(device), torch.no_grad():
                head = create_head(name, in_features, **arguments).eval()
                x, context = example(head)
                pooled = head(x, **context)
            break
        except Exception:
            continue
    else:
        return
    wanted = f'a tensor [2, {head.out_features}] of descriptors {list(x.shape)}'
    if not isinstance(pooled, Tensor):
        raise TypeError(f'{title(name)} returns a {type(pooled).__name__}, not {wanted}.')
    if pooled.shape != (2, head.out_features):
        raise ValueError(f'{title(name)} returns a tensor {list(pooled.shape)}, not {wanted}.')


def check_arguments(
    what: str,
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    given: Collection[str] = (),
) -> None:
    """Check a user's keyword arguments against the signature of a function or class, before the
    call. The error begins with `what`; parameters in `given` are the caller's, not the user's.

    Raises:
        TypeError: an unknown argument, with the nearest known ones, a missing one, or a value that
            is neither True nor False where the default is one of them.
    """
    parameters = {
        key: parameter
        for key, parameter in inspect.signature(function).parameters.items()
        if key not in given and parameter.kind not in VARIABLE
    }
    for key in arguments:
        if key not in parameters:
            known = ', '.join(parameters) or 'none'
            raise ArgumentError(
                f"{what} has no argument '{key}' (given {key}={arguments[key]!r})."
                f'{nearest(key, parameters)} Arguments: {known}.'
            )
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in arguments:
            raise ArgumentError(f"{what} needs the argument '{key}'.")
        value = arguments.get(key, parameter.default)
        if isinstance(parameter.default, bool) and type(value) is not bool:
            raise ArgumentError(f'{what} takes {key}=True or {key}=False, not {value!r}.')


def nearest(name: str, names: Collection[str]) -> str:
    """` Did you mean 'x' or 'y'?` for a misspelt name, or nothing if none is near."""
    matches = difflib.get_close_matches(name, names, n=3)
    return f' Did you mean {" or ".join(repr(match) for match in matches)}?' if matches else ''


def title(name: str) -> str:
    """A head and where it comes from, to begin an error with."""
    return f"Head '{name}' of the distribution {_distribution(_find(name))}"


def _find(name: str) -> EntryPoint:
    if not isinstance(name, str):
        raise TypeError(f'A head is given by its name, one of {list_heads()}, not by {name!r}.')
    entries = list(entry_points(group=GROUP, name=name))
    if not entries:
        names = list_heads()
        # Built-in heads are always there, unless the package is imported from its folder alone.
        missing = 'none, so timm_fisher is not installed. Run `pip install -e .` in its folder'
        installed = ', '.join(names) or missing
        raise ValueError(f"Unknown head '{name}'.{nearest(name, names)} Installed: {installed}.")
    if len(entries) > 1:
        owners = ' and '.join(sorted(map(_distribution, entries)))
        raise ValueError(
            f"Head '{name}' is registered by {owners}. Uninstall one, or rename its entry point."
        )
    return entries[0]


def _distribution(entry: EntryPoint) -> str:
    return f"'{entry.dist.name}'" if entry.dist is not None else 'unknown'


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
