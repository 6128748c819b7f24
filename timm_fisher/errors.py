"""Errors of arguments, of saving, loading and sharing, and what huggingface_hub raises in one
sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import errors as hub_errors
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]


class ArgumentError(TypeError):
    """An argument that nothing takes, that is missing, or is of another type."""


class LoadError(RuntimeError):
    """A saved model cannot be loaded: what is wrong with it, or with the way to it.

    The message may quote a stranger's file, so it is cut where it is long, and holds nothing that a
    terminal would obey.
    """

    def __init__(self, message: str) -> None:
        if len(message) > 3000:
            message = f'{message[:2000]} ... {message[-500:]}'
        clean = (c if c.isprintable() or c == '\n' else ascii(c)[1:-1] for c in message)
        super().__init__(''.join(clean))


class PushError(RuntimeError):
    """A model cannot be pushed to the Hub. The repository is unchanged."""


@contextmanager
def explain_errors(doing: str, kind: type[Exception] = LoadError) -> Iterator[None]:
    """Turn what huggingface_hub raises into one sentence that says what to do."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise kind(f'{doing} failed: {_explain(error)}') from None


_KINDS: dict[type[Exception], str] = {  # the first that fits
    hub_errors.OfflineModeIsEnabled: 'the Hub is needed, but HF_HUB_OFFLINE is set. Unset it, or '
    'give a folder.',
    hub_errors.GatedRepoError: 'access to the repository must be asked for, on its page.',
    hub_errors.RevisionNotFoundError: 'the repository has no such revision.',
    hub_errors.RemoteEntryNotFoundError: 'the repository lacks a file that every saved model has.',
    hub_errors.LocalEntryNotFoundError: 'the Hub cannot be reached, and the file is not in the '
    'cache. Check the connection, or HF_HUB_OFFLINE, and try again.',
}
_STATUSES = {
    401: 'no such repository, or it is private and HF_TOKEN has no access to it (401).',
    403: 'the token does not allow this (403). Give one that may write to the repository.',
    404: 'no such repository (404). Check its name, and the token if it is private.',
    409: 'the repository was changed by somebody else at the same time (409). Try again.',
    429: 'the Hub says that there were too many requests (429). Wait, and try again.',
}


def _explain(error: Exception) -> str:
    # The reason may be wrapped: "an error happened", because of a 403.
    if isinstance(error.__cause__, HTTPError) and not isinstance(error, HTTPError):
        error = error.__cause__
    for kind, reason in _KINDS.items():
        if isinstance(error, kind):
            return reason
    response = getattr(error, 'response', None)
    if response is not None:
        status = response.status_code
        fault = f'the Hub has a fault of its own ({status}). Try again later.'
        return _STATUSES.get(status, fault if status >= 500 else f'the Hub answered {status}.')
    if isinstance(error, HTTPError | ConnectionError):
        return 'there is no connection to the Hub, or it broke. Try again.'
    return str(error).partition('\n')[0] or type(error).__name__
