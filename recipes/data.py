"""Images for the recipes: splits, checks before training starts, and cached backbone features."""

from __future__ import annotations

import hashlib
import os
import uuid
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
from accelerate.utils import broadcast_object_list
from config import Config
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from timm_fisher import PooledModel
from timm_fisher.registry import check_arguments


@dataclass
class Split:
    """Some images of a data set, undecoded.

    Attributes:
        dataset: of timm or torchvision, or a list of (image, label).
        indices: which of its images.
        labels: their classes `[len(indices)]`.
    """

    dataset: Any
    indices: np.ndarray
    labels: np.ndarray

    def fingerprint(self) -> str:
        """Changes when the images do."""
        reader = getattr(self.dataset, 'reader', None)
        digest = hashlib.sha256(self.indices.tobytes() + self.labels.tobytes())
        for path, _ in getattr(reader, 'samples', ()):
            stat = os.stat(path)
            digest.update(f'{path} {stat.st_size} {stat.st_mtime_ns}'.encode())
        if isinstance(self.dataset, list):
            for image, _ in self.dataset:
                digest.update(image.tobytes())
        elif hasattr(reader, 'dataset'):
            digest.update(reader.dataset._fingerprint.encode())
        elif reader is None:  # of torchvision, whose repr gives root and split
            digest.update(repr(self.dataset).encode())
        return digest.hexdigest()


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

    Raises:
        ValueError: a folder that is missing, empty or holds one class, classes that the training
            split lacks, or files that are no images.
    """
    if config.dataset == 'digits':
        splits, classes = _load_digits()
    else:
        splits, classes = _load_timm(config)
    if 'val' not in splits:
        train = splits['train']
        try:
            kept, carved = train_test_split(
                np.arange(len(train.indices)),
                test_size=config.val_fraction,
                stratify=train.labels,
                random_state=config.seed,
            )
        except ValueError as error:
            raise ValueError(
                f'No validation set of {config.val_fraction:.0%} can be carved from the '
                f'{len(train.indices)} training images: {error}'
            ) from error
        for name, part in (('train', np.sort(kept)), ('val', np.sort(carved))):
            splits[name] = Split(train.dataset, train.indices[part], train.labels[part])
    prints = {name: split.fingerprint() for name, split in splits.items()}
    for name, other in combinations(prints, 2):
        if prints[name] == prints[other]:
            raise ValueError(
                f"The splits '{name}' and '{other}' hold the same images. Where a data set has two "
                'splits only, --val_split null carves validation images from the training split.'
            )
    if len(classes) < 2:
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


def _load_timm(config: Config) -> tuple[dict[str, Split], list[str]]:
    names = {'train': config.train_split, 'val': config.val_split, 'test': config.test_split}
    splits: dict[str, Split] = {}
    class_to_index: dict[str, int] | None = None
    for role, name in names.items():
        if name is None:
            continue
        if not config.dataset:
            folder = Path(config.data_dir, name)
            if not folder.is_dir():
                other = '' if role == 'train' else f' If there is none, say --{role}_split null.'
                raise ValueError(
                    f"'{folder}' is no folder; --data-dir must hold {name}/CLASS/IMAGE.{other}"
                )
        try:
            dataset = timm.data.create_dataset(config.dataset, config.data_dir, split=name)
            if not config.dataset and role != 'train':
                _refuse_unknown_classes(dataset.reader.class_to_idx, class_to_index, name)
                dataset = timm.data.create_dataset(
                    '', config.data_dir, split=name, class_map=class_to_index
                )
        except RuntimeError as error:
            where = config.data_dir or config.dataset
            raise ValueError(f"The split '{name}' of '{where}': {error}") from error
        if not config.dataset:
            _refuse_unreadable([path for path, _ in dataset.reader.samples])
        if role == 'train':
            reader = getattr(dataset, 'reader', dataset)
            class_to_index = getattr(reader, 'class_to_idx', None)
        labels = _labels(dataset)
        splits[role] = Split(dataset, np.arange(len(labels)), labels)
    if class_to_index:
        classes = sorted(class_to_index, key=class_to_index.__getitem__)
    else:
        classes = [str(label) for label in range(int(splits['train'].labels.max()) + 1)]
    return splits, classes


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


def _refuse_unknown_classes(found: Sequence[str], known: Any, split: str) -> None:
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise ValueError(f"The split '{split}' has classes that training lacks: {unknown}.")


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
    """Data sets by split name, without augmentation; and 'augmented', the training split with it.

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
    else:
        datasets['augmented'] = datasets['train']
    return datasets


class CachedFeatures(Dataset[tuple[Tensor, int]]):
    """What a frozen backbone gives for each image of a data set, memory-mapped from a file."""

    def __init__(self, path: Path, labels: np.ndarray) -> None:
        self.features = np.load(path, mmap_mode='r', allow_pickle=False)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.from_numpy(np.array(self.features[i])), int(self.labels[i])


@torch.no_grad()
def cache_features(
    model: PooledModel, dataset: Images, config: Config, accelerator: Accelerator
) -> CachedFeatures:
    """Run the backbone once over a data set, each rank over its share, unless a file of the same
    weights, images and transform is there already.

    All ranks must see one `config.cache_dir`.
    """
    path = Path(config.cache_dir, f'{_cache_key(model, dataset, accelerator)}.npy')
    # The main process decides for all: another run may publish the same file at any moment.
    plan = [path.exists(), str(path.with_suffix(f'.{uuid.uuid4().hex}.partial'))]
    there, partial = broadcast_object_list(plan)
    if not there:
        device = accelerator.device
        model.to(device).eval()
        with accelerator.autocast():
            shape = model.forward_features(dataset[0][0][None].to(device)).shape[1:]
        if accelerator.is_main_process:
            _allocate(Path(partial), (len(dataset), *shape))
        accelerator.wait_for_everyone()
        features = np.lib.format.open_memmap(partial, mode='r+')
        share = range(accelerator.process_index, len(dataset), accelerator.num_processes)
        # Small batches stay in a CPU's cache: twice as fast as 64 images at a time.
        batch_size = min(4, config.batch_size) if device.type == 'cpu' else config.batch_size
        loader = DataLoader(Subset(dataset, share), batch_size, num_workers=config.workers)
        start = 0
        progress = tqdm(loader, 'cache features', disable=not accelerator.is_main_process or None)
        for images, _ in progress:
            with accelerator.autocast():
                batch = model.forward_features(images.to(device)).float().cpu().numpy()
            features[list(share[start : start + len(batch)])] = batch
            start += len(batch)
        features.flush()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            os.replace(partial, path)
        accelerator.wait_for_everyone()
    return CachedFeatures(path, dataset.split.labels)


def _allocate(path: Path, shape: tuple[int, ...]) -> None:
    """An empty .npy file whose space is there: a memory map on a full disk would die of SIGBUS."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.lib.format.open_memmap(path, mode='w+', dtype=np.float32, shape=shape).flush()
    size = path.stat().st_size
    try:
        if hasattr(os, 'posix_fallocate'):  # which macOS lacks
            with open(path, 'r+b') as file:
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink()
        raise OSError(
            f'{size / 2**30:.1f} GiB of features do not fit into {path.parent}: {error}. '
            'Free some space, give another --cache_dir, or switch it off by --cache false.'
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
