"""What every rank computes for test_train.py: a fit, and gradients, of every head; and updates of
a head by its update rule.

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 \
        tests/distributed_checks.py --output=FOLDER

Writes `FOLDER/rank0.pt` and so on. The test calls the same functions on one process.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from small_models import backbone_of
from streams import Named, Shards
from torch import Tensor, nn
from torch.utils.data import DataLoader

import timm_fisher
from timm_fisher import PoolingHead, get_head
from timm_fisher.fitting.stream import ListStream
from timm_fisher.training.config import Stage
from timm_fisher.training.metric_learning import MetricLearning

SMALL = {  # faster than the default, or fit for a handful of descriptors
    'bilinear': {'reduce_dim': 8},
    'dbm_idfk': {'hidden': [6, 4], 'rank': 8, 'epochs': 2},
    'deepten': {'reduce_dim': 8, 'codes': 6},
    'gmm_fisher': {'reduce_dim': 8, 'components': 6},
    'gsnmf': {'components': 8},
    'hscfv': {'reduce_dim': 8, 'code_dim': 6, 'residual_code_dim': 4},
    'netvlad': {'reduce_dim': 8, 'clusters': 6},
    'salad': {'clusters': 3, 'cluster_dim': 5, 'token_dim': 7, 'hidden': 8},
    'smso': {'features': 40},
    'sparse_fisher': {'reduce_dim': 8, 'code_dim': 6},
}


COMPOSED = 'composed'
HEADS = [*timm_fisher.list_heads(), COMPOSED]
FITTED = [name for name in HEADS[:-1] if get_head(name).fit is not PoolingHead.fit]


def create(name: str) -> timm_fisher.PooledModel:
    """A model with dropout and batch norm switched off; its map is 16 x 16 x 32 at 32 px, but for
    heads that need a transformer."""
    torch.manual_seed(0)
    head: Any = name
    if name == COMPOSED:
        names = ('gmm_fisher', 'sparse_fisher')
        head = [{'name': 'avg', 'stage': -4}, *({'name': part, **SMALL[part]} for part in names)]
    backbone = backbone_of(name)
    place: dict[str, Any] = {'img_size': 32} if backbone == 'test_vit' else {'stage': -5}
    return timm_fisher.create_model(
        backbone, head, num_classes=3, head_kwargs=SMALL.get(name), **place
    ).eval()


def create_images(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    return images, torch.randint(3, (count,), generator=generator)


def fitted(head: str) -> dict[str, Tensor]:
    """The head after a fit to 59 images: 15 104 descriptors, the last batch is incomplete."""
    model, (images, _) = create(head), create_images(59)
    timm_fisher.fit(model, DataLoader(Named(images), batch_size=8))
    return {name: tensor.clone() for name, tensor in model.head.state_dict().items()}


def fitted_to_stream(head: str, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
    """As `fitted`, to shards of a stream that are shared out over ranks."""
    model, (images, _) = create(head), create_images(59)
    shards = list(torch.arange(59).split(8))[rank::world_size]
    timm_fisher.fit(model, DataLoader(Shards(images, shards, named=True), batch_size=8))
    return {name: tensor.clone() for name, tensor in model.head.state_dict().items()}


def fitted_by_one_rank(rank: int = 0) -> dict[str, Tensor]:
    """In float64; the other ranks have no images."""
    model, (images, _) = create('sparse_fisher').double(), create_images(59)
    shards = Shards(images.double(), [] if rank else [range(59)], named=True)
    timm_fisher.fit(model, DataLoader(shards, batch_size=8))
    return {name: tensor.clone() for name, tensor in model.head.state_dict().items()}


class WithLoss(nn.Module):
    """A model whose `forward` gives the loss too: what DDP wraps."""

    def __init__(self, model: timm_fisher.PooledModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.forward_with_loss(x)


def gradients(model: nn.Module, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
    """Of cross-entropy plus the head's unsupervised loss on this rank's share of 12 images."""
    images, labels = (tensor[rank::world_size] for tensor in create_images(12))
    logits, loss = model(images)
    (F.cross_entropy(logits, labels) + loss).backward()
    return {
        name.removeprefix('module.').removeprefix('model.'): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def updated(rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """gsnmf after its update rule on this rank's part of 11 images; what the stream says of all."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(11, 5, 16, generator=generator).tensor_split(world_size)[rank]
    torch.manual_seed(0)
    head = timm_fisher.create_head('gsnmf', 16, components=8)
    stream = ListStream([x])
    head.partial_fit(stream)
    return {
        'basis': head.basis.detach(),
        'sample': stream.sample(20),
        'sample_images': stream.sample_images(7, lambda x: x.mean(1)),
    }


def metric_learning() -> MetricLearning:
    """An objective whose loss depends on all pairs of a batch, and one that has weights."""
    stage = Stage(train='head', loss={'name': 'ProxyAnchorLoss'}, miner={'name': 'BatchHardMiner'})
    objective = MetricLearning(create('sparse_fisher'), stage, 'images', 3)
    objective.model.eval()  # batch norm would see half of the images
    return objective


def metric_gradients(module: nn.Module, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
    """Of its loss on this rank's share of 12 images."""
    images, labels = (tensor[rank::world_size] for tensor in create_images(12))
    module(images, labels).backward()
    return {
        name.removeprefix('module.'): parameter.grad
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--output', type=Path, required=True)
    output = parser.parse_args().output
    # In evaluation not every parameter is reached: a dropout may have some of its own.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[unused])
    rank, world_size = accelerator.process_index, accelerator.num_processes
    results = {'world_size': world_size, 'fit': {}, 'fit to a stream': {}, 'gradients': {}}
    for head in HEADS:
        results['fit'][head] = fitted(head)
        if head in FITTED:
            results['fit to a stream'][head] = fitted_to_stream(head, rank, world_size)
        module = accelerator.prepare_model(WithLoss(create(head)))
        results['gradients'][head] = gradients(module, rank, world_size)
    results['fit of one rank'] = fitted_by_one_rank(rank)
    results['updated'] = updated(rank, world_size)
    torch.manual_seed(0)
    module = accelerator.prepare_model(metric_learning())
    results['metric_gradients'] = metric_gradients(module, rank, world_size)
    torch.save(results, output / f'rank{rank}.pt')
    accelerator.end_training()


if __name__ == '__main__':
    main()
