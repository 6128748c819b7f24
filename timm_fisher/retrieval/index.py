"""Vectors of the images of a folder, kept on disk: only new and changed images are embedded again.

An index is one file, `index.safetensors`, so that no two parts of it can disagree: the vectors,
the list of images as JSON in bytes, and a digest of both. It is replaced as a whole, from time to
time while images are embedded; a process may be killed at any moment.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from timm_fisher.backbone import digest
from timm_fisher.errors import LoadError
from timm_fisher.files import save_tensors
from timm_fisher.images import endings
from timm_fisher.model import PooledModel
from timm_fisher.retrieval.search import check_vectors
from timm_fisher.vectors import Prepared, embed

FILE = 'index.safetensors'
FORMAT = 'timm_fisher index 1'
LONGEST_ENTRY = 2**15  # bytes of JSON for an image
SHARE_OF_SAVING = 0.05  # of the time, at most


@dataclass
class Index:
    """Vectors of images.

    Attributes:
        model: `fingerprint` of the model that embedded them.
        files: size in bytes and time of the last change, in nanoseconds, of each image, by its path
            in the folder of images, with '/', in ascending order.
        vectors: `[n, D]`, float32, of unit length, in this order.
    """

    model: str
    files: dict[str, tuple[int, int]]
    vectors: Tensor


def fingerprint(model: PooledModel) -> str:
    """SHA-256 of what the pooled vectors of images depend on: arguments, weights and preprocessing
    of a model; not the classifier or the batch norm before it."""
    weights = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith(('classifier.', 'pre_norm.'))
    }
    ignored = ('pre_norm', 'backbone_weights')
    arguments = {key: value for key, value in model._model_args.items() if key not in ignored}
    about = [digest(weights), arguments, timm.data.resolve_model_data_config(model)]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def save_index(index: Index, folder: str | Path) -> None:
    """Write an index into a folder, in place of the one that is there."""
    folder = Path(folder)
    entries = [[path, *about] for path, about in index.files.items()]
    files = torch.frombuffer(bytearray(json.dumps(entries).encode()), dtype=torch.uint8)
    tensors = {'vectors': index.vectors.contiguous(), 'files': files}
    about = {'format': FORMAT, 'model': index.model, 'sha256': digest(tensors)}
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, folder / FILE, about)


def load_index(folder: str | Path, model: PooledModel) -> Index | None:
    """The index of a folder, None if there is none.

    Raises:
        LoadError: it is damaged, of another model, or holds what no index of a folder can.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return None
    advice = f"Delete '{path}', or give another folder for the index."
    try:
        with safe_open(path, framework='pt') as file:
            about = file.metadata() or {}
            if about.get('format') != FORMAT:
                raise ValueError(f'its format is {about.get("format")!a:.60}, not {FORMAT!r}')
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if digest(tensors) != about.get('sha256'):
            raise ValueError('its content is not what was written')
        files, vectors = _read(tensors)
    except (OSError, RecursionError, SafetensorError, ValueError) as error:
        raise LoadError(f"The index '{path}' cannot be read: {error}. {advice}") from error
    wanted = fingerprint(model)
    if about.get('model') != wanted or vectors.shape[1] != model.head_hidden_size:
        raise LoadError(
            f"The index '{path}' is of another model, not of {wanted:.10}, this "
            f'one, whose vectors cannot be compared with its own. {advice}'
        )
    return Index(wanted, files, vectors)


def update_index(
    folder: str | Path,
    gallery: str | Path,
    model: PooledModel,
    *,
    batch_size: int = 32,
    workers: int = 2,
    save_every: float = 10.0,
    progress: bool | None = None,
) -> tuple[Index, list[str]]:
    """Make an index, or bring it up to date: images that are new, or whose size or time of change
    is another, are embedded, and those that are gone are dropped.

    What was interrupted continues where it was saved last, and ends with the same vectors, to the
    bit: images are batched by their place among all images of the gallery.

    Args:
        folder: of the index; made if it does not exist.
        gallery: folder of images, with subfolders.
        model: a `PooledModel`, on any device.
        batch_size: images at a time.
        workers: processes that read files.
        save_every: seconds of work that may be lost; more where saving takes longer.
        progress: show a bar; None for only on a terminal.

    Returns:
        The index, and what is wrong with each image that was skipped.

    Raises:
        LoadError: see `load_index`.
        ValueError: no images, none that can be embedded, an index of other images, or one that
            another process is writing.
    """
    folder, gallery = Path(folder), Path(gallery)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / '.lock', timeout=0)
    try:
        with lock:
            update = _Update(folder, gallery, model)
            return update.run(batch_size, workers, save_every, progress)
    except Timeout as error:
        raise ValueError(f"Another process is writing the index in '{folder}'.") from error


def list_images(folder: Path) -> dict[str, tuple[int, int]]:
    """Size in bytes and time of the last change, in nanoseconds, of all images of a folder and of
    its subfolders, by their paths in it, in ascending order; -1 for those that are not there, such
    as broken links. ValueError if there are none."""
    files, known = {}, endings()
    for path in folder.rglob('*'):
        if path.suffix.lower() in known:
            try:
                status = path.stat()
            except OSError:
                files[path.relative_to(folder).as_posix()] = (-1, -1)
                continue
            if not path.is_dir():
                about = (status.st_size, status.st_mtime_ns)
                files[path.relative_to(folder).as_posix()] = about
    if not files:
        raise ValueError(f"'{folder}' is no folder, or holds no image ({' '.join(known)}).")
    return dict(sorted(files.items()))


def embed_files(
    model: PooledModel, batches: Sequence[Sequence[Path]], workers: int = 0
) -> Iterator[tuple[dict[Path, Tensor], list[str]]]:
    """Vectors `[D]` of the images of each batch, without those that are skipped: that cannot be
    read, or whose vector is zero, NaN or infinite; and what is wrong with each of those."""
    loader = DataLoader(_Batches(batches, model), batch_size=None, num_workers=workers)
    for paths, x, problems in loader:
        vectors, more = embed_prepared(model, paths, x) if paths else ({}, [])
        yield vectors, problems + more


class _Update:
    """An index while it is brought up to date."""

    def __init__(self, folder: Path, gallery: Path, model: PooledModel) -> None:
        self.folder, self.gallery, self.model = folder, gallery, model
        self.files = list_images(gallery)
        self.fingerprint = fingerprint(model)
        old = load_index(folder, model)
        self.vectors: dict[str, Tensor] = {}
        if old is not None:
            pairs = zip(old.files.items(), old.vectors, strict=True)
            self.vectors = {p: vector for (p, about), vector in pairs if self.files.get(p) == about}
            if old.files and not self.files.keys() & old.files.keys():
                raise ValueError(
                    f"The index in '{folder}' is of other images: none of its {len(old.files)} is "
                    f"in '{gallery}'. Give another folder for the index, or delete it."
                )
        self.is_saved = old is not None and len(old.files) == len(self.vectors)

    def run(
        self, batch_size: int, workers: int, save_every: float, progress: bool | None
    ) -> tuple[Index, list[str]]:
        paths, problems = list(self.files), []
        batches = [
            [self.gallery / path for path in paths[i : i + batch_size] if path not in self.vectors]
            for i in range(0, len(paths), batch_size)
        ]
        batches = [batch for batch in batches if batch]
        bar = tqdm(
            total=sum(map(len, batches)), desc='index', unit='image',
            disable=None if progress is None else not progress,
        )  # fmt: skip
        due = time.monotonic() + save_every
        try:
            for batch, (vectors, wrong) in zip(
                batches, embed_files(self.model, batches, workers), strict=True
            ):
                for path, vector in vectors.items():
                    self.vectors[path.relative_to(self.gallery).as_posix()] = vector
                    self.is_saved = False
                problems += wrong
                bar.update(len(batch))
                if time.monotonic() >= due:
                    started = time.monotonic()
                    self.save()
                    took = time.monotonic() - started
                    due = time.monotonic() + max(save_every, took / SHARE_OF_SAVING)
        finally:  # an interruption loses nothing
            bar.close()
            self.save()
        if not self.vectors:
            raise ValueError(f"No image of '{self.gallery}' can be embedded: {problems[0]}")
        return self.index(), problems

    def index(self) -> Index:
        paths = [path for path in self.files if path in self.vectors]
        files = {path: self.files[path] for path in paths}
        return Index(self.fingerprint, files, torch.stack([self.vectors[path] for path in paths]))

    def save(self) -> None:
        if self.vectors and not self.is_saved:
            save_index(self.index(), self.folder)
            self.is_saved = True


def _read(tensors: dict[str, Tensor]) -> tuple[dict[str, tuple[int, int]], Tensor]:
    """Files and vectors of a file that anybody may have written; a ValueError unless they can be
    those of an index."""
    kinds = {name: (tensor.dtype, tensor.ndim) for name, tensor in tensors.items()}
    if kinds != {'vectors': (torch.float32, 2), 'files': (torch.uint8, 1)}:
        raise ValueError('it holds other tensors than an index')
    vectors = check_vectors(tensors['vectors'], 'its vectors')
    if len(tensors['files']) > LONGEST_ENTRY * len(vectors):
        raise ValueError('its list of images is too long')
    entries = json.loads(tensors['files'].numpy().tobytes())
    if not isinstance(entries, list) or len(entries) != len(vectors):
        raise ValueError(f'it does not list {len(vectors)} images')
    files = {}
    for entry in entries:
        if not _is_entry(entry):
            raise ValueError(
                f'it lists {entry!a:.200}, which is no path in a folder with two numbers'
            )
        files[entry[0]] = (entry[1], entry[2])
    if list(files) != sorted(files) or len(files) != len(entries):
        raise ValueError('its images are not in order')
    return files, vectors


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[0], str):
        return False
    path = Path(entry[0])
    is_inside = not path.anchor and '..' not in path.parts and '\0' not in entry[0]
    is_plain = path.as_posix() == entry[0] != '.'
    return is_inside and is_plain and all(type(n) is int and abs(n) < 2**63 for n in entry[1:])


class _Batches(Dataset[tuple[list[Path], Tensor, list[str]]]):
    """Batches of files, each prepared as a whole by one process: the paths of images that can be
    read, these images `[B, C, H, W]`, and what is wrong with the others."""

    def __init__(self, batches: Sequence[Sequence[Path]], model: PooledModel) -> None:
        self.batches, self.prepared = batches, Prepared([], model)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> tuple[list[Path], Tensor, list[str]]:
        images, problems = {}, []
        for path in self.batches[i]:
            try:
                images[path] = self.prepared.prepare(path)
            except ValueError as error:
                problems.append(str(error))
        x = torch.stack([*images.values()]) if images else torch.empty(0)
        return list(images), x, problems


def embed_prepared(
    model: PooledModel, paths: Sequence[Path], x: Tensor
) -> tuple[dict[Path, Tensor], list[str]]:
    """Vectors of those images that have one of unit length, and what is wrong with the others."""
    try:
        vectors = check_vectors(embed(model, x, batch_size=len(x), progress=False), 'its vectors')
        return dict(zip(paths, vectors, strict=True)), []
    except ValueError:
        if len(paths) == 1:
            return {}, [f"the model's output is zero, NaN or infinite for '{paths[0]}'."]
    good: dict[Path, Tensor] = {}
    problems = []
    for path, image in zip(paths, x, strict=True):
        vectors_of_one, wrong = embed_prepared(model, [path], image[None])
        good |= vectors_of_one
        problems += wrong
    return good, problems
