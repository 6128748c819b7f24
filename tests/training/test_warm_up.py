"""The warm-up of the sparse Fisher paper, at its learning rate and without clip_grad."""

from __future__ import annotations

import pytest
import torch
from conftest import DATA
from run_checks import read_log
from torch import nn
from torch.nn import functional as F

from timm_fisher import ListStream, create_head
from timm_fisher.hub.pypi import write_lite0

STAGE = {
    'train': 'head', 'epochs': 30, 'opt': 'momentum', 'lr': 0.004, 'weight_decay': 0.0005,
    'sched': 'constant', 'head_loss': 1.0,
}  # fmt: skip


@pytest.mark.slow
def test_on_trashnet(recipe, tmp_path):
    if not (DATA / 'trashnet').exists():
        pytest.skip('needs trashnet: set TIMM_FISHER_DATA to the folder that holds it')
    write_lite0(tmp_path / 'lite0')
    run = recipe(
        data_dir=DATA / 'trashnet',
        backbone=f'local-dir:{tmp_path / "lite0"}',
        pretrained=True,
        head='sparse_fisher',
        head_kwargs={'reduce_dim': 96, 'code_dim': 64},
        img_size=160,
        batch_size=64,
        stages={'warmup': STAGE},
    )
    losses = [row['train_loss'] for row in read_log(run)]
    assert len(losses) == 30
    assert losses[-1] < 0.9 * losses[0]
    assert max(losses) == losses[0]


@pytest.mark.parametrize('head', ['sparse_fisher', 'hscfv'])
def test_learns_the_same_at_any_scale_of_the_backbone(head):
    # Powers of two, which leave rounding as it is: training makes much of little.
    small, losses, large = (warm_up(head, scale) for scale in (2**-10, 1, 2**10))
    assert losses[-1] < 0.9 * losses[0]
    assert small == pytest.approx(losses, rel=1e-9)
    assert large == pytest.approx(losses, rel=1e-9)


def warm_up(name: str, scale: float) -> list[float]:
    """The loss before each of 50 steps on descriptors of three classes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 3
    atoms = torch.randn(3, 8, 24, generator=generator)
    codes = torch.randn(24, 10, 8, generator=generator)
    codes *= torch.rand(codes.shape, generator=generator) < 0.3
    noise = 0.1 * torch.randn(24, 10, 24, generator=generator)
    x = scale * (codes @ atoms[labels] + noise + 1).double()

    torch.manual_seed(0)
    head = create_head(name, 24, reduce_dim=12, code_dim=16)
    classifier = nn.Linear(head.out_features, 3)
    model = nn.ModuleList([head, classifier]).double()
    head.fit(ListStream([x]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.004, momentum=0.9, weight_decay=0.0005)
    losses = []
    for _ in range(50):
        pooled, unsupervised = head.forward_with_loss(x)
        loss = F.cross_entropy(classifier(pooled), labels) + unsupervised
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        head.project_()
    return losses
