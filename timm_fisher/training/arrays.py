"""Images and labels from a file of arrays, FILE.npz."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset

from timm_fisher.training.config import Config


class ArrayImages(Dataset[tuple[Image.Image, int]]):
    """Images in one array, turned into pictures when they are asked for.

    Args:
        pixels: uint8 `[n, H, W]`, or `[n, H, W, C]` with 3 or 4 channels.
        labels: their classes `[n]`.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.pixels, self.labels = pixels, labels
        digest = hashlib.sha256(repr(pixels.shape).encode())
        digest.update(np.ascontiguousarray(pixels).data)
        self.fingerprint = digest.digest()

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[i]), int(self.labels[i])


def load_arrays(config: Config) -> tuple[dict[str, tuple[ArrayImages, np.ndarray]], list[str]]:
    """The images of the splits 'train' and 'test', with the places of those that are meant; and the
    classes, `str` of the labels.

    The file `config.data_dir` holds `x_train`, `y_train`, `x_test` and `y_test`; or `x` and `y`, of
    which `config.test_fraction` or, with `config.folds`, one fold is the test split. Images are
    `[n, H, W]` or `[n, H, W, C]` with 1, 3 or 4 channels, uint8 or floating-point from 0 to 1;
    uint8 images without a value above 1 are taken for binary. Labels are `[n]`, integers or
    strings; where no stage reads them they may be missing.

    Raises:
        ValueError: the file cannot be read, lacks an array, or holds one that is not as above.
    """
    arrays = _read(Path(config.data_dir))
    has_test_split = 'x_train' in arrays
    pairs = [('x_train', 'y_train'), ('x_test', 'y_test')] if has_test_split else [('x', 'y')]
    if has_test_split and config.folds:
        raise ValueError(
            f"'{config.data_dir}' has a test split of its own (x_test); {config.folds} folds need "
            'a file with x and y alone.'
        )
    if config.test_split is None:
        pairs = pairs[:1]
    if config.unsupervised and any(y not in arrays for _, y in pairs):
        arrays |= {y: np.zeros(arrays[x].shape[:1], int) for x, y in pairs if x in arrays}
    for key in (key for pair in pairs for key in pair):
        if key not in arrays:
            raise ValueError(
                f"'{config.data_dir}' has no array '{key}', only {sorted(arrays)}. It must hold "
                'x_train, y_train, x_test and y_test, or x and y.'
            )
    numeric = [arrays[x] for x, _ in pairs if arrays[x].dtype.kind in 'fiu']
    top = max((array.max(initial=0) for array in numeric), default=0)
    names = np.unique(arrays[pairs[0][1]])
    images = []
    for x, y in pairs:
        labels = _check_labels(arrays[y], arrays[x].shape[:1], f"'{y}' in '{config.data_dir}'")
        unknown = np.setdiff1d(labels, names)
        if len(unknown):
            raise ValueError(
                f"'{y}' in '{config.data_dir}' has classes that training lacks: {unknown.tolist()}."
            )
        pixels = _to_pixels(arrays[x], top, f"'{x}' in '{config.data_dir}'")
        images.append(ArrayImages(pixels, np.searchsorted(names, labels)))
    parts = [(dataset, np.arange(len(dataset))) for dataset in images]
    if not has_test_split and config.test_split is not None:
        test = _test_part(images[0].labels, config)
        parts = [(images[0], np.flatnonzero(~test)), (images[0], np.flatnonzero(test))]
    return dict(zip(('train', 'test'), parts, strict=False)), [str(name) for name in names]


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, without pickles."""
    if not path.is_file():
        raise ValueError(f"'{path}' is no file; --dataset npz needs --data-dir FILE.npz.")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (AttributeError, EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"'{path}' cannot be read as an .npz file of arrays: {error}") from error


def _check_labels(y: np.ndarray, shape: tuple[int, ...], where: str) -> np.ndarray:
    if y.shape != shape or y.dtype.kind not in 'iuU':
        raise ValueError(
            f'{where} must hold one label for each image, shape {list(shape)}, integers or '
            f'strings; it is {y.dtype} of shape {list(y.shape)}.'
        )
    return y


def _to_pixels(x: np.ndarray, top: float, where: str) -> np.ndarray:
    """uint8 `[n, H, W]` or `[n, H, W, C]`; `top` is the largest value of the whole file."""
    if x.ndim not in (3, 4) or not x.size or (x.ndim == 4 and x.shape[3] not in (1, 3, 4)):
        raise ValueError(
            f'{where} has shape {list(x.shape)}; images are [n, H, W] or [n, H, W, C] with 1, 3 or '
            '4 channels C.'
        )
    if x.dtype.kind == 'f' and x.min() >= 0 and top <= 1:
        x = np.rint(x * 255).astype(np.uint8)
    elif x.dtype == np.uint8 and top <= 1:
        x = x * np.uint8(255)
    elif x.dtype != np.uint8:
        values = f' from {x.min():g} to {x.max():g}' if x.dtype.kind in 'fiu' else ''
        raise ValueError(
            f'{where} is {x.dtype}{values}; images are uint8 from 0 to 255 or floating-point from '
            '0 to 1.'
        )
    return x[..., 0] if x.ndim == 4 and x.shape[3] == 1 else x


def _test_part(labels: np.ndarray, config: Config) -> np.ndarray:
    """Which images of a data set without a test split are it, a mask; the same on every call."""
    order = np.random.default_rng(0).permutation(len(labels))
    if config.folds:
        if not 2 <= config.folds <= len(labels) or not 0 <= config.fold < config.folds:
            raise ValueError(
                f'fold {config.fold} of {config.folds} folds does not exist for {len(labels)} '
                f'images: give 2 folds or more, and a fold from 0 to {config.folds - 1}.'
            )
        # Dealt out class by class: unlike scikit-learn's, more folds than a class has images.
        test = np.zeros(len(labels), dtype=bool)
        test[order[np.argsort(labels[order], kind='stable')][config.fold :: config.folds]] = True
        return test
    try:
        _, chosen = train_test_split(
            order, test_size=config.test_fraction, stratify=labels[order], random_state=0
        )
    except ValueError as error:
        raise ValueError(
            f'No test split of {config.test_fraction:.0%} can be taken from the {len(labels)} '
            f"images of '{config.data_dir}': {error}"
        ) from error
    return np.isin(np.arange(len(labels)), chosen)
