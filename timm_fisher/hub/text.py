"""Text that somebody else wrote: whether it is fit to be read in, and how it is shown."""

from __future__ import annotations

import html
import os
import re
from typing import Any

LONGEST_LABEL = 200  # characters of the name of a class
# Spaces and joiners that ordinary names hold, though Python does not count them as printable.
_ALLOWED = {'\u00a0', '\u200c', '\u200d'}
# What means something anywhere in a line, between words, and at its beginning; a list's number.
_MARKDOWN = re.compile(r'[\\`*\[\]|~]|(?<!\w)_|_(?!\w)|^[#+=-]')
_NUMBERED = re.compile(r'^(\d+)([.)])(?=\s|$)')
# What a local path begins with: ~user/, ./, ../, /, a drive or \\; but not the // of https://.
_LOCAL = r'(?:~[\w.-]*[\\/]|\.\.?[\\/]|/(?!/)|[A-Za-z]:[\\/](?!/)|\\\\)'
_REPOSITORY = r'\w[\w.-]*(?:/\w[\w.-]*)?'
# What stands before a local path: END is what ends it.
_BEFORE = (
    r'((?:--?[\w.-]+=)?'
    rf'(?:local-dir:|file://|hfi?ds/(?!{_REPOSITORY}END)|(?={_LOCAL})))'
)
_WHOLE = re.compile(_BEFORE.replace('END', '$') + '(.+)')
# As all that a pair of quotes holds; or up to a space, a quote, or what closes a list.
_INSIDE = re.compile(
    r'(?<=(["\']))' + _BEFORE.replace('END', r'\1') + r'(.+?)(?=\1)'
    r'|(?<![^\s=,:;(\[{"\'`>|@&])'
    + _BEFORE.replace('END', r'(?![^\s\'",)\]}])')
    + r'([^\s\'",)\]}]+)'
    r'|(checkpoint[-_]path["\'\s:=]+)((?<=["\'])[^"\']+|[^\s\'",)\]}]+)'
)


def problem(text: Any, longest: int) -> str:
    """What is wrong with a text of one line of at most `longest` characters, to follow its name in
    a message; empty if nothing is. It need not be a text at all.

    Control characters, terminal escapes, changes of direction and lone surrogates are refused.
    """
    if not isinstance(text, str):
        return f'is {str(text)[:60]!r}, not a text'
    if len(text) > longest:
        return f'has {len(text)} characters; at most {longest} are allowed'
    for character in text:
        if not is_shown(character):
            return f'contains the character {character!a}, which is not printable'
    return ''


def is_shown(character: str) -> bool:
    """Whether a character is one that can be seen, or an ordinary space."""
    return character.isprintable() or character in _ALLOWED


def escape_markdown(text: str) -> str:
    """A text of one line that Markdown, in a table too, shows as it is."""
    escaped = _MARKDOWN.sub(r'\\\g<0>', html.escape(text.strip(), quote=False))
    return _NUMBERED.sub(r'\1\\\2', escaped)


def code_block(text: str, language: str) -> str:
    """A Markdown block of code that ends after this text, whatever it holds."""
    fence = '```'
    while fence in text:
        fence += '`'
    return f'{fence}{language}\n{text}\n{fence}'


def shown(text: object) -> str:
    """A text of one line that a terminal and UTF-8 take, whatever the bytes of a path are."""
    readable = os.fsencode(str(text)).decode(errors='backslashreplace')
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in readable)


def csv_cell(text: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(('=', '+', '-', '@', '\t', '\r')) else text


def hide_paths(value: Any, name: str = '') -> Any:
    """A JSON value whose texts have, of each local path, the last name alone.

    Local are absolute paths and those that begin with a dot or `~`; what follows 'local-dir:',
    'file://', or 'hfds/' where it is no owner/name; and what is called checkpoint_path. `name` is
    what the value is called: a 'command' is never a path as a whole.
    """
    if isinstance(value, dict):
        return {key: hide_paths(item, key) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide_paths(item, name) for item in value]
    if not isinstance(value, str):
        return value
    if name == 'checkpoint_path':
        return _last_name(value)
    whole = None if name == 'command' else _WHOLE.fullmatch(value)
    return _shorten(whole) if whole else _INSIDE.sub(_shorten, value)


def _shorten(match: re.Match[str]) -> str:
    *_, before, path = (group for group in match.groups() if group is not None)
    return before + _last_name(path)


def _last_name(path: str) -> str:
    return re.split(r'[\\/]', path.rstrip('\\/'))[-1] or path
