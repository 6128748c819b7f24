"""A saved model of every family comes back to the bit: it is built on the meta device, and gets
its tensors and what is derived from them there."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
from test_descriptors import FAMILIES, LARGE

import timm_fisher

# Positions, windows, masks and frequencies that are not saved.
TIED = ('coat_lite_tiny',)
QUICK = ('test_vit_relpos', 'swin_tiny_patch4_window7_224', 'eva02_tiny_patch14_336')


@pytest.mark.parametrize(
    'name',
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in FAMILIES
        if name not in (*LARGE, *TIED)
    ],
)
def test_family_comes_back(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = timm_fisher.create_model(name, 'avg', num_classes=3).eval()
    timm_fisher.save_model(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(1, *model.pretrained_cfg['input_size'])
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
        assert model(x).isfinite().all()


@pytest.mark.parametrize('name', TIED)
def test_tied_tensors_cannot_be_saved(tmp_path, name):
    model = timm_fisher.create_model(name, 'avg', num_classes=3)
    with pytest.raises(ValueError, match=r'A CoaT uses some tensors in several places'):
        timm_fisher.save_model(model, tmp_path / 'new')
    assert not (tmp_path / 'new' / 'model.safetensors').exists()
