"""README.md of a saved model: metadata, a generated part between two comments, and whatever its
user writes around it."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from timm_fisher.registry import list_heads

BEGIN = '<!-- timm_fisher: generated from here; the next save replaces this part -->'
END = '<!-- timm_fisher: generated up to here; text of your own stays above and below -->'
REPOSITORY = '<!-- repository: {} -->'  # where a card says, first of all, whose it is
LARGEST = 2**20  # bytes
LARGEST_METADATA = 2**16  # characters
# Metadata that describe the model. Others, such as the licence, belong to the user once they stand.
_OF_THE_MODEL = ('base_model', 'base_model_relation', 'library_name', 'model-index', 'pipeline_tag')


class _Loader(yaml.SafeLoader):
    """Without anchors, by which a few bytes could stand for any number of values."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, 'anchor', None) is not None:
            raise ValueError(f'the metadata use the anchor {event.anchor!r:.60}, which is refused')
        return super().compose_node(parent, index)


@dataclass
class Readme:
    """A README.md, taken apart so that its parts together are the text again, to the byte.

    Attributes:
        opening: up to the first field of the metadata; empty if there are none.
        fields: text of each field, by its name; what comes before them has an empty name.
        tags: the field `tags`.
        before: what follows the metadata; without generated part, everything that does.
        generated: the part between the two comments; None where it is missing.
        after: what follows it.
    """

    opening: str
    fields: dict[str, str]
    tags: list[str]
    before: str
    generated: str | None
    after: str

    @property
    def body(self) -> str:
        """What follows the metadata."""
        part = '' if self.generated is None else f'{BEGIN}{self.generated}{END}'
        return f'{self.before}{part}{self.after}'

    @property
    def own(self) -> str:
        """What its user has written."""
        return (self.before + self.after).strip()

    @property
    def text(self) -> str:
        """All of it."""
        if not self.opening:
            return self.body
        return f'{self.opening}{"".join(self.fields.values())}---{self.body}'


def generate(metadata: dict[str, Any], text: str) -> str:
    """A README.md without anything of a user's.

    Raises:
        ValueError: the text holds one of the comments that mark its begin and end.
    """
    if BEGIN in text or END in text:
        raise ValueError("The card's text must not hold the comments that mark its generated part.")
    fields = ''.join(field(name, value) for name, value in metadata.items())
    return f'---\n{fields}---\n\n{BEGIN}\n{text.strip()}\n{END}\n'


def field(name: str, value: Any) -> str:
    """A field of the metadata, in YAML."""
    width = float('inf')
    return yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, width=width)


def read(path: Path, where: str = '') -> str:
    """A README.md that `update` and `rename` can work on.

    Args:
        path: of the file.
        where: what messages call it; its path, if empty.

    Raises:
        ValueError: it is a link, which could lead to any file of this machine, or no file; too
            large; or its text or metadata cannot be read.
    """
    check_regular(path)
    with open(path, 'rb') as file:
        content = file.read(LARGEST + 1)
    try:
        if len(content) > LARGEST:
            raise ValueError(f'it has more than {LARGEST} bytes')
        text = content.decode()
        parse(text)
    except ValueError as error:
        raise _unreadable(where or f"'{path}'", error) from error
    return text


def _unreadable(where: str, error: ValueError) -> ValueError:
    reason = str(error).partition('\n')[0]
    return ValueError(f'{where} cannot be read: {reason}. Correct or delete it there.')


def check_regular(path: Path) -> None:
    """Refuse what is there, but is no ordinary file.

    Raises:
        ValueError: it is a symbolic link, a folder or a device.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(
            f"'{path}' is a symbolic link or no regular file. Put a copy of the file in its place, "
            'or delete it.'
        )


def parse(text: str) -> Readme:
    """Take a README.md apart.

    Raises:
        ValueError: its metadata are too large, or not one field after the other in plain YAML.
    """
    starts, place = [], 0
    for line in text.split('\n'):
        if line.rstrip('\r') == '---':
            starts.append(place)
        place += len(line) + 1
    opening, body = '', text
    fields: dict[str, str] = {}
    tags: list[str] = []
    if len(starts) > 1 and not text[: starts[0]].strip():
        opening = text[: text.index('\n', starts[0]) + 1]
        fields, tags = _parse_metadata(text[len(opening) : starts[1]])
        body = text[starts[1] + 3 :]
    before, begin, rest = body.partition(BEGIN)
    generated, end, after = rest.partition(END)
    if not (begin and end):
        return Readme(opening, fields, tags, body, None, '')
    return Readme(opening, fields, tags, before, generated, after)


def _parse_metadata(text: str) -> tuple[dict[str, str], list[str]]:
    """Text of each field, and the tags."""
    if len(text) > LARGEST_METADATA:
        raise ValueError(f'the metadata have more than {LARGEST_METADATA} characters')
    try:
        node = _Loader(text).get_single_node()
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f'the metadata are no plain YAML: {error}') from error
    if node is None:
        return {'': text}, []
    if not isinstance(node, yaml.MappingNode) or node.flow_style:
        raise ValueError('the metadata are not one field after the other')
    starts = [key.start_mark.index for key, _ in node.value] + [len(text)]
    fields, tags = {'': text[: starts[0]]}, []
    for (key, value), (start, end) in zip(node.value, itertools.pairwise(starts), strict=True):
        if not isinstance(key, yaml.ScalarNode) or key.start_mark.column or key.value in fields:
            raise ValueError(f'the metadata name {str(key.value)[:60]!r} twice, or not in a line')
        fields[key.value] = text[start:end]
        if key.value == 'tags':
            if not isinstance(value, yaml.SequenceNode) or not all(
                isinstance(tag, yaml.ScalarNode) for tag in value.value
            ):
                raise ValueError('the metadata field tags is not a list of texts')
            tags = [tag.value for tag in value.value]
    return fields, tags


def update(new: str, old: str, where: str) -> str:
    """The README.md that takes the place of an old one, with what its user wrote there.

    The generated part is that of the new one, and so are the metadata that describe the model; all
    else stays as it is, to the byte, and metadata that are missing are added. An old one without
    generated part is somebody's own: its text stays alone. An empty one is filled.

    Args:
        new: card that was generated; or README.md of a folder, whose own text is only taken where
            the old one has none.
        old: README.md that is there.
        where: place of the old one, for messages.

    Raises:
        ValueError: the metadata of one cannot be read, or not be extended.
    """
    mine, theirs = parse(new), parse(old)
    merged = _merge(mine, theirs, '\r\n' if '\r\n' in old else '\n')
    try:
        if parse(merged.text) != merged:
            raise ValueError('the metadata cannot be extended')
    except ValueError as error:
        raise _unreadable(where, error) from error
    if theirs.own and theirs.generated is None and mine.generated is not None:
        warnings.warn(
            f"{where} is somebody's own: its text stays, and only its metadata are updated. Delete "
            'it to get the whole card.',
            stacklevel=2,
        )
    if theirs.own and mine.own and theirs.own != mine.own:
        warnings.warn(
            f'{where} keeps its own text; what was written into the new one is left out. Edit it '
            'there.',
            stacklevel=2,
        )
    return merged.text


def _merge(mine: Readme, theirs: Readme, newline: str) -> Readme:
    ours = {'timm', 'timm_fisher', *list_heads()}
    kept = [tag for tag in theirs.tags if tag in mine.tags or tag not in ours]
    tags = list(dict.fromkeys([*kept, *mine.tags]))
    made = {**mine.fields, 'tags': field('tags', tags)} if tags else dict(mine.fields)
    fields: dict[str, str] = {}
    last = ''
    for name, text in theirs.fields.items():
        new = made.pop(name, '').replace('\n', newline)
        if name in _OF_THE_MODEL or (name == 'tags' and tags != theirs.tags):
            text = new + _comments_below(text)
            name = name if new else last  # of a field that goes, the comments stay
            text = text if new else fields[last] + text
        fields[name] = text
        last = name
    fields |= {name: text.replace('\n', newline) for name, text in made.items()}

    source, generated = theirs, theirs.generated
    if mine.generated is not None and generated is not None and (theirs.own or not mine.own):
        generated = mine.generated.replace('\r\n', '\n').replace('\n', newline)
    elif not theirs.own:
        source, generated = mine, mine.generated
    opening = theirs.opening or (f'---{newline}' if fields else '')
    before = source.before if source.opening or not opening else newline + source.before
    return Readme(opening, fields, tags, before, generated, source.after)


def _comments_below(text: str) -> str:
    """The lines of a field that do not belong to it."""
    lines = reversed(text.splitlines(keepends=True))
    below = itertools.takewhile(lambda line: not line.strip() or line.startswith('#'), lines)
    return ''.join(reversed(list(below)))


def rename(text: str, repo_id: str) -> str:
    """A card for another repository than the one it was generated for; text of a user's stays."""
    readme = parse(text)
    head, tail = REPOSITORY.split('{}')
    old = (readme.generated or '').partition(head)[2].partition(tail)[0]
    if readme.generated is None or not old:
        return text
    name, new_name = (each.rpartition('/')[2] for each in (old, repo_id))
    part = readme.generated.replace(f'\n# {name}', f'\n# {new_name}', 1)
    for form in (REPOSITORY, "hf-hub:{}'", 'hf-hub:{}`'):
        part = part.replace(form.format(old), form.format(repo_id))
    readme.generated = part
    if 'model-index' in readme.fields:
        first, second = (yaml.safe_dump([{'name': each}]) for each in (name, new_name))
        index = readme.fields['model-index']
        readme.fields['model-index'] = index.replace(first, second, 1)
    return readme.text
