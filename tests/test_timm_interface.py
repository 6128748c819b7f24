"""What timm's own tools ask of a model beside `forward`: .github/timm_tests.md has the outcome of
timm's tests."""

import copy
import json
import warnings

import pytest
import timm
import torch
from distributed_checks import COMPOSED, HEADS, SMALL
from safetensors.torch import load_file
from small_models import backbone_of, create, images
from timm.data import resolve_input_data_config
from timm.models import create_feature_extractor, get_graph_node_names
from timm.models._features import FeatureGetterNet
from torch import nn

import timm_fisher
from timm_fisher.head import PoolingHead, Unpooled

SEVERAL = [{'name': 'avg'}, {'name': 'gem', 'stage': -2}]


def small(head, backbone='test_resnet', **arguments):
    """A model on a map of 2 x 2 x 96 at 64 px, or a transformer's where a head needs it."""
    if head == COMPOSED:
        return create(backbone, SEVERAL, **arguments)
    if backbone == 'test_resnet' and backbone_of(head) == 'test_vit':
        backbone, arguments = 'test_vit', {'img_size': 64, **arguments}
    return create(backbone, head, head_kwargs=SMALL.get(head), **arguments)


@pytest.fixture(autouse=True)
def _ignore_deprecations():
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*torch.(jit|ao)', category=Warning)
        yield


# TorchScript, torch.fx, quantization


@pytest.mark.parametrize('head', timm_fisher.list_heads())
def test_script_takes_every_head(head):
    """It was recorded with another number of images and of descriptors."""
    model, x = small(head), torch.cat([images(), images()[:1]])
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x), rtol=1e-4, atol=1e-5)
    assert all(a is b for a, b in zip(scripted.parameters(), model.parameters(), strict=False))
    if not model.head.asks_for:  # which only a whole model gives
        alone, x = torch.jit.script(model.head), torch.randn(3, 7, 96)
        torch.testing.assert_close(alone(x), model.head(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('backbone', 'arguments'),
    [
        ('test_vit', {'class_token': 'append'}),
        ('test_convnext', {'head': [{'name': 'avg'}, {'name': 'gem'}]}),
    ],
)
def test_script_of_what_surrounds_the_head(backbone, arguments):
    with timm.layers.set_scriptable(True):
        model = create(backbone, **{'head': 'avg', **arguments})
    x = images(size=160)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_script_of_a_model_in_training_mode():
    """As validate.py --torchscript does it: nothing changes, and the result is for inference."""
    model, x = create(head='3g', head_kwargs={'reduce_dim': 8}), images()
    expected, before = model(x), copy.deepcopy(model.state_dict())
    scripted = torch.jit.script(model.train()).eval()
    assert model.training
    assert model.head.reduce.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(scripted(x), expected, rtol=1e-4, atol=1e-5)


def test_script_refuses_an_earlier_stage():
    with pytest.raises(ValueError, match='takes no model that reads ResNet by forward_interm'):
        torch.jit.script(create(stage=-2))


class PluginHead(PoolingHead):
    """Python that neither torch.fx nor TorchScript knows."""

    def __init__(self, in_features):
        super().__init__()
        self.in_features = self.out_features = in_features

    def forward(self, x):
        return x.mean(1) if len(x) > 1 and {'x': x} else x.amax(1)


@pytest.mark.parametrize('head', [*HEADS, 'plugin'])
def test_fx_takes_every_head(head):
    # timm's test_vit takes images of any size, which torch.fx cannot follow.
    backbone = 'vit_tiny_patch16_224' if backbone_of(head) == 'test_vit' else 'test_resnet'
    place = {'img_size': 64} if backbone == 'vit_tiny_patch16_224' else {}
    model, x = small('avg' if head == 'plugin' else head, backbone, **place), images()
    if head == 'plugin':
        model.head = PluginHead(96)
    _, nodes = get_graph_node_names(model)
    assert nodes[-1] == 'classifier'
    assert 'head' in nodes
    traced = create_feature_extractor(model, [nodes[-1]])
    torch.testing.assert_close(traced(x)['classifier'], model(x))
    if head in ('3g', COMPOSED):
        scripted = torch.jit.script(traced)
        torch.testing.assert_close(scripted(x)['classifier'], model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('head', ['sparse_fisher', '3g'])
def test_dynamic_quantization(head):
    model, x = small(head), images()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert isinstance(quantized.classifier, torch.ao.nn.quantized.dynamic.Linear)
    difference = (quantized(x) - model(x)).norm() / model(x).norm()
    assert 0 < difference < 0.05


# Device and type


@pytest.mark.parametrize('head', HEADS)
def test_built_on_meta_then_filled(head):
    """As transformers loads a model of timm's."""
    model, x = small(head), images()
    with torch.device('meta'):
        empty = small(head)
    filled = empty.to_empty(device='cpu')
    for buffer in filled.buffers():
        buffer.fill_(1)
    filled.load_state_dict(model.state_dict())
    for module in filled.modules():
        if hasattr(module, 'init_non_persistent_buffers'):
            module.init_non_persistent_buffers()
    assert torch.equal(filled(x), model(x))


def test_steps_of_transformers(tmp_path):
    """What `AutoModelForImageClassification` does with a saved folder."""
    model, x = small('bilinear'), images()
    model.backbone_weights = {'hf_hub_id': 'USER/NAME', 'sha256': '0' * 64}  # as if it had some
    timm_fisher.save_model(model, tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    with torch.device('meta'):
        built = timm.create_model(
            config['architecture'], num_classes=config['num_classes'], **config['model_args']
        )
    built.load_state_dict(load_file(tmp_path / 'model.safetensors'), assign=True)
    built.head.triangle.to_empty(device='cpu').init_non_persistent_buffers()
    assert torch.equal(built.eval()(x), model(x))
    assert torch.equal(timm_fisher.from_pretrained(tmp_path).eval()(x), model(x))


@pytest.mark.parametrize('name', ['timm_fisher', 'resnet18_3g', 'saved'])
def test_device_and_dtype(tmp_path, name):
    options = {'timm_fisher': {'backbone': 'test_resnet', 'head': 'gem'}}
    if name == 'saved':
        timm_fisher.save_model(small('bilinear'), tmp_path)
        name, options['saved'] = f'local-dir:{tmp_path}', {'pretrained': True}
        model = timm_fisher.from_pretrained(tmp_path, dtype=torch.float64)
        assert model(images().double()).dtype == torch.float64
    for placed in ({'device': 'meta'}, {'dtype': torch.bfloat16}, {'device': 'cpu'}):
        model = timm.create_model(name, **options.get(name, {}), **placed)
        tensors = [*model.parameters(), *model.buffers()]
        assert {t.device.type for t in tensors} == {placed.get('device', 'cpu')}
        kinds = {t.dtype for t in tensors if t.is_floating_point()}
        assert kinds == {placed.get('dtype', torch.float32)}
        assert not {'device', 'dtype'} & timm.models.get_model_args(model).keys()


# Maps of the backbone


def test_features_only_is_what_timm_gives():
    options = {'out_indices': (1, 3), 'in_chans': 1, 'feature_cls': 'getter'}
    torch.manual_seed(0)
    expected = timm.create_model('test_resnet', features_only=True, **options).eval()
    torch.manual_seed(0)
    arguments = {'backbone': 'test_resnet', 'head': 'gem', 'num_classes': 3, 'img_size': 64}
    features = timm.create_model('timm_fisher', features_only=True, **arguments, **options).eval()
    x = images(channels=1)
    torch.testing.assert_close(features(x), expected(x), rtol=0, atol=0)
    assert features.feature_info.channels() == expected.feature_info.channels()


@pytest.mark.parametrize('options', [{}, {'feature_cls': 'getter', 'out_indices': (2, 4)}])
def test_features_of_a_preset_keep_its_stride(options):
    with torch.device('meta'):
        features = timm.create_model('resnet18_3g', features_only=True, **options)
        assert features(torch.empty(1, 3, 64, 64))[-1].shape == (1, 512, 4, 4)
        assert features.feature_info.reduction()[-1] == 16
        early = timm.create_model('resnet18_3g', features_only=True, out_indices=(1,))
        assert len(early(torch.empty(1, 3, 64, 64))) == 1


@pytest.mark.parametrize(('stage', 'left'), [(-1, 5), (-2, 4)])
def test_features_of_a_saved_model(tmp_path, stage, left):
    model, x = create(stage=stage), images()
    timm_fisher.save_model(model, tmp_path)
    name = f'local-dir:{tmp_path}'
    features = timm.create_model(name, pretrained=True, features_only=True).eval()
    expected = model.backbone.forward_intermediates(
        x, indices=list(range(left)), intermediates_only=True
    )
    torch.testing.assert_close(features(x), expected, rtol=0, atol=0)
    assert features.feature_info.channels() == [maps.shape[1] for maps in expected]
    last = timm.create_model(name, pretrained=True, features_only=True, out_indices=(-1,)).eval()
    assert torch.equal(last(x)[0], expected[-1])
    with pytest.raises(AssertionError, match='out of range'):
        timm.create_model(name, features_only=True, out_indices=(left,))
    with pytest.raises(ValueError, match="feature_cls='list' is not supported"):
        timm.create_model(name, features_only=True, feature_cls='list')
    with pytest.raises(TypeError, match="'out_indices'"):
        timm.create_model(name, out_indices=(1, 2))


def test_feature_info_is_of_this_model():
    model, x = create(stage=-2), images()
    modules = [stage['module'] for stage in model.feature_info]
    assert modules == ['backbone.act1', *(f'backbone.layer{i}' for i in (1, 2, 3))]
    assert all(model.get_submodule(module) for module in modules)
    output, maps = model.forward_intermediates(x)
    assert torch.equal(output, model.forward_features(x))
    assert [part.shape[1] for part in maps] == [s['num_chs'] for s in model.feature_info]
    (last,) = model.forward_intermediates(x, -1 + 2, intermediates_only=True)
    assert torch.equal(last, maps[-1])


@pytest.mark.parametrize(
    ('backbone', 'arguments'),
    [
        ('test_resnet', {}),
        ('test_convnext', {}),  # asks its old head, which is not called, to reset itself
        ('test_vit', {'class_token': 'append'}),
        ('test_resnet', {'stage': -2}),
    ],
)
def test_prune_intermediate_layers(backbone, arguments):
    model, x = create(backbone, **arguments), images(size=160)
    expected, maps = model(x), model.forward_intermediates(x, intermediates_only=True)
    last = len(maps) - 1
    assert model.prune_intermediate_layers([0, last], prune_head=False) == [0, last]
    assert torch.equal(model(x), expected)

    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert isinstance(model.head, Unpooled)
    assert len(model.feature_info) == 2
    descriptors = model(x)
    assert torch.equal(descriptors, maps[1].flatten(2).transpose(1, 2))
    assert descriptors.shape[2] == model.num_features == model.head_hidden_size
    descriptors.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert FeatureGetterNet(model, (0,)).eval()(x)[0].shape == maps[0].shape


# Arguments


def test_arguments_of_the_backbone(tmp_path):
    model, x = create('resnet18', output_stride=16), images()
    assert model.forward_features(x).shape == (2, 512, 4, 4)
    assert model.pretrained_cfg['pool_size'] == (14, 14)
    timm_fisher.save_model(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(TypeError, match="no argument 'output_stride'"):
        timm.create_model(f'local-dir:{tmp_path}', output_stride=8)


def test_output_stride_takes_the_place_of_a_presets_last_stride():
    with torch.device('meta'):
        model = timm.create_model('resnet18_3g', output_stride=8)
    assert model.pretrained_cfg['pool_size'] == (28, 28)


@pytest.mark.parametrize('name', ['timm_fisher', 'resnet18_3g'])
def test_global_pool_is_refused(name):
    with pytest.raises(TypeError, match="global_pool='' cannot be set: this model pools by its"):
        timm.create_model(name, backbone='test_resnet', global_pool='')


# Sizes


@pytest.mark.parametrize(
    ('backbone', 'size', 'grids'),
    [
        ('test_resnet', (64, 96), [(5, 5), (2, 3)]),
        ('test_vit', (64, 96), [(10, 10), (4, 6)]),
        ('swin_tiny_patch4_window7_224', (448, 224), [(7, 7), (14, 7)]),
    ],
)
def test_pool_size(backbone, size, grids):
    with torch.device('meta'):
        model = create(backbone)
        assert model.pretrained_cfg['pool_size'] == grids[0]
        model.set_input_size(size)
        assert model.pretrained_cfg['pool_size'] == grids[1]
        (descriptors,) = model.descriptors([model.forward_features(torch.empty(1, 3, *size))])
    assert descriptors.shape[1] == grids[1][0] * grids[1][1]


def test_pool_size_leaves_the_model_as_it_is():
    model = create().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.set_input_size(96)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(module.training for module in model.modules())


def test_pool_size_where_attention_is_kept():
    """timm keeps it between calls in eval mode, as a tensor that cannot be copied."""
    with torch.device('meta'):
        model = create('levit_128s')
        model(torch.empty(1, 3, 224, 224))
        assert model.descriptors.grid(model.backbone, (3, 224, 224)) == (4, 4)
    assert not any(module.training for module in model.modules())


def test_other_patches(tmp_path):
    model = create('test_vit')
    model.set_input_size(img_size=64, patch_size=8)
    x = images()
    assert model.forward_features(x).shape == (2, 1 + 64, 64)
    assert model.pretrained_cfg['pool_size'] == (8, 8)
    timm_fisher.save_model(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(loaded(x), model(x))
    assert resolve_input_data_config(loaded)['input_size'] == (3, 64, 64)
    with pytest.raises(ValueError, match=r'ResNet, built .* cannot change to patch_size=\(8, 8'):
        create().set_input_size(patch_size=8)


def test_pool_size_of_a_saved_model(tmp_path):
    timm_fisher.save_model(create(), tmp_path)
    name = f'local-dir:{tmp_path}'
    assert timm.create_model(name).pretrained_cfg['pool_size'] == (5, 5)
    loaded = timm.create_model(name, pretrained=True, img_size=96)
    assert loaded.pretrained_cfg['pool_size'] == (3, 3)
