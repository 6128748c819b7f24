"""The backbone of a model: what is read of it, what is taken out, where its weights come from."""

import shutil

import pytest
import timm
import torch
from small_models import BACKBONES, create, images, names
from timm.models import get_model_input_config, save_for_hf
from torch import nn

import timm_fisher


@pytest.mark.parametrize(
    ('backbone', 'dead'),
    [
        ('vgg11', 'pre_logits'),
        ('mobilenetv3_small_050', 'conv_head'),
        ('test_convnext', 'head.norm'),
        ('test_vit3', 'attn_pool'),
        ('test_resnet', None),
        ('test_vit', None),
    ],
)
def test_no_parameter_is_dead(backbone, dead):
    with torch.device('meta'):
        plain = timm.create_model(backbone, num_classes=0)
        model = create(backbone)
        x = torch.empty(2, *model.pretrained_cfg['input_size'])
    assert dead is None or any(dead in name for name in names(plain))
    gone = names(plain) - names(model.backbone)
    assert all(dead in name for name in gone)
    assert bool(gone) == bool(dead)
    assert not any(dead in name for name in names(model) if dead)
    model(x).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


# What is pooled


@pytest.mark.parametrize(
    ('class_token', 'expected'),
    [
        ('drop', lambda tokens: tokens[:, 1:].mean(1)),
        ('keep', lambda tokens: tokens.mean(1)),
        ('append', lambda tokens: torch.cat([tokens[:, 1:].mean(1), tokens[:, 0]], 1)),
    ],
)
def test_class_token(class_token, expected):
    model, x = create('test_vit', class_token=class_token), images()
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 1 + 16, 64)
    pooled = model.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(pooled, expected(tokens))
    assert model.num_features == 64
    assert model.head_hidden_size == pooled.shape[1]
    assert model(x).shape == (2, 5)


@pytest.mark.parametrize(
    ('backbone', 'arguments', 'error'),
    [
        ('test_resnet', {'class_token': 'keep'}, 'ResNet has none'),
        ('test_resnet', {'class_token': 'append'}, 'ResNet has none'),
        ('test_vit', {'class_token': 'append', 'stage': -2}, 'has none at stage=-2'),
        ('test_vit2', {'class_token': 'append'}, 'the 1 prefix tokens .* are registers'),
        ('test_vit', {'class_token': 'pool'}, 'not one of drop, keep, append'),
        ('test_resnet', {'stage': 0}, r'stage=0 does not exist in ResNet.*-2 \.\.\. -5'),
        ('test_resnet', {'stage': -6}, 'stage=-6 does not exist in ResNet'),
        ('gemma4_vit_570m_enc', {'stage': -2}, r'cannot be read at stage=-2.*meta'),
        ('test_resnt', {}, "Unknown backbone 'test_resnt'. Did you mean .*'test_resnet'"),
        ('timm_fisher', {}, "Unknown backbone 'timm_fisher'"),
        ('test_resnet', {'head': 'agv'}, "Unknown head 'agv'. Did you mean 'avg'"),
    ],
)
def test_wrong_values(backbone, arguments, error):
    with pytest.raises(ValueError, match=error):
        create(backbone, **arguments)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'holds no config\.json.*lite0_weights\.py'):
        create(f'local-dir:{tmp_path}')


@pytest.mark.parametrize(
    ('arguments', 'error'),
    [
        ({'backbone': nn.Linear(3, 4)}, "such as 'resnet50', not a Linear"),
        ({'head': nn.Linear}, "given by their names, as in 'gem' .*; got <class"),
        ({'lora': 8}, "lora is a dict, such as {'r': 8}, not 8"),
    ],
)
def test_wrong_types(arguments, error):
    with pytest.raises(TypeError, match=error):
        timm_fisher.create_model(**{'backbone': 'test_resnet', **arguments})


def test_registers_can_be_kept():
    model, x = create('test_vit2', class_token='keep'), images()
    tokens = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens.mean(1))


@pytest.mark.parametrize(
    ('backbone', 'gone'),
    [
        ('test_resnet', 'layer4.'),
        ('test_efficientnet', 'blocks.4.'),
        ('test_convnext', 'stages.3.'),
        ('test_vit', 'blocks.5.'),
    ],
)
def test_earlier_stage(backbone, gone):
    model, x = create(backbone, stage=-2), images()
    plain = timm.create_model(backbone, num_classes=0).eval()
    plain.load_state_dict(model.backbone.state_dict(), strict=False)
    expected = plain.forward_intermediates(x, indices=[-2], intermediates_only=True)[0]
    assert torch.equal(model.forward_features(x), expected)
    assert model.num_features == expected.shape[1] == plain.feature_info[-2]['num_chs']
    assert model(x).shape == (2, 5)
    assert any(name.startswith(gone) for name in names(plain))
    assert not any(name.startswith(gone) for name in names(model.backbone))
    assert names(model.backbone) < names(plain)


def test_last_stride_keeps_the_grid_without_dilation(tmp_path):
    plain, model = (create('resnet18', last_stride=stride) for stride in (None, 1))
    x = images(size=96)
    assert plain.forward_features(x).shape[2:] == (3, 3)
    features = model.forward_features(x)
    assert features.shape[2:] == (6, 6)
    # Every other one is that of stride 2 where only the convolution that strode is between.
    torch.testing.assert_close(
        model.backbone.layer4[0].conv1(torch.ones(1, 256, 8, 8))[..., ::2, ::2],
        plain.backbone.layer4[0].conv1(torch.ones(1, 256, 8, 8)),
    )
    convolutions = [each for each in model.modules() if isinstance(each, torch.nn.Conv2d)]
    assert all(each.dilation == (1, 1) for each in convolutions)
    timm_fisher.save_model(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(loaded(x), model(x))
    dilated = create('resnet50', backbone_kwargs={'output_stride': 16})
    assert dilated.forward_features(x).shape[2:] == (6, 6)


@pytest.mark.parametrize(
    ('backbone', 'value', 'error'),
    [
        ('resnet18', 2, 'last_stride=2 is not 1'),
        ('test_vit', 1, 'VisionTransformer has none here'),
        ('resnet50d', 1, 'that only convolutions make smaller'),
    ],
)
def test_last_stride_that_cannot_be(backbone, value, error):
    with torch.device('meta'), pytest.raises(ValueError, match=error):
        create(backbone, last_stride=value)


@pytest.mark.parametrize('backbone', BACKBONES)
def test_grey_images(backbone):
    model = create(backbone, in_chans=1)
    assert model.in_chans == model.pretrained_cfg['input_size'][0] == 1
    assert model(images(channels=1)).shape == (2, 5)


def test_pretrained_means_the_weights_of_the_backbone(tmp_path):
    plain = timm.create_model('test_resnet').eval()
    torch.save(plain.state_dict(), tmp_path / 'weights.pth')
    overlay = {'file': str(tmp_path / 'weights.pth')}
    model = create(pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.forward_features(images()), plain.forward_features(images()))

    (tmp_path / 'weights.pth').unlink()
    timm_fisher.save_model(model, tmp_path / 'saved')
    loaded = timm.create_model(f'local-dir:{tmp_path}/saved', pretrained=True).eval()
    assert torch.equal(loaded(images()), model(images()))


@pytest.mark.parametrize(
    ('name', 'arguments'),
    [
        ('test_resnet', {}),
        ('test_resnet', {'in_chans': 1}),
        ('test_vit', {'depth': 2, 'reg_tokens': 2}),
    ],
)
def test_backbone_from_a_folder(tmp_path, name, arguments):
    plain = timm.create_model(name, num_classes=3, **arguments).eval()
    save_for_hf(plain, tmp_path / 'backbone', safe_serialization=True)
    model = create(f'local-dir:{tmp_path}/backbone', pretrained=True)
    x = images(channels=arguments.get('in_chans', 3))
    assert torch.equal(model.forward_features(x), plain.forward_features(x))

    save_for_hf(model, tmp_path / 'model', safe_serialization=True)
    shutil.rmtree(tmp_path / 'backbone')
    loaded = timm.create_model(f'local-dir:{tmp_path}/model', pretrained=True).eval()
    assert torch.equal(loaded(x), model(x))
    assert get_model_input_config(loaded) == get_model_input_config(model)


def test_a_pooled_model_is_no_backbone(tmp_path):
    """Else it would be saved under the backbone 'timm_fisher', which cannot be built again."""
    timm_fisher.save_model(create(), tmp_path)
    with pytest.raises(ValueError, match='timm_fisher'):
        create(f'local-dir:{tmp_path}', pretrained=True)
