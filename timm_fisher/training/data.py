"""Images to train on: splits of a data set, checks before training starts, transforms."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset

from timm_fisher.registry import check_arguments
from timm_fisher.training.arrays import ArrayImages, load_arrays
from timm_fisher.training.config import Config

# What a data set holds: images, a backbone's features of them, or pooled vectors.
Gives = Literal['images', 'features', 'pooled']


@dataclass
class Split:
    """Some images of a data set, undecoded.

    Attributes:
        dataset: of timm or torchvision, or `ArrayImages`.
        indices: which of its images.
        labels: their classes `[len(indices)]`.
    """

    dataset: Any
    indices: np.ndarray
    labels: np.ndarray

    def take(self, part: np.ndarray) -> Split:
        """Some of its images, by their places in the split."""
        return Split(self.dataset, self.indices[part], self.labels[part])

    def fingerprint(self) -> str:
        """Changes when the images do."""
        reader: Any = getattr(self.dataset, 'reader', None)
        digest = hashlib.sha256(self.indices.tobytes() + self.labels.tobytes())
        for path, _ in getattr(reader, 'samples', ()):
            stat = os.stat(path)
            digest.update(f'{path} {stat.st_size} {stat.st_mtime_ns}'.encode())
        if isinstance(self.dataset, ArrayImages):
            digest.update(self.dataset.fingerprint)
        elif hasattr(reader, 'dataset'):
            digest.update(reader.dataset._fingerprint.encode())
        elif reader is None:  # of torchvision, whose repr gives root and split
            digest.update(repr(self.dataset).encode())
        return digest.hexdigest()


class Images(Dataset[tuple[Tensor, int]]):
    """A split through a transform. An image that cannot be decoded is an error that names it;
    timm's own data set would take the next image in its place."""

    gives: Gives = 'images'

    def __init__(self, split: Split, transform: Callable[[Image.Image], Tensor], mode: str) -> None:
        self.split, self.transform, self.mode = split, transform, mode

    def __len__(self) -> int:
        return len(self.split.indices)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        dataset, index = self.split.dataset, int(self.split.indices[i])
        reader = getattr(dataset, 'reader', None)
        try:
            if reader is None:
                image = dataset[index][0].convert(self.mode)
            else:
                with reader[index][0] as file:
                    image = Image.open(file).convert(self.mode)
        except (OSError, SyntaxError) as error:
            name = f'number {index}' if reader is None else reader.filename(index, absolute=True)
            raise ValueError(f"Image '{name}' cannot be decoded ({error}). Remove it.") from error
        return self.transform(image), int(self.split.labels[i])


def load_splits(config: Config) -> tuple[dict[str, Split], list[str]]:
    """The splits 'train', 'val' and, if there is one, 'test'; and the names of the classes.

    Where all stages are unsupervised, labels may be missing or all the same, and have no say in
    what is carved off for validation.

    Raises:
        ValueError: a folder that is missing, empty or holds one class, classes that the training
            split lacks, files that are no images, or arrays that are none.
    """
    if config.dataset == 'digits':
        splits, classes = _load_digits()
    elif config.dataset == 'npz':
        parts, classes = load_arrays(config)
        splits = {name: Split(x, places, x.labels[places]) for name, (x, places) in parts.items()}
    else:
        splits, classes = _load_timm(config)
    for name, limit in (('train', config.max_train), ('test', config.max_test)):
        if limit is not None and name in splits and limit < len(splits[name].indices):
            order = np.random.default_rng(0).permutation(len(splits[name].indices))
            splits[name] = splits[name].take(np.sort(order[:limit]))
    if 'val' not in splits:
        train = splits['train']
        try:
            kept, carved = train_test_split(
                np.arange(len(train.indices)),
                test_size=config.val_fraction,
                stratify=None if config.unsupervised else train.labels,
                random_state=config.seed,
            )
        except ValueError as error:
            raise ValueError(
                f'No validation set of {config.val_fraction:.0%} can be carved from the '
                f'{len(train.indices)} training images: {error}'
            ) from error
        splits['train'] = train.take(np.sort(kept))
        splits['val'] = train.take(np.sort(carved))
    prints = {name: split.fingerprint() for name, split in splits.items()}
    for name, other in combinations(prints, 2):
        if prints[name] == prints[other]:
            raise ValueError(
                f"The splits '{name}' and '{other}' hold the same images. Where a data set has two "
                'splits only, --val_split null carves validation images from the training split.'
            )
    if len(classes) < 2 and not config.unsupervised:
        raise ValueError(
            f"The training images of '{config.data_dir or config.dataset}' are all of one class, "
            f'{classes}. Training needs two or more: one subfolder per class.'
        )
    return splits, classes


def _load_digits() -> tuple[dict[str, Split], list[str]]:
    """scikit-learn's 1797 digits of 8 x 8: 60 % train, 15 % val, 25 % test, always the same."""
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).astype(np.uint8)
    dataset = ArrayImages(pixels, digits.target)
    everything = np.arange(len(dataset))
    rest, test = train_test_split(
        everything, test_size=0.25, stratify=digits.target, random_state=0
    )
    train, val = train_test_split(rest, test_size=0.2, stratify=digits.target[rest], random_state=0)
    parts = {'train': train, 'val': val, 'test': test}
    whole = Split(dataset, everything, digits.target)
    splits = {name: whole.take(np.sort(part)) for name, part in parts.items()}
    return splits, [str(digit) for digit in range(10)]


def _load_timm(config: Config) -> tuple[dict[str, Split], list[str]]:
    names = {'train': config.train_split, 'val': config.val_split, 'test': config.test_split}
    splits: dict[str, Split] = {}
    class_to_index: dict[str, int] | None = None
    for role, name in names.items():
        if name is None:
            continue
        if config.dataset:
            splits[role] = _whole(_create_dataset(config.dataset, config.data_dir, name))
        else:
            advice = '' if role == 'train' else f'Training goes without by --{role}_split null.'
            splits[role] = load_folder(config.data_dir, name, class_to_index, advice=advice)
        if role == 'train':
            dataset = splits[role].dataset
            class_to_index = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
    if class_to_index:
        classes = sorted(class_to_index, key=class_to_index.__getitem__)
    else:
        classes = [str(label) for label in range(int(splits['train'].labels.max()) + 1)]
    return splits, classes


def load_folder(
    data_dir: str, name: str, known: dict[str, int] | None = None, *, advice: str = ''
) -> Split:
    """One split of a folder, all images DATA_DIR/NAME/CLASS/IMAGE.

    Args:
        data_dir: the folder.
        name: of the split.
        known: index of each class that there may be; None for those of the split itself, sorted.
        advice: what to do if there is no such folder.

    Raises:
        ValueError: as `load_splits`.
    """
    folder = Path(data_dir, name)
    if not folder.is_dir():
        raise ValueError(
            f"'{folder}' is no folder; --data-dir must hold {name}/CLASS/IMAGE. {advice}".rstrip()
        )
    dataset = _create_dataset('', data_dir, name)
    if known is not None:
        unknown = sorted(set(dataset.reader.class_to_idx) - set(known))
        if unknown:
            raise ValueError(
                f"The split '{name}' has classes that training lacks: {unknown}. It had "
                f'{list(known)}.'
            )
        dataset = _create_dataset('', data_dir, name, class_map=known)
    _refuse_unreadable([path for path, _ in dataset.reader.samples])
    return _whole(dataset)


def _create_dataset(dataset: str, data_dir: str, split: str, **options: Any) -> Any:
    try:
        return timm.data.create_dataset(dataset, data_dir, split=split, **options)
    except RuntimeError as error:
        raise ValueError(f"The split '{split}' of '{data_dir or dataset}': {error}") from error


def _whole(dataset: Any) -> Split:
    labels = _labels(dataset)
    return Split(dataset, np.arange(len(labels)), labels)


def _labels(dataset: Any) -> np.ndarray:
    """All labels of a data set, without decoding its images."""
    reader: Any = getattr(dataset, 'reader', None)
    if hasattr(reader, 'samples'):
        return np.array([label for _, label in reader.samples])
    if hasattr(reader, 'dataset'):
        return np.array(reader.dataset[reader.label_key])
    if hasattr(dataset, 'targets'):
        return np.array(dataset.targets)
    return np.array([dataset[i][1] for i in range(len(dataset))])


def _refuse_unreadable(paths: list[str]) -> None:
    """Read each file's header. What is cut short later in the file shows when it is decoded."""

    def problem(path: str) -> str | None:
        try:
            with Image.open(path):
                return None
        except (OSError, SyntaxError) as error:
            return f'{path} ({error})'

    with ThreadPoolExecutor() as threads:
        bad = [text for text in threads.map(problem, paths) if text]
    if bad:
        shown = '\n  '.join(bad[:10] + ['...'] * (len(bad) > 10))
        raise ValueError(f'{len(bad)} files cannot be read as images. Remove them:\n  {shown}')


def create_datasets(
    config: Config, splits: dict[str, Split], data_config: dict[str, Any]
) -> dict[str, Images]:
    """Data sets by split name, without augmentation; and 'augmented', the training split, if it is
    there, with it.

    Args:
        config: for its `augment`.
        splits: from `load_splits`.
        data_config: from `timm.data.resolve_input_data_config`.

    Raises:
        TypeError: an argument in `augment` that timm.data.create_transform does not have.
    """
    mode = 'L' if data_config['input_size'][0] == 1 else 'RGB'
    keys = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    shape = {key: data_config[key] for key in keys}
    plain = timm.data.create_transform(**shape)
    datasets = {name: Images(split, plain, mode) for name, split in splits.items()}
    if config.augment is not None:
        check_arguments(
            'augment', timm.data.create_transform, config.augment, given=(*keys, 'is_training')
        )
        augmenting = timm.data.create_transform(**shape, is_training=True, **config.augment)
        datasets['augmented'] = Images(splits['train'], augmenting, mode)
    elif 'train' in datasets:
        datasets['augmented'] = datasets['train']
    return datasets
