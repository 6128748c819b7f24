"""The backbone `pixels`."""

from __future__ import annotations

import pytest
import timm
import torch

import timm_fisher


def images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def test_gives_the_binary_image_row_by_row():
    x = images(2, 1, 28, 28)
    model = timm.create_model('pixels', threshold=0.3)
    assert model.forward_features(x).shape == (2, 784, 1, 1)
    assert torch.equal(model(x), (x > 0.3).float().flatten(1))
    assert torch.equal(timm.create_model('pixels')(x), (x > 0.5).float().flatten(1))


@pytest.mark.parametrize('size', [8, (20, 16)])
def test_is_a_backbone(size, tmp_path):
    arguments = {'in_chans': 3, 'img_size': size, 'backbone_kwargs': {'threshold': 0.4}}
    model = timm_fisher.create_model('pixels', 'avg', num_classes=4, **arguments).eval()
    height, width = size if isinstance(size, tuple) else (size, size)
    x = images(2, 3, height, width)
    assert model.pretrained_cfg['input_size'] == (3, height, width)
    (descriptors,) = model.descriptors([model.forward_features(x)])
    assert descriptors.shape == (2, 1, 3 * height * width)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.equal(pooled, (x > 0.4).float().flatten(1))
    timm_fisher.save_model(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(loaded(x), model(x))


def test_has_no_classifier():
    with pytest.raises(ValueError, match=r"'pixels' has no classifier, but num_classes=5"):
        timm.create_model('pixels', num_classes=5)
