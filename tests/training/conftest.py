"""Small sets of images, and the files that a test may damage."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import write_images


@pytest.fixture
def few_images(tmp_path):
    """24 training images, 9 for validation."""
    return write_images(tmp_path / 'few', train=8, val=3)


@pytest.fixture
def few(tmp_path):
    """12 training and 6 validation images."""
    return write_images(tmp_path / 'few', train=4, val=2)


@pytest.fixture
def npz(tmp_path):
    """`npz(x=..., y=...)` writes a file of arrays."""

    def write(**arrays):
        np.savez(tmp_path / 'arrays.npz', **arrays)
        return tmp_path / 'arrays.npz'

    return write
