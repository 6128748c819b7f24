"""README.md of a saved model: metadata, a generated part between two comments, and whatever its
user writes around it."""

from __future__ import annotations

import re
import warnings
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
_METADATA = re.compile(r'\s*^---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)', re.DOTALL | re.MULTILINE)


class _Loader(yaml.SafeLoader):
    """Without anchors, by which a few bytes could stand for any number of values, and types; and
    without what only YAML 1.1 takes for more than a text, such as no, 010 and 2026-01-02."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        for name in ('anchor', 'tag'):
            if value := getattr(event, name, None):
                raise ValueError(f'the metadata use the {name} {value!r:.60}, which is refused')
        return super().compose_node(parent, index)


for _kind, _form in (
    ('null', r'(?:null|~|)$'),
    ('bool', r'(?:true|false)$'),
    ('int', r'-?(?:0|[1-9][0-9]*)$'),
    ('float', r'-?(?:0|[1-9][0-9]*)\.[0-9]+$'),
):
    _Loader.add_implicit_resolver(f'tag:yaml.org,2002:{_kind}', re.compile(_form), None)


def generate(metadata: dict[str, Any], text: str) -> str:
    """A README.md without anything of a user's; a ValueError if its text holds the marks."""
    if BEGIN in text or END in text:
        raise ValueError("The card's text must not hold the comments that mark its generated part.")
    return f'{_dump(metadata)}\n{BEGIN}\n{text.strip()}\n{END}\n'


def _dump(metadata: dict[str, Any]) -> str:
    fields = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=float('inf'))
    return f'---\n{fields}---\n'


def read(path: Path, where: str) -> str:
    """A README.md that `update` and `rename` can work on; messages call it `where`.

    Raises:
        ValueError: it is too large, or its text or metadata cannot be read.
    """
    with open(path, 'rb') as file:
        content = file.read(LARGEST + 1)
    try:
        if len(content) > LARGEST:
            raise ValueError(f'it has more than {LARGEST} bytes')
        text = content.decode()
        _split_metadata(text)
    except ValueError as error:
        reason = str(error).partition('\n')[0]
        raise ValueError(
            f'{where} cannot be read: {reason}. Correct or delete it there.'
        ) from error
    return text


def _split_metadata(text: str) -> tuple[dict[str, Any], str, str]:
    """The metadata, the text of these, and what follows."""
    match = _METADATA.match(text)
    if match is None:
        return {}, '', text
    if len(match[1]) > LARGEST_METADATA:
        raise ValueError(f'the metadata have more than {LARGEST_METADATA} characters')
    try:
        metadata = yaml.load(match[1], _Loader) or {}
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f'the metadata are no plain YAML: {error}') from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get('tags') or [], list):
        raise ValueError('the metadata are not fields, or tags is not a list')
    return metadata, match[0], text[match.end() :]


def _split_generated(text: str) -> tuple[str, str, str]:
    """What stands before the generated part, this with its comments, and what follows it."""
    before, begin, rest = text.partition(BEGIN)
    generated, end, after = rest.partition(END)
    return (before, begin + generated + end, after) if end else (text, '', '')


def update(new: str, old: str, where: str) -> str:
    """The README.md that takes the place of an old one, with what its user wrote there.

    The generated part is that of the new one, and so are the metadata that describe the model; all
    other text stays as it is, to the byte, and metadata that are missing are added. Metadata that
    change are written anew, without comments. An old one without generated part is somebody's own:
    its text stays alone. An empty one is filled.

    Args:
        new: card that was generated; or README.md of a folder, whose own text is only taken where
            the old one has none.
        old: README.md that is there, from `read`; messages call it `where`.
    """
    (mine, _, new_body), (theirs, metadata, body) = map(_split_metadata, (new, old))
    merged = _merge(mine, theirs)
    if merged != theirs:
        metadata = _dump(merged)
    before, generated, after = _split_generated(body)
    new_before, new_generated, new_after = _split_generated(new_body)
    own, new_own = (before + after).strip(), (new_before + new_after).strip()
    if not own and (new_own or not generated):
        body = new_body
    elif generated and new_generated:
        body = before + new_generated + after
    if own and ((new_generated and not generated) or (new_own and own != new_own)):
        warnings.warn(
            f'{where} keeps the text that somebody wrote there; what is new in the other is left '
            'out. Edit or delete it there.',
            stacklevel=2,
        )
    return metadata + body


def _merge(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Metadata of an old README.md, with those of the new one that describe the model."""
    kept = {key: theirs[key] for key in theirs if key in mine or key not in _OF_THE_MODEL}
    new = {key: mine[key] for key in mine if key in _OF_THE_MODEL or key not in theirs}
    tags, ours = mine.get('tags') or [], ['timm', 'timm_fisher', *list_heads()]
    kept_tags = [tag for tag in theirs.get('tags') or [] if tag in tags or tag not in ours]
    all_tags = kept_tags + [tag for tag in tags if tag not in kept_tags]
    return {**kept, **new, **({'tags': all_tags} if all_tags else {})}


def rename(text: str, repo_id: str) -> str:
    """A card for another repository than the one it was generated for; text of a user's stays."""
    before, generated, after = _split_generated(text)
    match = re.search(REPOSITORY.format(r'(\S+)'), generated)
    if match is None:
        return text
    name, new_name = (whole.rpartition('/')[2] for whole in (match[1], repo_id))
    generated = generated.replace(f'\n# {name}\n', f'\n# {new_name}\n', 1)
    generated = re.sub(rf'(?<![\w./-]){re.escape(match[1])}(?![\w/-])', repo_id, generated)
    index, new_index = (yaml.safe_dump({'model-index': [{'name': n}]}) for n in (name, new_name))
    return before.replace(index, new_index, 1) + generated + after
