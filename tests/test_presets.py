"""The papers' configurations by name, and their training configurations beside them."""

from __future__ import annotations

import functools
import inspect
import json

import pytest
import timm
import torch
from conftest import ROOT
from timm.models import _registry
from torch import nn

import timm_fisher
from timm_fisher.presets import PRESETS
from timm_fisher.training.command_line import parse
from timm_fisher.training.config import Config
from timm_fisher.training.run import create_model

# Side of the image, side of the grid, length of the pooled vector: the papers' sections 3.3 (3G),
# 4.2 (sparse Fisher), 4.1 (Deep Fisher Kernels).
SHAPES = {
    'resnet18_3g': (224, 14, 256 * 257 // 2),
    'resnet50_3g': (224, 14, 256 * 257 // 2),
    'resnet101_3g': (224, 14, 256 * 257 // 2),
    'resnet18_isqrt_cov': (224, 14, 256 * 257 // 2),
    'resnet50_isqrt_cov': (224, 14, 256 * 257 // 2),
    'resnet101_isqrt_cov': (224, 14, 256 * 257 // 2),
    'vgg16_sparse_fisher': (448, 28, 512 * 100),
    'resnet50_sparse_fisher': (224, 7, 128 * 32),
    'vgg16_gmm_fisher': (448, 28, 4096),
    'resnet50_gmm_fisher': (224, 7, 4096),
    'vgg16_bilinear': (448, 28, 512 * 513 // 2),
    'vgg16_netvlad': (448, 28, 64 * 512),
}
# Training configurations, and the preset that each trains.
CONFIGS = {
    '3g_imagenet': 'resnet50_3g',
    '3g_places365': 'resnet50_3g',
    'sparse_fisher_cub': 'vgg16_sparse_fisher',
    'sparse_fisher_mit67': 'vgg16_sparse_fisher',
    'sparse_fisher_minc': 'resnet50_sparse_fisher',
}


def on_meta(name, **arguments):
    with torch.device('meta'):
        return timm.create_model(name, **arguments).eval()


@functools.cache
def preset(name):
    return on_meta(name, num_classes=365)


def tensors(model):
    return {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}


def test_listed():
    assert set(timm.list_models('*_3g')) == {'resnet18_3g', 'resnet50_3g', 'resnet101_3g'}
    assert set(timm.list_models(module='presets')) == set(PRESETS) == set(SHAPES)


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=pytest.mark.slow) if 'resnet101' in name else name
        for name in PRESETS
    ],
)
def test_shapes(name):
    size, side, length = SHAPES[name]
    model = preset(name)
    assert model.pretrained_cfg['input_size'] == (3, size, size)
    assert model.pretrained_cfg['pool_size'] == (side, side)
    known = timm.get_pretrained_cfg(name).to_dict()  # without building it
    ignored = {'architecture': name, 'num_classes': 1000, 'custom_load': False}
    assert known == model.pretrained_cfg | ignored
    features = model.forward_features(torch.empty(2, 3, size, size, device='meta'))
    assert features.shape == (2, model.num_features, side, side)
    assert model.forward_head(features, pre_logits=True).shape == (2, length)
    assert model.forward_head(features).shape == (2, 365)


@pytest.mark.parametrize(
    'head_kwargs', [{}, {'code_dim': 7}, {'reduce_dim': 64, 'tied': True}], ids=str
)
def test_recorded_arguments_build_it_without_the_preset(head_kwargs):
    """Those that the caller gave in place of the preset's are not all that is recorded."""
    model = on_meta('vgg16_sparse_fisher', head_kwargs=head_kwargs)
    saved = json.loads(json.dumps(timm.models.get_model_args(model)))
    assert saved['head_kwargs'] == {**PRESETS['vgg16_sparse_fisher']['head_kwargs'], **head_kwargs}
    assert tensors(on_meta('timm_fisher', **saved)) == tensors(model)


def test_three_g_adds_what_the_paper_says():
    """Section 3.3: 0.34 million weights a block, without those of batch norm."""
    sizes = [
        sum(p.numel() for p in preset(name).parameters() if p.ndim > 1)
        for name in ('resnet18_3g', 'resnet18_isqrt_cov')
    ]
    assert round((sizes[0] - sizes[1]) / 3e6, 2) == 0.34


def test_vgg_is_read_at_conv5_3():
    """Behind the ReLU of the last convolution, ahead of the last max pool."""
    model = on_meta('vgg16_sparse_fisher')  # not the cached one: it gets hooks
    ran = []
    for layer in model.backbone.features:
        layer.register_forward_hook(lambda layer, *_: ran.append(type(layer)))
    model.forward_features(torch.empty(1, 3, 448, 448, device='meta'))
    assert ran.count(nn.Conv2d) == 13
    assert ran[-2:] == [nn.Conv2d, nn.ReLU]


def test_arguments_take_the_place_of_the_presets():
    model = on_meta('vgg16_sparse_fisher', head_kwargs={'code_dim': 7}, img_size=96, num_classes=3)
    assert (model.head.in_features, model.head_hidden_size) == (512, 512 * 7)  # still no reduction
    assert on_meta('vgg16_sparse_fisher', code_dim=7).head_hidden_size == 512 * 7
    assert model.pretrained_cfg['input_size'] == (3, 96, 96)
    model = on_meta('resnet18_3g', head='avg', backbone='resnet34')
    assert model.head_hidden_size == 512
    assert len(model.backbone.layer4) == 3
    model = on_meta('resnet18_3g', head=[{'name': 'avg'}, {'name': 'gem', 'stage': -2}])
    assert model.head_hidden_size == 512 + 256
    assert PRESETS['vgg16_sparse_fisher']['head_kwargs']['code_dim'] == 100


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'num_clases': 3}, "has an argument 'num_clases'.* Did you mean 'num_classes'"),
        ({'head_kwargs': {'block': 1}}, "'3g' has no argument 'block'.* Did you mean 'blocks'"),
    ],
    ids=['model', 'head'],
)
def test_unknown_argument(arguments, message):
    with pytest.raises(TypeError, match=message):
        on_meta('resnet18_3g', **arguments)


def test_unknown_tag():
    with pytest.raises(ValueError, match=r"no tag 'nonsense'.* as in backbone='resnet50"):
        on_meta('resnet18_3g.nonsense')


def test_is_no_backbone():
    with pytest.raises(ValueError, match="Unknown backbone 'resnet18_3g'"):
        timm_fisher.PooledModel('resnet18_3g')
    with pytest.raises(ValueError, match="Unknown backbone 'resnet18_3g'"):
        timm_fisher.create_model('resnet18_3g', num_classes=3)
    with pytest.raises(ValueError, match="Unknown backbone 'resnet5_3g'") as error:
        timm_fisher.PooledModel('resnet5_3g')
    assert 'resnet50_3g' not in str(error.value)


def test_pretrained_is_the_backbone(tmp_path):
    backbone = timm.create_model('resnet18')
    torch.save(backbone.state_dict(), tmp_path / 'resnet18.pth')
    model = timm.create_model(
        'resnet18_3g',
        pretrained=True,
        pretrained_cfg_overlay={'file': str(tmp_path / 'resnet18.pth')},
        num_classes=3,
    )
    state = backbone.state_dict()
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, state[key])


def test_two_steps_then_saved_and_loaded(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model('resnet18_3g', num_classes=5, img_size=64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
    for _ in range(2):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    timm_fisher.save_model(model, tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['architecture'] == 'timm_fisher'
    assert config['model_args']['head_kwargs'] == PRESETS['resnet18_3g']['head_kwargs']
    # Another release may have another preset, or none.
    for name in PRESETS:
        monkeypatch.delitem(_registry._model_entrypoints, name)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), model.eval()(images))


@pytest.mark.parametrize('config', CONFIGS)
def test_config_trains_the_preset(config):
    """Its run on fake data is in training/test_run.py."""
    file = ROOT / 'recipes' / 'configs' / f'{config}.yaml'
    parsed = parse(Config, arguments=['--config', str(file), '--pretrained', 'false'])
    with torch.device('meta'):
        model = create_model(parsed, 365)
    expected = preset(CONFIGS[config])
    assert tensors(model) == tensors(expected)
    assert model.pretrained_cfg == expected.pretrained_cfg
    made, wanted = (timm.models.get_model_args(each) for each in (model, expected))
    given, settings = made.pop('head_kwargs', {}), wanted.pop('head_kwargs')
    assert made == wanted
    assert given.items() <= settings.items()
    defaults = inspect.signature(timm_fisher.get_head(model._model_args['head'])).parameters
    assert all(defaults[key].default == settings[key] for key in settings.keys() - given.keys())


def test_a_preset_with_stages_of_its_own():
    model = timm.create_model('vgg16_sparse_fisher', head='avg + sparse_fisher@-2', num_classes=3)
    assert [reader.stage for reader in model.descriptors] == [-2, -1]
