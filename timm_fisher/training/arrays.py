"""Images in files of arrays, FILE.npz."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset


@dataclass(eq=False)
class ArrayImages(Dataset[tuple[Image.Image, int]]):
    """Images in one array, uint8 `[n, H, W]` or `[n, H, W, C]`, and their classes `[n]`."""

    pixels: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[i]), int(self.targets[i])


def read_arrays(file: str) -> dict[str, np.ndarray]:
    """All arrays of an .npz file, by name. ValueError if it is none."""
    with _opened(file) as arrays:
        return {key: arrays[key] for key in arrays.files}


def array_names(file: str) -> list[str]:
    """Their names alone, without reading them; errors as those of `read_arrays`."""
    with _opened(file) as arrays:
        return list(arrays.files)


@contextmanager
def _opened(file: str) -> Iterator[Any]:
    if not os.path.isfile(file):
        raise ValueError(f"'{file}' is not a file; give --data-dir FILE.npz.")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            yield arrays
    except (AttributeError, EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"'{file}' cannot be read as an .npz file of arrays: {error}") from error


def to_pixels(x: np.ndarray, top: float, where: str) -> np.ndarray:
    """uint8 `[n, H, W]` or `[n, H, W, C]`; `top` is the largest value of the whole file.
    ValueError, which says `where`, for what are no images."""
    if x.ndim not in (3, 4) or not x.size or (x.ndim == 4 and x.shape[3] not in (1, 3, 4)):
        raise ValueError(
            f'{where} has shape {list(x.shape)}; images are [n, H, W] or [n, H, W, C] with 1, 3 or '
            '4 channels C.'
        )
    if x.dtype.kind == 'f' and not np.isfinite(x).all():
        bad = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(1))
        raise ValueError(
            f'{where} has NaN or infinite values in {len(bad)} of {len(x)} images, the first of '
            f'them number {bad[0]}.'
        )
    if x.dtype.kind == 'f' and x.min() >= 0 and top <= 1:
        x = np.rint(x * 255).astype(np.uint8)
    elif x.dtype == np.uint8 and top <= 1:  # binary
        x = x * np.uint8(255)
    elif x.dtype != np.uint8:
        values = f' from {x.min():g} to {x.max():g}' if x.dtype.kind in 'fiu' else ''
        raise ValueError(
            f'{where} is {x.dtype}{values}; images are uint8 from 0 to 255 or floating-point from '
            '0 to 1.'
        )
    return x[..., 0] if x.ndim == 4 and x.shape[3] == 1 else x
