"""Image files: as timm reads them, or an error that names the file, at once."""

from __future__ import annotations

import builtins
import re

import numpy as np
import pytest
from hostile_files import NO_IMAGES, write_nan
from limits import within
from PIL import Image

from timm_fisher.explain import read_image
from timm_fisher.images import convert, open_image


def test_image_is_not_turned_by_its_exif(tmp_path):
    """As in training and evaluation, by timm's readers."""
    pixels = np.random.default_rng(0).integers(256, size=(70, 90, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.fromarray(pixels).save(tmp_path / 'turned.png', exif=exif)
    assert np.array_equal(read_image(tmp_path / 'turned.png'), pixels)
    grey = read_image(str(tmp_path / 'turned.png'), 1)
    assert (grey.mode, grey.size) == ('L', (90, 70))


@pytest.mark.parametrize('content', [b'text', b'', None])
def test_file_that_is_no_image(tmp_path, content):
    path = tmp_path / 'x.png'
    if content is None:
        Image.new('RGB', (50, 50)).save(path)
        content = path.read_bytes()[:-40]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^'{re.escape(str(path))}' cannot be read as an image"):
        read_image(path)


@pytest.mark.parametrize('kind', NO_IMAGES)
def test_files_that_hang_or_burst(tmp_path, kind):
    path = tmp_path / 'x.png'
    write, reason = NO_IMAGES[kind]
    write(path)
    with within(5), pytest.raises(ValueError, match=f"^'{path}' cannot be read .*{reason}"):
        read_image(path)


def test_folder_and_file_without_permission(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=f"^'{tmp_path}' .* it is not a regular file"):
        read_image(tmp_path)

    def refuse(file, *arguments, **options):
        raise PermissionError(13, 'Permission denied')

    path = tmp_path / 'x.png'
    Image.new('L', (5, 5)).save(path)
    monkeypatch.setattr(builtins, 'open', refuse)  # root may read everything
    with pytest.raises(ValueError, match=f"^'{path}' .*Permission denied"):
        read_image(path)


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_pixels_that_are_not_finite(tmp_path, value):
    """Pillow makes black and white ones of them, without a word."""
    path = tmp_path / 'x.tif'
    write_nan(path, value)
    with open_image(path) as image:
        assert image.mode == 'F'
    with pytest.raises(ValueError, match=f"^'{path}' .*NaN or infinite pixels"):
        read_image(path)
    assert convert(Image.fromarray(np.full((4, 4), 7, np.float32)), 'L').getpixel((1, 1)) == 7
