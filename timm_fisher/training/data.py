"""Images to train on: splits of a data set, checks before training starts, transforms."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import timm
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import Dataset

from timm_fisher.images import convert, open_image
from timm_fisher.registry import check_arguments
from timm_fisher.training.arrays import ArrayImages, read_arrays, to_pixels
from timm_fisher.training.config import Config

# What a data set holds: images, a backbone's features of them, or pooled vectors.
Gives = Literal['images', 'features', 'pooled']
Transform = Callable[[Image.Image], Tensor]


@dataclass
class Split:
    """Some images of a data set, undecoded."""

    dataset: Any  # of timm or torchvision, or ArrayImages
    indices: np.ndarray  # which of its images
    labels: np.ndarray  # their classes

    def take(self, part: np.ndarray) -> Split:
        """Some of its images, by their places in the split."""
        return Split(self.dataset, self.indices[part], self.labels[part])

    def carve(
        self, name: str, fraction: float, stratify: np.ndarray | None, seed: int
    ) -> tuple[Split, Split]:
        """The rest, and a fraction, both in order. ValueError if there are too few images."""
        places = np.arange(len(self.indices))
        options: dict[str, Any] = {'test_size': fraction, 'random_state': seed}
        try:
            parts = train_test_split(places, stratify=stratify, **options)
        except ValueError as error:
            raise ValueError(
                f'No {name} set of {fraction:.0%} can be carved from {len(places)} images: {error}'
            ) from error
        rest, part = (self.take(part[np.argsort(self.indices[part])]) for part in parts)
        return rest, part

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the images do, up to when it is first asked for; of data that are neither
        files nor one array, when one of 256 images does, evenly spread."""
        source = getattr(self.dataset, 'reader', self.dataset)
        digest = hashlib.sha256(self.indices.tobytes() + self.labels.tobytes())
        if isinstance(source, ArrayImages):
            digest.update(repr(source.pixels.shape[1:]).encode())
            for i in self.indices:  # one by one: a copy of all could fill the memory
                digest.update(source.pixels[i].tobytes())
        elif hasattr(source, 'samples'):
            for path, _ in (source.samples[i] for i in self.indices):
                stat = os.stat(path)
                digest.update(f'{path} {stat.st_size} {stat.st_mtime_ns}'.encode())
        elif hasattr(source, 'dataset'):  # of Hugging Face
            digest.update(source.dataset._fingerprint.encode())
        else:  # of torchvision, whose repr gives root and split
            digest.update(repr(source).encode())
            for i in self.indices[:: math.ceil(len(self.indices) / 256)]:
                digest.update(np.asarray(source[i][0]).tobytes())
        return digest.hexdigest()


@dataclass(eq=False)
class Images(Dataset[tuple[Tensor, int]]):
    """A split through a transform. An image that cannot be decoded, or has NaN in it, is an error
    that names it; timm's own data set would take the next image in its place."""

    gives: ClassVar[Gives] = 'images'
    split: Split
    transform: Transform
    mode: Literal['L', 'RGB']

    def __len__(self) -> int:
        return len(self.split.indices)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        dataset, index = self.split.dataset, int(self.split.indices[i])
        reader = getattr(dataset, 'reader', None)
        try:
            if reader is None:
                image = convert(dataset[index][0], self.mode)
            else:
                with reader[index][0] as file:
                    image = convert(Image.open(file), self.mode)
        except Exception as error:  # Pillow's decoders raise what they like
            name = self.name(i)
            raise ValueError(f"Image '{name}' cannot be decoded ({error}). Remove it.") from error
        return self.transform(image), int(self.split.labels[i])

    @property
    def labels(self) -> np.ndarray:
        """Classes of the images."""
        return self.split.labels

    @property
    def image_names(self) -> list[str] | None:
        """Their paths in the split, up to the first dot of the file's name, as webdataset has them
        for keys, or whole where these would be the same: what random choices depend on. None for
        data that are no files."""
        reader: Any = getattr(self.split.dataset, 'reader', None)
        if not hasattr(reader, 'samples'):
            return None
        root = os.path.join(reader.root, '')
        paths = [reader.samples[i][0].removeprefix(root) for i in self.split.indices]
        parts = map(os.path.split, paths)
        keys = [f'{folder}/{name.split(".")[0]}'.replace(os.sep, '/') for folder, name in parts]
        return keys if len(set(keys)) == len(keys) else paths

    def name(self, i: int) -> str:
        """Of an image, for messages: its path, or its number in the data set."""
        dataset, index = self.split.dataset, int(self.split.indices[i])
        if hasattr(dataset, 'reader'):
            return str(dataset.reader.filename(index, absolute=True))
        return str(dataset.samples[index][0]) if hasattr(dataset, 'samples') else f'number {index}'


def refuse_non_finite(rows: Tensor, name: Callable[[int], str], places: Sequence[int]) -> None:
    """ValueError that names an image for which a model gives NaN or infinite values.

    Args:
        rows: `[B, ...]` of a model's output, one for each image.
        name: of an image by its place, as `Images.name`.
        places: of the B images.
    """
    finite = rows.flatten(1).isfinite().all(1)
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        others = f' and {len(bad) - 1} more of {len(rows)}' if len(bad) > 1 else ''
        raise ValueError(
            f"The model's output is NaN or infinite for image '{name(places[bad[0]])}'{others}. If "
            'nothing is wrong with the image, the model or its half precision is at fault.'
        )


def preprocessing(model: nn.Module, config: Config) -> dict[str, Any]:
    """timm's data configuration for a model and the image size and crop of a configuration."""
    requested = {'img_size': config.img_size, 'crop_pct': config.crop_pct}
    return dict(timm.data.resolve_input_data_config(model, requested))


def create_datasets(
    config: Config, splits: dict[str, Split], data_config: dict[str, Any]
) -> dict[str, Images]:
    """Data sets by split name, preprocessed by timm's `data_config`; and, with `config.augment`,
    'augmented', the training split. TypeError for an unknown argument in that."""
    plain, augmenting, mode = create_transforms(config, data_config)
    datasets = {name: Images(split, plain, mode) for name, split in splits.items()}
    if augmenting is not None:
        datasets['augmented'] = Images(splits['train'], augmenting, mode)
    return datasets


def create_transforms(
    config: Config, data_config: dict[str, Any]
) -> tuple[Transform, Transform | None, Literal['L', 'RGB']]:
    """Of images in a colour mode: for evaluation, and, with `config.augment`, for training.
    TypeError for an unknown argument in that."""
    mode: Literal['L', 'RGB'] = 'L' if data_config['input_size'][0] == 1 else 'RGB'
    keys = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    shape = {key: data_config[key] for key in keys}
    create = timm.data.create_transform
    if config.augment is None:
        return create(**shape), None, mode
    check_arguments('augment', create, config.augment, given=(*keys, 'is_training'))
    return create(**shape), create(**shape, is_training=True, **config.augment), mode


def load_splits(config: Config) -> tuple[dict[str, Split], list[str]]:
    """The splits 'train', 'val' and, if there is one, 'test'; and the names of the classes.

    Where all stages are unsupervised, labels may be missing or all the same, and have no say in
    what is carved off for validation. Where no stage classifies, the splits of a folder may have
    classes that the training split lacks.

    Raises:
        ValueError: a folder that is missing, empty or holds one class, classes that the training
            split lacks, labels outside the classes, files that are no images, or arrays that are
            none.
    """
    load = {'digits': _load_digits, 'npz': _load_arrays}.get(config.dataset, _load_timm)
    splits, classes = load(config)
    for name, limit in (('train', config.max_train), ('test', config.max_test)):
        if limit is not None and name in splits and limit < len(splits[name].indices):
            order = np.random.default_rng(0).permutation(len(splits[name].indices))
            splits[name] = splits[name].take(np.sort(order[:limit]))
    if 'val' not in splits:
        train = splits['train']
        stratify = None if config.unsupervised else train.labels
        parts = train.carve('validation', config.val_fraction, stratify, config.seed)
        splits['train'], splits['val'] = parts
    prints = {name: split.fingerprint for name, split in splits.items()}
    for name, other in itertools.combinations(prints, 2):
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
    checked = () if config.unsupervised else splits if config.classifies else ('train',)
    for name in checked:
        labels = splits[name].labels
        wrong = labels[(labels < 0) | (labels >= len(classes))]
        if len(wrong):
            without = '' if name == 'train' else f' Training goes without by --{name}_split null.'
            raise ValueError(
                f"The split '{name}' has the label {wrong[0]}, but the {len(classes)} classes are "
                f'0 to {len(classes) - 1}.{without}'
            )
    return splits, classes


def _load_digits(config: Config) -> tuple[dict[str, Split], list[str]]:
    """scikit-learn's 1797 digits of 8 x 8: 60 % train, 15 % val, 25 % test, always the same."""
    digits = load_digits()
    y = digits.target
    whole = _whole(ArrayImages((digits.images * (255 / 16)).astype(np.uint8), y))
    rest, test = train_test_split(whole.indices, test_size=0.25, stratify=y, random_state=0)
    train, val = train_test_split(rest, test_size=0.2, stratify=y[rest], random_state=0)
    parts = {'train': train, 'val': val, 'test': test}
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
            keys = {'input_key': config.input_key, 'target_key': config.target_key}
            dataset = _create_dataset(config.dataset, config.data_dir, name, **keys)
            splits[role] = _whole(dataset)
        else:
            advice = '' if role == 'train' else f'Training goes without by --{role}_split null.'
            others = not config.classifies
            splits[role] = load_folder(
                config.data_dir, name, class_to_index, others=others, advice=advice,
                cache_dir=config.cache_dir,
            )  # fmt: skip
        if role == 'train':
            dataset = splits[role].dataset
            class_to_index = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
    if config.dataset and config.classes:
        classes = list(config.classes)
    elif class_to_index:
        first_names = {index: name for name, index in reversed(class_to_index.items())}
        classes = [first_names[index] for index in sorted(first_names)]  # others are synonyms
    else:
        classes = [str(label) for label in range(int(splits['train'].labels.max()) + 1)]
    return splits, classes


def load_folder(
    data_dir: str,
    name: str,
    known: dict[str, int] | None = None,
    *,
    others: bool = False,
    advice: str = '',
    cache_dir: str | None = None,
) -> Split:
    """One split of a folder, all images DATA_DIR/NAME/CLASS/IMAGE, labelled by `known` indices of
    classes or in the order of names; `others` may follow the known ones. ValueError as
    `load_splits`; `advice` if it is missing. With `cache_dir`, headers of the same files are not
    read again."""
    folder = Path(data_dir, name)
    if not folder.is_dir():
        raise ValueError(
            f"'{folder}' is not a folder; --data-dir must hold {name}/CLASS/IMAGE. "
            f'{advice}'.rstrip()
        )
    dataset = _create_dataset('', data_dir, name)
    if known is not None:
        unknown = sorted(set(dataset.reader.class_to_idx) - set(known))
        if unknown and not others:
            raise ValueError(
                f"The split '{name}' has classes that are not those of training: {unknown}, "
                f'not {list(known)}.'
            )
        class_map = known | {other: len(known) + i for i, other in enumerate(unknown)}
        dataset = _create_dataset('', data_dir, name, class_map=class_map)
    return _whole(dataset, cache_dir)


def _create_dataset(dataset: str, data_dir: str, split: str, **options: Any) -> Any:
    try:
        return timm.data.create_dataset(dataset, data_dir, split=split, **options)
    except RuntimeError as error:
        raise ValueError(f"The split '{split}' of '{data_dir or dataset}': {error}") from error


def _whole(dataset: Any, cache_dir: str | None = None) -> Split:
    """All images of a data set, decoded only where it does not list their labels. ValueError for
    files that are no images; with `cache_dir`, those that were looked at are not opened again."""
    source = getattr(dataset, 'reader', dataset)
    if hasattr(source, 'samples'):
        labels = [label for _, label in source.samples]
    elif hasattr(source, 'dataset'):
        labels = source.dataset[source.label_key]
    elif hasattr(source, 'targets'):
        labels = source.targets
    else:
        labels = [source[i][1] for i in range(len(source))]
    split = Split(dataset, np.arange(len(labels)), np.array(labels))
    if hasattr(source, 'samples'):
        seen = None
        with suppress(OSError):  # a file that is not there, as will be said
            seen = Path(cache_dir, f'readable-{split.fingerprint}') if cache_dir else None
        if seen is None or not seen.exists():
            _refuse_unreadable([path for path, _ in source.samples])
            if seen is not None:
                seen.parent.mkdir(parents=True, exist_ok=True)
                seen.touch()
    return split


def _refuse_unreadable(paths: list[str]) -> None:
    """Read each file's header. What is cut short later in the file shows when it is decoded."""

    def problem(path: str) -> str | None:
        try:
            with open_image(path):
                return None
        except ValueError as error:
            return f'{path} ({error.__cause__})'

    with ThreadPoolExecutor() as threads:
        bad = list(filter(None, threads.map(problem, paths)))
    if bad:
        shown = '\n  '.join(bad[:10] + ['...'] * (len(bad) > 10))
        raise ValueError(f'{len(bad)} files cannot be read as images. Remove them:\n  {shown}')


def _load_arrays(config: Config) -> tuple[dict[str, Split], list[str]]:
    """The splits 'train' and 'test', as the documentation of `Config.dataset` has it."""
    file = config.data_dir
    arrays = read_arrays(file)
    has_test_split = 'x_train' in arrays
    pairs = [('x_train', 'y_train'), ('x_test', 'y_test')] if has_test_split else [('x', 'y')]
    if has_test_split and config.folds:
        raise ValueError(
            f"'{file}' has a test split of its own (x_test); {config.folds} folds need a file with "
            'x and y alone.'
        )
    if config.test_split is None:
        pairs = pairs[:1]
    if config.unsupervised and any(y not in arrays for _, y in pairs):
        arrays |= {y: np.zeros(arrays[x].shape[:1], int) for x, y in pairs if x in arrays}
    for key in itertools.chain(*pairs):
        if key not in arrays:
            raise ValueError(
                f"'{file}' has no array '{key}', only {sorted(arrays)}. It must hold x_train, "
                'y_train, x_test and y_test, or x and y.'
            )
    numeric = [arrays[x] for x, _ in pairs if arrays[x].dtype.kind in 'fiu']
    top = max((array.max(initial=0) for array in numeric), default=0)
    classes = np.unique(arrays[pairs[0][1]])
    splits = {}
    for name, (x, y) in zip(('train', 'test'), pairs, strict=False):
        labels, shape = arrays[y], arrays[x].shape[:1]
        if labels.shape != shape or labels.dtype.kind not in 'iuU':
            raise ValueError(
                f"'{y}' in '{file}' must hold one label for each image, shape {list(shape)}, "
                f'integers or strings; it is {labels.dtype} of shape {list(labels.shape)}.'
            )
        unknown = np.setdiff1d(labels, classes).tolist()
        if unknown:
            raise ValueError(f"'{y}' in '{file}' has classes that training lacks: {unknown}.")
        pixels = to_pixels(arrays[x], top, f"'{x}' in '{file}'")
        splits[name] = _whole(ArrayImages(pixels, np.searchsorted(classes, labels)))
    if not has_test_split and config.test_split is not None:
        splits['train'], splits['test'] = _split_off_test(splits['train'], config)
    return splits, [str(name) for name in classes]


def _split_off_test(whole: Split, config: Config) -> tuple[Split, Split]:
    """Training and test images of a data set without a test split."""
    count = len(whole.labels)
    shuffled = whole.take(np.random.default_rng(0).permutation(count))
    if not config.folds:
        return shuffled.carve('test', config.test_fraction, shuffled.labels, seed=0)
    if not 2 <= config.folds <= count or not 0 <= config.fold < config.folds:
        raise ValueError(
            f'fold {config.fold} of {config.folds} folds does not exist for {count} images: '
            f'give 2 folds or more, and a fold from 0 to {config.folds - 1}.'
        )
    # Dealt out class by class: unlike scikit-learn's, more folds than a class has images.
    by_class = shuffled.indices[np.argsort(shuffled.labels, kind='stable')]
    test = np.sort(by_class[config.fold :: config.folds])
    return whole.take(np.setdiff1d(whole.indices, test)), whole.take(test)
