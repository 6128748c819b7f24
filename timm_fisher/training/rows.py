"""Files of rows: a line of JSON for each dataclass."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from timm_fisher.files import write

Row = TypeVar('Row')


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """The rows of a file, of a dataclass. ValueError, with the number of the line, for one that is
    none."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append(kind(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Line {number} of '{path}' is not a row of results: {error}"
            ) from error
    return rows


def write_rows(rows: Iterable[Any], path: Path) -> None:
    """A file of rows, in place of the one that is there."""
    write(path, ''.join(json.dumps(asdict(row)) + '\n' for row in rows))
