"""Images for the recipes: splits, checks before training starts, and cached backbone features."""

from __future__ import annotations

import hashlib
import math
import os
import uuid
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from tqdm.auto import tqdm

from timm_fisher import PooledModel
from timm_fisher.registry import check_arguments
from timm_fisher.training.config import Config


@dataclass
class Split:
    """Some images of a data set, undecoded.

    Attributes:
        dataset: of timm or torchvision, a list of (image, label), or `ArrayImages`.
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
        reader = getattr(self.dataset, 'reader', None)
        digest = hashlib.sha256(self.indices.tobytes() + self.labels.tobytes())
        for path, _ in getattr(reader, 'samples', ()):
            stat = os.stat(path)
            digest.update(f'{path} {stat.st_size} {stat.st_mtime_ns}'.encode())
        if isinstance(self.dataset, ArrayImages):
            digest.update(self.dataset.fingerprint)
        elif isinstance(self.dataset, list):
            for image, _ in self.dataset:
                digest.update(image.tobytes())
        elif hasattr(reader, 'dataset'):
            digest.update(reader.dataset._fingerprint.encode())
        elif reader is None:  # of torchvision, whose repr gives root and split
            digest.update(repr(self.dataset).encode())
        return digest.hexdigest()


class ArrayImages(Dataset[tuple[Image.Image, int]]):
    """Images in one array, turned into pictures when they are asked for.

    Args:
        pixels: uint8 `[n, H, W]`, or `[n, H, W, C]` with 3 or 4 channels.
        labels: their classes `[n]`.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.pixels, self.labels = pixels, labels
        digest = hashlib.sha256(repr(pixels.shape).encode())
        digest.update(np.ascontiguousarray(pixels))
        self.fingerprint = digest.digest()

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[i]), int(self.labels[i])


class Images(Dataset[tuple[Tensor, int]]):
    """A split through a transform. An image that cannot be decoded is an error that names it;
    timm's own data set would take the next image in its place."""

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
        splits, classes = _load_npz(config)
    else:
        splits, classes = _load_timm(config)
    for name, most in (('train', config.max_train), ('test', config.max_test)):
        if most is not None and name in splits and most < len(splits[name].indices):
            order = np.random.default_rng(0).permutation(len(splits[name].indices))
            splits[name] = splits[name].take(np.sort(order[:most]))
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
    dataset = [(Image.fromarray(p), int(y)) for p, y in zip(pixels, digits.target, strict=True)]
    everything = np.arange(len(dataset))
    rest, test = train_test_split(
        everything, test_size=0.25, stratify=digits.target, random_state=0
    )
    train, val = train_test_split(rest, test_size=0.2, stratify=digits.target[rest], random_state=0)
    parts = {'train': train, 'val': val, 'test': test}
    splits = {
        name: Split(dataset, np.sort(part), digits.target[np.sort(part)])
        for name, part in parts.items()
    }
    return splits, [str(digit) for digit in range(10)]


def _load_npz(config: Config) -> tuple[dict[str, Split], list[str]]:
    """The splits 'train' and 'test' of a file of arrays, and the classes, `str` of its labels.

    `x_train`, `y_train`, `x_test` and `y_test`; or `x` and `y`, of which `config.test_fraction` or,
    with `config.folds`, one fold is the test split. Images are `[n, H, W]` or `[n, H, W, C]` with
    1, 3 or 4 channels, uint8 or floating-point from 0 to 1; uint8 images without a value above 1
    are taken for binary. Labels are `[n]`, integers or strings; where no stage reads them they may
    be missing.
    """
    arrays = _read_npz(Path(config.data_dir))
    pairs = [('x_train', 'y_train'), ('x_test', 'y_test')]
    own_test = 'x_train' in arrays
    if not own_test:
        pairs = [('x', 'y')]
    elif config.folds:
        raise ValueError(
            f"'{config.data_dir}' has a test split of its own (x_test); {config.folds} folds need "
            'a file with x and y alone.'
        )
    elif config.test_split is None:
        pairs = pairs[:1]
    if config.unsupervised and any(y not in arrays for _, y in pairs):
        arrays |= {y: np.zeros(arrays[x].shape[:1], int) for x, y in pairs if x in arrays}
    for pair in pairs:
        for key in pair:
            if key not in arrays:
                raise ValueError(
                    f"'{config.data_dir}' has no array '{key}', only {sorted(arrays)}. It must "
                    'hold x_train, y_train, x_test and y_test, or x and y.'
                )
    where = {key: f"'{key}' in '{config.data_dir}'" for pair in pairs for key in pair}
    numeric = [arrays[x] for x, _ in pairs if arrays[x].dtype.kind in 'fiu']
    top = max((each.max(initial=0) for each in numeric), default=0)
    labels = {y: _check_labels(arrays[y], arrays[x].shape[:1], where[y]) for x, y in pairs}
    names = np.unique(labels[pairs[0][1]])
    datasets = []
    for x, y in pairs:
        unknown = np.setdiff1d(labels[y], names)
        if len(unknown):
            raise ValueError(f'{where[y]} has classes that training lacks: {unknown.tolist()}.')
        pixels = _to_pixels(arrays[x], top, where[x])
        datasets.append(ArrayImages(pixels, np.searchsorted(names, labels[y])))
    splits = [Split(each, np.arange(len(each)), each.labels) for each in datasets]
    if not own_test and config.test_split is not None:
        everything = splits[0]
        test = _test_part(everything.labels, config)
        splits = [everything.take(np.flatnonzero(~test)), everything.take(np.flatnonzero(test))]
    return dict(zip(('train', 'test'), splits, strict=False)), [str(name) for name in names]


def _read_npz(path: Path) -> dict[str, np.ndarray]:
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
        found = f' from {x.min():g} to {x.max():g}' if x.dtype.kind in 'fiu' else ''
        raise ValueError(
            f'{where} is {x.dtype}{found}; images are uint8 from 0 to 255 or floating-point from 0 '
            'to 1.'
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
            advice = '' if role == 'train' else f'train.py goes without by --{role}_split null.'
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
    reader = getattr(dataset, 'reader', None)
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


class Cached(Dataset[tuple[Any, int]]):
    """What a frozen part of a model gives for each image of a data set, memory-mapped from files.

    Args:
        paths: one file of arrays for each tensor that it gives.
        labels: of the images.
        as_list: a list of tensors, as features of several heads are, instead of one tensor.
        pooled: they are pooled vectors, not features of the backbone.
    """

    def __init__(
        self, paths: Sequence[Path], labels: np.ndarray, *, as_list: bool, pooled: bool
    ) -> None:
        self.as_list = as_list
        self.arrays = [np.load(path, mmap_mode='r', allow_pickle=False) for path in paths]
        self.labels = labels
        self.pooled = pooled

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        tensors = [torch.from_numpy(np.array(array[i])) for array in self.arrays]
        return tensors if self.as_list else tensors[0], int(self.labels[i])


def cache_features(
    model: PooledModel, dataset: Images, config: Config, accelerator: Accelerator
) -> Cached:
    """Run the backbone once over a data set, each rank over its share, unless files of the same
    weights, images and transform are there already.

    All ranks must see one `config.cache_dir`.
    """
    model.to(accelerator.device).eval()
    paths = _write_once(
        Path(config.cache_dir, _cache_key(model, dataset, accelerator)),
        model.forward_features,
        dataset,
        config,
        accelerator,
        what='cache features',
        count=len(model.descriptors),
    )
    return Cached(paths, dataset.split.labels, as_list=True, pooled=False)


def cache_pooled(
    model: PooledModel, features: Cached, name: str, config: Config, accelerator: Accelerator
) -> Cached:
    """Pool cached features once, for a stage that trains the classifier alone.

    The files are new each time, for the head may have been trained meanwhile. All ranks must see
    one `config.output`.
    """
    folder = Path(config.output, 'pooled')
    if accelerator.is_main_process:
        for path in folder.glob(f'{name}-*'):
            path.unlink()
    accelerator.wait_for_everyone()
    model.to(accelerator.device).eval()
    paths = _write_once(
        folder / name,
        lambda x: model.forward_head(x, pre_logits=True),
        features,
        config,
        accelerator,
        what=f'pool {name}',
    )
    return Cached(paths, features.labels, as_list=False, pooled=True)


@torch.no_grad()
def _write_once(
    stem: Path,
    function: Callable[[Any], Any],
    dataset: Images | Cached,
    config: Config,
    accelerator: Accelerator,
    *,
    what: str,
    count: int = 1,
) -> list[Path]:
    """Files `STEM-0.npy`, ... of what a function of a batch gives, one tensor or several."""
    device = accelerator.device

    def call(batch: Any) -> list[Tensor]:
        with accelerator.autocast():
            found = function(send_to_device(batch, device))
        return [found] if isinstance(found, Tensor) else list(found)

    # The main process decides for all: another run may publish the same files at any moment.
    paths = [stem.with_name(f'{stem.name}-{i}.npy') for i in range(count)]
    plan = [all(path.exists() for path in paths), uuid.uuid4().hex]
    there, token = broadcast_object_list(plan)
    if not there:
        partial = [path.with_suffix(f'.{token}.partial') for path in paths]
        if accelerator.is_main_process:
            sample = default_collate([dataset[0][0]])
            _allocate(partial, [(len(dataset), *each.shape[1:]) for each in call(sample)])
        accelerator.wait_for_everyone()
        arrays = [np.lib.format.open_memmap(path, mode='r+') for path in partial]
        share = range(accelerator.process_index, len(dataset), accelerator.num_processes)
        # Small batches stay in a CPU's cache: twice as fast as 64 images at a time.
        on_cpu = accelerator.device.type == 'cpu'
        batch_size = min(4, config.batch_size) if on_cpu else config.batch_size
        workers = 0 if isinstance(dataset, Cached) else config.workers
        loader = DataLoader(Subset(dataset, share), batch_size, num_workers=workers)
        start = 0
        for batch, labels in tqdm(loader, what, disable=not accelerator.is_main_process or None):
            rows = list(share[start : start + len(labels)])
            for array, found in zip(arrays, call(batch), strict=True):
                array[rows] = found.float().cpu().numpy()
            start += len(labels)
        for array in arrays:
            array.flush()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for beside, path in zip(partial, paths, strict=True):
                os.replace(beside, path)
        accelerator.wait_for_everyone()
    return paths


def _allocate(paths: list[Path], shapes: list[tuple[int, ...]]) -> None:
    """Empty .npy files whose space is there: a memory map on a full disk would die of SIGBUS."""
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    try:
        for path, shape in zip(paths, shapes, strict=True):
            np.lib.format.open_memmap(path, mode='w+', dtype=np.float32, shape=shape).flush()
            if hasattr(os, 'posix_fallocate'):  # which macOS lacks
                with open(path, 'r+b') as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        for path in paths:
            path.unlink(missing_ok=True)
        size = sum(4 * math.prod(shape) for shape in shapes)
        raise OSError(
            f'{size / 2**30:.1f} GiB of features do not fit into {paths[0].parent}: {error}. '
            'Free some space, give another --cache_dir or --output, or switch it off by '
            '--cache false.'
        ) from error


def _cache_key(model: PooledModel, dataset: Images, accelerator: Accelerator) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    about = (
        dataset.split.fingerprint(),
        repr(dataset.transform),
        dataset.mode,
        repr(model.descriptors),
        # The same weights compute something else with another stride, padding or activation.
        repr(model.backbone),
        model.backbone.pretrained_cfg['architecture'],
        model.backbone._model_args,
        accelerator.mixed_precision,
        timm.__version__,
        torch.__version__,
    )
    digest.update(repr(about).encode())
    return digest.hexdigest()[:32]
