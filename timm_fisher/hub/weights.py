"""The weights of a saved model: found, held against the model by their header, then read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from timm_fisher.backbone import WEIGHTS, is_counter
from timm_fisher.errors import LoadError, explain_errors
from timm_fisher.hub.replace import check_whole

LONGEST_HEADER = 2**24  # bytes; timm's largest models have less than one MiB
# Types in a file that may stand for the types of a model.
_FLOATS = ('F64', 'F32', 'F16', 'BF16')
_OTHERS = {
    torch.bool: ('BOOL',), torch.uint8: ('U8',), torch.int8: ('I8',), torch.int16: ('I16',),
    torch.int32: ('I32',), torch.int64: ('I64',),
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """What a safetensors file of a folder or repository (`where`) holds: type and shape of each
    tensor, by its name in the model, which is `prefix` and its name in the file."""

    path: Path
    where: str
    prefix: str
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]


def find_file(name: str, source: str, place: str, cache_dir: str | Path | None) -> Path:
    """A file of a saved model, downloaded if it is on the Hub.

    Args:
        name: of the file.
        source: 'hf-hub' or 'local-dir'.
        place: repository, with its revision after '@' if there is one; or folder.
        cache_dir: of downloads.

    Raises:
        LoadError: there is none, a save was interrupted or is still running, or the Hub cannot be
            reached.
    """
    if source == 'hf-hub':
        repo_id, _, revision = place.partition('@')
        with explain_errors(f"Downloading {name} of '{place}'"):
            return Path(
                hf_hub_download(repo_id, name, revision=revision or None, cache_dir=cache_dir)
            )
    check_whole(Path(place))
    path = Path(place, name)
    if not path.is_file():
        raise LoadError(
            f"'{place}' holds no {name}. The model of a run is in its folder model/. Save others "
            'by timm_fisher.save_pretrained, or by timm.models.save_for_hf(model, folder, '
            'safe_serialization=True).'
        )
    return path


def read_header(
    source: str, place: str, cache_dir: str | Path | None = None, prefix: str = ''
) -> Header:
    """Types and shapes of the stored tensors, without reading them; see `find_file`.

    Raises:
        LoadError: there is no file, it is damaged, or its header is too long.
    """
    path = find_file(WEIGHTS, source, place, cache_dir)
    with path.open('rb') as file:
        length = int.from_bytes(file.read(8), 'little')
    if length > LONGEST_HEADER:
        raise LoadError(
            f"The weights of '{place}' are refused: their header has {length} bytes; at most "
            f'{LONGEST_HEADER} are allowed.'
        )
    tensors = {}
    try:
        with safe_open(path, framework='pt') as file:
            for name in file.keys():  # noqa: SIM118
                stored = file.get_slice(name)
                tensors[f'{prefix}{name}'] = (stored.get_dtype(), tuple(stored.get_shape()))
    except SafetensorError as error:
        raise LoadError(
            f"The weights of '{place}' are damaged or cut short, nothing was loaded: {error}. "
            'Copy or download them again.'
        ) from error
    return Header(path, place, prefix, tensors)


def check_tensors(header: Header, expected: Mapping[str, Tensor], what: str) -> None:
    """Refuse a file whose tensors are not exactly those of a model.

    One floating-point type may stand for another, nothing else for another type. The file of a
    backbone, which has a prefix, may hold more than the model reads, such as timm's classifier, and
    may lack counters of batches.

    Args:
        header: of the file.
        expected: what the model reads from it, by name, on the meta device.
        what: describes the model, for the LoadError.
    """
    given, problems = header.tensors, []
    for name, wanted in expected.items():
        kind, shape = given.get(name, ('', None))
        allowed = _FLOATS if wanted.is_floating_point() else _OTHERS.get(wanted.dtype, ())
        if shape is None:
            if not (header.prefix and is_counter(name)):
                problems.append(f'missing {name} {tuple(wanted.shape)}')
        elif shape != tuple(wanted.shape):
            problems.append(f'{name} is {shape}, not {tuple(wanted.shape)}')
        elif kind not in allowed:
            problems.append(f'{name} is of type {kind}, not {wanted.dtype}')
    if not header.prefix:
        unexpected = sorted(given.keys() - expected.keys())
        problems += [f'unexpected {key:.200} {given[key][1]}' for key in unexpected]
    if problems:
        shown = '\n  '.join(problems[:20] + ['...'] * (len(problems) > 20))
        raise LoadError(
            f"The weights of '{header.where}' are not of this model ({what}), nothing was loaded; "
            f'{len(problems)} differences:\n  {shown}'
        )


def read_tensors(header: Header, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file that has been checked, in the types of the model; a LoadError if a
    value is NaN or infinite."""
    tensors = {}
    with safe_open(header.path, framework='pt') as file:
        for name, wanted in expected.items():
            if name not in header.tensors:  # a counter
                tensors[name] = torch.zeros(wanted.shape, dtype=wanted.dtype)
                continue
            # A copy: the file may change while the model lives.
            stored = file.get_tensor(name.removeprefix(header.prefix))
            value = stored.to(wanted.dtype, copy=True)
            if not is_finite(value):
                raise LoadError(
                    f"The weights of '{header.where}' are refused: {name} holds NaN or infinite "
                    'values. Nothing was loaded.'
                )
            tensors[name] = value
    return tensors


def is_finite(value: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinite value."""
    if not value.is_floating_point() or not value.numel():
        return True
    return bool(torch.stack(value.detach().aminmax()).isfinite().all())
