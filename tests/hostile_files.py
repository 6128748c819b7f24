"""Files with the name of an image that are none, and that tests put among images."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from timm_fisher.descriptors import StageDescriptors

# How each is made, and what the error says.
NO_IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    'fifo': (os.mkfifo, 'it is not a regular file'),
    'socket': (lambda path: os.mknod(path, stat.S_IFSOCK | 0o600), 'it is not a regular file'),
    'device': (lambda path: path.symlink_to('/dev/zero'), 'it is not a regular file'),
    'broken link': (lambda path: path.symlink_to('nowhere'), 'No such file'),
    'link to itself': (lambda path: path.symlink_to(path), 'Too many levels of symbolic links'),
    # 400 million pixels, of which the header alone is there.
    'bomb': (lambda path: path.write_bytes(b'P6 20000 20000 255\n'), 'decompression bomb'),
    'text': (lambda path: path.write_text('text'), 'cannot identify image file'),
}


def write_nan(path: Path, value: float = np.nan) -> None:
    """A photograph in floating point of which one pixel is none: its header is fine."""
    pixels = np.full((32, 32), 99, np.float32)
    pixels[3, 4] = value
    Image.fromarray(pixels).save(path, format='TIFF')


def make_black_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backbones give NaN for images that are black."""
    features = StageDescriptors.features

    def nan_for_black(self: StageDescriptors, backbone: object, images: torch.Tensor) -> object:
        black = (images.flatten(1).amax(1) <= -1)[:, None, None, None]  # preprocessed
        return [x.where(~black, torch.nan) for x in features(self, backbone, images)]

    monkeypatch.setattr(StageDescriptors, 'features', nan_for_black)
