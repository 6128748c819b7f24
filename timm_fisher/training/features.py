"""Features of a frozen backbone, and pooled vectors, computed once and kept in files."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm

from timm_fisher import PooledModel
from timm_fisher.backbone import digest
from timm_fisher.device import to_device
from timm_fisher.training.config import Config
from timm_fisher.training.data import Gives, Images, refuse_non_finite
from timm_fisher.training.streams import StreamImages, StreamLoader
from timm_fisher.training.tables import three_digits


class Cached(Dataset[tuple[list[Tensor], int]]):
    """Memory-mapped lists of tensors, and labels: 'features', one for each stage that the model
    pools, or 'pooled', one vector."""

    def __init__(self, paths: Sequence[Path], dataset: Images | Cached, gives: Gives) -> None:
        self.arrays = [np.load(path, mmap_mode='r', allow_pickle=False) for path in paths]
        self.labels: np.ndarray = dataset.labels
        self.name: Callable[[int], str] = dataset.name  # of an image
        self.image_names: list[str] | None = dataset.image_names
        self.gives = gives

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, places: Sequence[int]) -> Cached:
        """Some of the tensors of each image."""
        selected = copy.copy(self)
        selected.arrays = [self.arrays[place] for place in places]
        return selected

    def __getitem__(self, i: int) -> tuple[list[Tensor], int]:
        tensors = [torch.from_numpy(np.array(array[i])) for array in self.arrays]
        return tensors, int(self.labels[i])


def create_loader(dataset: Images | Cached | StreamImages, config: Config, **options: Any) -> Any:
    """A `DataLoader` over a data set, with more options of it, or a `StreamLoader`, whose only
    other option is `batch_size`."""
    if isinstance(dataset, StreamImages):
        return StreamLoader(dataset, options.get('batch_size', config.batch_size), config.workers)
    # Cached features come from a memory map: workers would only copy them once more.
    workers = config.workers if dataset.gives == 'images' else 0
    options = {'batch_size': config.batch_size, 'num_workers': workers, **options}
    return DataLoader(dataset, **options)


def cache_features(
    model: PooledModel, dataset: Images, config: Config, accelerator: Accelerator
) -> Cached:
    """Run the backbone once over a data set, each rank over its share, unless files of the same
    weights, images and transform are in `config.cache_dir`, which all ranks must see, already.
    OSError if there is no space for them."""
    to_device(model, accelerator.device).eval()
    paths = _paths(model, dataset, config, accelerator)
    # The main process decides for all: another run may publish the same files at any moment.
    if not broadcast_object_list([all(_is_whole(path, len(dataset)) for path in paths)])[0]:
        features = partial(model.descriptors.features, model.backbone)
        _write(paths, features, dataset, config, accelerator)
    return Cached(paths, dataset, 'features')


@torch.inference_mode()
def has_room(
    model: PooledModel, datasets: Sequence[Images], config: Config, accelerator: Accelerator
) -> bool:
    """Whether the features of all of these are in `config.cache_dir` already or fit onto its disk;
    if not, the main process says how large they are."""
    to_device(model, accelerator.device).eval()
    missing: list[tuple[int, ...]] = []
    for dataset in datasets:
        paths = _paths(model, dataset, config, accelerator)
        if not all(_is_whole(path, len(dataset)) for path in paths):
            features = partial(model.descriptors.features, model.backbone)
            missing += _shapes(features, dataset, accelerator)
    folder = next(path for path in (Path(config.cache_dir, '_').resolve().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    fits, text = broadcast_object_list([_bytes(missing) <= free, _size(missing)])
    if not fits:
        accelerator.print(
            f'{text} of features do not fit into {config.cache_dir}: pooled vectors alone are kept.'
        )
    return bool(fits)


def cache_pooled(
    model: PooledModel,
    dataset: Images | Cached,
    path: Path,
    config: Config,
    accelerator: Accelerator,
) -> Cached:
    """Pool images or their cached features once, for a stage that trains the classifier alone, into
    a new file: the head may have been trained meanwhile."""
    to_device(model, accelerator.device).eval()
    from_images = dataset.gives == 'images'
    pool = (lambda x: model.pool(model.forward_features(x))) if from_images else model.pool
    _write([path], lambda x: [pool(x)], dataset, config, accelerator)
    return Cached([path], dataset, 'pooled')


@torch.inference_mode()
def _write(
    paths: list[Path],
    function: Callable[[Any], list[Any]],
    dataset: Images | Cached,
    config: Config,
    accelerator: Accelerator,
) -> None:
    """Write what a function of a batch gives, one file for each tensor."""
    device, main = accelerator.device, accelerator.is_main_process
    function = accelerator.autocast()(function)  # in a context for each call
    token = broadcast_object_list([uuid.uuid4().hex])[0]
    unfinished = [path.with_suffix(f'.{token}.partial') for path in paths]
    share = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    # Small batches stay in a CPU's cache: twice as fast as 64 images at a time.
    batch_size = min(4, config.batch_size) if device.type == 'cpu' else config.batch_size
    loader = create_loader(dataset, config, batch_size=batch_size, sampler=share)
    rows = iter(share)
    try:
        if main:
            shapes = _shapes(function, dataset, accelerator)
            print(f'features of {len(dataset)} images: {_size(shapes)} -> {paths[0].parent}')
            _allocate(unfinished, shapes)
        accelerator.wait_for_everyone()
        arrays = [np.lib.format.open_memmap(path, mode='r+') for path in unfinished]
        for batch, labels in tqdm(loader, f'read {dataset.gives}', disable=not main or None):
            places = list(islice(rows, len(labels)))
            tensors = function(send_to_device(batch, device))
            for array, tensor in zip(arrays, tensors, strict=True):
                refuse_non_finite(tensor, dataset.name, places)
                array[places] = tensor.float().cpu().numpy()
        for array in arrays:
            array.flush()
        accelerator.wait_for_everyone()
        if main:
            for beside, path in zip(unfinished, paths, strict=True):
                os.replace(beside, path)
        accelerator.wait_for_everyone()
    except BaseException:
        for path in unfinished:  # gigabytes that nobody would find
            path.unlink(missing_ok=True)
        raise


def _shapes(
    function: Callable[[Any], list[Any]], dataset: Images | Cached, accelerator: Accelerator
) -> list[tuple[int, ...]]:
    """Of what a function of a batch gives for a whole data set."""
    sample = function(send_to_device(default_collate([dataset[0][0]]), accelerator.device))
    return [(len(dataset), *tensor.shape[1:]) for tensor in sample]


def _is_whole(path: Path, length: int) -> bool:
    """Whether a file of features is there, and was not cut short, as by a copy."""
    try:
        return len(np.load(path, mmap_mode='r', allow_pickle=False)) == length
    except (EOFError, OSError, TypeError, ValueError):
        return False


def _allocate(paths: list[Path], shapes: list[tuple[int, ...]]) -> None:
    """Empty .npy files whose space is there: a memory map on a full disk would die of SIGBUS."""
    folder = paths[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    # Of killed runs: no other takes a day for a split.
    for path in folder.glob(f'*.{"[0-9a-f]" * 32}.partial'):
        with suppress(FileNotFoundError):  # removed by another run
            if path.stat().st_mtime < time.time() - 24 * 3600:
                path.unlink()
    try:
        for path, shape in zip(paths, shapes, strict=True):
            np.lib.format.open_memmap(path, mode='w+', dtype=np.float32, shape=shape).flush()
            if hasattr(os, 'posix_fallocate'):  # which macOS lacks
                with open(path, 'r+b') as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise OSError(
            f'{_size(shapes)} of features do not fit into '
            f'{folder}: {error}. Free some space, give another --cache_dir or --output, '
            'or --cache false.'
        ) from error


def _bytes(shapes: list[tuple[int, ...]]) -> int:
    """Of float32 arrays, together."""
    return sum(4 * math.prod(shape) for shape in shapes)


def _size(shapes: list[tuple[int, ...]]) -> str:
    size = _bytes(shapes)
    unit, exponent = ('GiB', 30) if size >= 2**30 else ('MiB', 20)
    return f'{three_digits(size / 2**exponent)} {unit}'


def _paths(
    model: PooledModel, dataset: Images, config: Config, accelerator: Accelerator
) -> list[Path]:
    """Files of the features of a data set, one for each stage that the model pools."""
    stem = Path(config.cache_dir, _cache_key(model, dataset, accelerator))
    return [stem.with_name(f'{stem.name}-{i}.npy') for i in range(len(model.descriptors))]


def _cache_key(model: PooledModel, dataset: Images, accelerator: Accelerator) -> str:
    weights = model.backbone.state_dict()
    if model.lora is not None:
        weights = model.lora.merge(weights)  # untrained factors change nothing, whatever their seed
    about = (
        digest(weights),
        dataset.split.fingerprint,
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
    return hashlib.sha256(repr(about).encode()).hexdigest()[:32]
