"""Embeddings of whole data sets by models without a classifier, on cached features.

For experiments that compare representations of the same images, such as those of recipes/papers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from sklearn.preprocessing import normalize
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import timm_fisher
from timm_fisher import PooledModel
from timm_fisher.device import to_device
from timm_fisher.files import write
from timm_fisher.training.benchmark import timed
from timm_fisher.training.command_line import parse
from timm_fisher.training.config import Config
from timm_fisher.training.data import Split, create_datasets, preprocessing
from timm_fisher.training.features import Cached, cache_features
from timm_fisher.training.run import create_model, load_weights


def parse_options(options: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Config:
    """Options of `timm_fisher.training`, and dotted ones that change some of them, checked and
    converted as its command line does: exits with a message on an error."""
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (changes or {}).items()}
    file = yaml.safe_dump(dict(options), sort_keys=False)  # stages have an order
    words = ['--config', file, *(f'--{k}={v}' for k, v in texts.items())]
    return parse(Config, arguments=words)


def create_embedder(config: Config, **head_kwargs: Any) -> PooledModel:
    """The model of a configuration without its classifier, in evaluation mode, on accelerate's
    device, after setting all seeds; `head_kwargs` stand in place of those in the configuration.
    ValueError in one of several processes."""
    set_seed(config.seed)
    config = replace(config, head_kwargs={**config.head_kwargs, **head_kwargs})
    return to_device(create_model(config, num_classes=0), _accelerator(config).device).eval()


def cache_splits(model: PooledModel, splits: dict[str, Split], config: Config) -> dict[str, Cached]:
    """Features of the model's backbone for the images of each split, in `config.cache_dir`."""
    datasets = create_datasets(config, splits, preprocessing(model, config))
    accelerator = _accelerator(config)
    return {name: cache_features(model, datasets[name], config, accelerator) for name in splits}


def _accelerator(config: Config) -> Accelerator:
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    if accelerator.num_processes > 1:
        raise ValueError(f'This runs in one process, not in {accelerator.num_processes}.')
    return accelerator


def fit_once(model: PooledModel, features: Cached, folder: Path | None, config: Config) -> float:
    """Fit a model's head to cached features of training images and save the model in a folder, if
    there is one, or load what was saved there before; the seconds that the fit took, then or now.
    """
    if folder is not None and (folder / 'seconds.json').exists():
        load_weights(model, folder)
        return float(json.loads((folder / 'seconds.json').read_text()))
    loader = DataLoader(features, config.batch_size)
    fit = partial(
        timm_fisher.fit,
        model,
        loader,
        from_features=True,
        whiten=config.whiten,
        max_images=config.max_fit,
    )
    seconds, _ = timed(fit)
    if folder is not None:
        timm_fisher.save_model(model, folder, data_config=preprocessing(model, config))
        write(folder / 'seconds.json', json.dumps(seconds))
    return seconds


@torch.no_grad()
def outputs(
    model: PooledModel,
    features: Dataset[Any],
    function: Callable[[list[Tensor]], Tensor],
    *,
    batch_size: int = 256,
) -> Iterator[Tensor]:
    """What a function of the features of a batch, a list of one tensor for each stage, gives on the
    model's device, batch by batch."""
    device = next(model.parameters()).device
    for batch, _ in DataLoader(features, batch_size):
        yield function(send_to_device(batch, device))


def mean_vectors(model: PooledModel, features: Dataset[Any]) -> np.ndarray:
    """L2-normalised means `[n, C]` of the descriptors of the last stage, float64."""
    return _unit_vectors(model, features, lambda x: model.descriptors(x)[-1].mean(1))


def head_vectors(model: PooledModel, features: Dataset[Any]) -> np.ndarray:
    """L2-normalised pooled vectors `[n, head_hidden_size]`, float64."""
    pool: Any = partial(model.forward_head, pre_logits=True)
    return _unit_vectors(model, features, pool)


def _unit_vectors(
    model: PooledModel, features: Dataset[Any], function: Callable[[list[Tensor]], Tensor]
) -> np.ndarray:
    parts = [x.cpu() for x in outputs(model, features, function)]
    return np.asarray(normalize(torch.cat(parts).double().numpy()))
