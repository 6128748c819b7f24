"""Image files, read as timm reads them; whatever is wrong with one is an error that names it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import timm
from PIL import Image


def endings() -> tuple[str, ...]:
    """Of files that are taken for images where a folder or a shard is searched for them."""
    return (*timm.data.get_img_extensions(), '.webp')


def read_image(path: str | Path, channels: int = 3) -> Image.Image:
    """An image file, in colour or of one channel in grey; as timm reads it, which does not turn a
    photograph upright by its EXIF. ValueError if it cannot be read as an image."""
    with open_image(path) as image:
        return convert(image, 'L' if channels == 1 else 'RGB')


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """An image file of which the header has been read. ValueError, also for what goes wrong while
    it is open, if it is no image, larger than twice `PIL.Image.MAX_IMAGE_PIXELS`, or no regular
    file."""
    try:
        # To open a pipe waits for its writer, and a device may never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError('it is not a regular file')
        with Image.open(path) as image:
            yield image
    except Exception as error:  # Pillow's decoders raise what they like
        raise ValueError(f"'{path}' cannot be read as an image: {error}") from error


def convert(image: Image.Image, mode: str) -> Image.Image:
    """An image in another mode. ValueError if it has NaN or infinite pixels, of which Pillow would
    make black and white ones."""
    if image.mode == 'F' and not np.isfinite(np.asarray(image)).all():
        raise ValueError('it has NaN or infinite pixels')
    return image.convert(mode)
