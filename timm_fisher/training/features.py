"""Features of a frozen backbone, computed once and kept in memory-mapped files."""

from __future__ import annotations

import hashlib
import math
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from tqdm.auto import tqdm

from timm_fisher import PooledModel
from timm_fisher.training.config import Config
from timm_fisher.training.data import Images


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
