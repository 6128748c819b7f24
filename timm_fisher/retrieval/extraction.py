"""Vectors of many images, in files of their own: a part of the images after the other, by as many
processes as there are.

A part is a chunk of a folder's images, or a shard of webdataset. It becomes `NAME.parquet`, with
columns `key`, `label` and `vector` (float16), and is not embedded again while model and images stay
the same.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from timm_fisher.device import to_device
from timm_fisher.files import replacing
from timm_fisher.hub.pypi import from_pretrained_or_pypi
from timm_fisher.images import endings
from timm_fisher.retrieval.index import embed_files, embed_prepared, fingerprint, list_images
from timm_fisher.vectors import Prepared

HALF = {'no': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}


@dataclass
class Part:
    """Some images.

    Attributes:
        name: of the file that their vectors come to, without its ending.
        files: images, by their paths in the folder; or one shard.
        about: changes when the images do.
    """

    name: str
    files: list[str]
    about: str


@dataclass
class Rows:
    """Of the images of a part that have a vector, and what is wrong with each of the others."""

    keys: list[str] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def list_parts(folder: Path, size: int) -> list[Part]:
    """The shards (*.tar) of a folder or, if there are none, its images and those of its subfolders,
    so many at a time. ValueError if there are neither."""
    shards = sorted(folder.glob('*.tar'))
    if shards:
        files = {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in shards}
        size = 1
    else:
        files = list_images(folder)
    names, parts = list(files), []
    for start in range(0, len(names), size):
        some = names[start : start + size]
        content = json.dumps([(name, *files[name]) for name in some])
        name = Path(some[0]).stem if shards else f'part-{start // size:06d}'
        parts.append(Part(name, some, hashlib.sha256(content.encode()).hexdigest()))
    return parts


class Extractor:
    """Embeds parts of a folder, one after the other. For `ray.data.Dataset.map_batches`, too, on
    batches of `dataclasses.asdict` of parts.

    Args:
        model: released name, folder or Hub id USER/NAME.
        folder: of the images.
        output: of the vectors.
        backbone: source of an adapter's backbone.
        batch_size: images at a time.
        workers: processes that read files.
        mixed_precision: in which the backbone computes: no (float32), bf16 or fp16.
    """

    def __init__(
        self,
        model: str,
        folder: str | Path,
        output: str | Path,
        *,
        backbone: str | None = None,
        batch_size: int = 32,
        workers: int = 0,
        mixed_precision: str = 'no',
    ) -> None:
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
        self.model = to_device(from_pretrained_or_pypi(model, backbone), device).eval()
        half = HALF[mixed_precision]
        self.autocast = torch.autocast(device, half, enabled=half is not None)
        self.fingerprint = fingerprint(self.model)
        if half is not None:
            self.fingerprint += f' {mixed_precision}'
        self.prepared = Prepared([], self.model)
        self.folder, self.output = Path(folder), Path(output)
        self.batch_size, self.workers = batch_size, workers

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """What `extract` says of each part."""
        columns = ('name', 'files', 'about')
        parts = [Part(n, list(f), a) for n, f, a in zip(*map(batch.get, columns), strict=True)]
        said = [self.extract(part) for part in parts]
        return {key: [row[key] for row in said] for key in said[0]}

    def problems(self, part: Part) -> list[str] | None:
        """What is wrong with images of a part that is done; None if there are no vectors of its
        images by this model."""
        import pyarrow
        import pyarrow.parquet

        path = self.output / f'{part.name}.parquet'
        try:
            about = pyarrow.parquet.read_schema(path).metadata or {}
        except (FileNotFoundError, pyarrow.ArrowInvalid):  # none, or damaged
            return None
        if about.get(b'about') != self._about(part).encode():
            return None
        problems: list[str] = json.loads(about[b'problems'])
        return problems

    def extract(self, part: Part) -> dict[str, Any]:
        """Write the vectors of a part; how many images and bytes, and what is wrong with images
        that were left out."""
        with self.autocast:
            if part.files[0].endswith('.tar'):
                rows = self._of_shard(self.folder / part.files[0])
            else:
                rows = self._of_files(part.files)
        size = self._write(part, rows)
        return {'images': len(rows.keys), 'bytes': size, 'problems': rows.problems}

    def _of_files(self, files: list[str]) -> Rows:
        rows = Rows()
        paths = [self.folder / file for file in files]
        size = self.batch_size
        batches = [paths[i : i + size] for i in range(0, len(paths), size)]
        for vectors, problems in embed_files(self.model, batches, self.workers):
            for path, vector in vectors.items():
                key = path.relative_to(self.folder).as_posix()
                rows.keys.append(key)
                rows.labels.append(PurePosixPath(key).parent.name or None)
                rows.vectors.append(vector)
            rows.problems += problems
        return rows

    def _of_shard(self, shard: Path) -> Rows:
        rows, labels = Rows(), dict[str, str]()
        images: dict[Path, Tensor] = {}

        def flush() -> None:
            if images:
                x = torch.stack([*images.values()])
                vectors, problems = embed_prepared(self.model, list(images), x)
                rows.keys += map(str, vectors)
                rows.vectors.extend(vectors.values())
                rows.problems.extend(problems)
                images.clear()

        try:
            for name, content in _members(shard):
                folder, _, file = name.rpartition('/')
                key = str(Path(folder, file.split('.')[0]))  # as webdataset has it
                if file.lower().endswith('.cls'):
                    labels[key] = content.decode(errors='replace').strip()
                    continue
                try:
                    with Image.open(io.BytesIO(content)) as image:
                        prepared = self.prepared.prepare(image)
                except Exception as error:  # Pillow's decoders raise what they like
                    rows.problems.append(f"'{name}' of '{shard.name}' cannot be read: {error}")
                    continue
                if Path(key) in images or key in rows.keys[-1:]:
                    rows.problems.append(f"'{name}' of '{shard.name}' is a second image of {key}.")
                    continue
                images[Path(key)] = prepared
                if len(images) == self.batch_size:
                    flush()
        except (tarfile.TarError, KeyError, OSError) as error:
            rows.problems.append(f"'{shard.name}' is damaged; its first images alone: {error}")
        flush()
        rows.labels = [labels.get(key) for key in rows.keys]
        return rows

    def _write(self, part: Part, rows: Rows) -> int:
        """A file, beside and then renamed; its size."""
        import pyarrow
        import pyarrow.parquet

        width = self.model.head_hidden_size
        values = torch.stack(rows.vectors) if rows.vectors else torch.empty(0, width)
        flat = pyarrow.array(values.half().numpy().reshape(-1))
        table = pyarrow.table({
            'key': pyarrow.array(map(_utf8, rows.keys), pyarrow.string()),
            'label': pyarrow.array(rows.labels, pyarrow.string()),
            'vector': pyarrow.FixedSizeListArray.from_arrays(flat, width),
        })  # fmt: skip
        problems = json.dumps([_utf8(problem) for problem in rows.problems])
        table = table.replace_schema_metadata({'about': self._about(part), 'problems': problems})
        path = self.output / f'{part.name}.parquet'
        self.output.mkdir(parents=True, exist_ok=True)
        # Its own name: another process may write the same part.
        with replacing(path, f'.{os.getpid()}') as beside:
            pyarrow.parquet.write_table(table, beside)
            return beside.stat().st_size

    def _about(self, part: Part) -> str:
        return f'{self.fingerprint} {part.about}'


def _members(shard: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a shard's images and labels."""
    with tarfile.open(shard) as file:
        for member in file:
            is_wanted = member.isfile() and member.name.lower().endswith((*endings(), '.cls'))
            content = file.extractfile(member) if is_wanted else None
            if content is not None:
                yield member.name, content.read()


def _utf8(name: str) -> str:
    """A name of a file with what is no text replaced."""
    return os.fsencode(name).decode(errors='replace')
