"""`PooledModel` speaks timm's language."""

import copy

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_models import BACKBONES, create, images, names
from timm.data import create_transform, resolve_input_data_config
from timm.models import resolve_model_input_args
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV2, ModelEmaV3
from torch.utils.data import DataLoader, TensorDataset

import timm_fisher
from timm_fisher import PooledModel
from timm_fisher.explain import class_names

# Outputs


@pytest.mark.parametrize('backbone', BACKBONES)
def test_forward_is_features_then_head(backbone):
    model, x = create(backbone, head='sparse_fisher', code_dim=4), images()
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert features.shape[0] == 2
    assert torch.equal(features, model.backbone.forward_features(x))
    assert model.num_features in features.shape[1:]
    assert pooled.shape == (2, model.head_hidden_size)
    assert model(x).shape == (2, model.num_classes)
    assert torch.equal(model(x), model.forward_head(features))
    assert torch.equal(model(x), model.get_classifier()(pooled))


def test_forward_with_loss_gives_the_unsupervised_loss_too():
    model, x = create(head='sparse_fisher', code_dim=4), images()
    logits, loss = model.forward_with_loss(x)
    assert torch.equal(logits, model(x))
    (descriptors,) = model.descriptors([model.forward_features(x)])
    assert torch.equal(loss, model.head.forward_with_loss(descriptors)[1])
    assert loss.ndim == 0
    assert loss > 0


def test_no_classes_gives_embeddings():
    model, x = create(head='sparse_fisher', num_classes=0), images()
    assert isinstance(model.get_classifier(), torch.nn.Identity)
    embedding = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.equal(model(x), embedding)
    assert embedding.shape == (2, model.head.out_features)


def test_sizes_and_aliases():
    model = create(head='sparse_fisher', code_dim=3, reduce_dim=4)
    assert model.num_features == 96
    assert model.head_hidden_size == model.head.out_features == 12
    assert model.default_cfg is model.pretrained_cfg
    assert model.get_classifier() is model.classifier


@pytest.mark.parametrize('backbone', [*BACKBONES, 'crossvit_tiny_240'])
def test_names_in_pretrained_cfg_resolve(backbone):
    with torch.device('meta'):
        model = create(backbone)
    cfg = model.pretrained_cfg
    stems = [cfg['first_conv']] if isinstance(cfg['first_conv'], str) else cfg['first_conv']
    assert stems
    for stem in stems:
        assert model.get_submodule(stem).in_channels == cfg['input_size'][0] == 3
    assert model.get_submodule(cfg['classifier']) is model.classifier
    assert cfg['architecture'] == 'timm_fisher'
    assert cfg['num_classes'] == 5
    assert cfg['mean'] == model.backbone.pretrained_cfg['mean']


def test_print_shows_parts_in_order_of_use():
    text = repr(create(head='sparse_fisher', code_dim=7))
    order = [
        '(backbone): ResNet',
        '(descriptors): StageDesc',
        '(head): SparseFisher',
        '(classifier): L',
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert 'code_dim=7' in text


def test_copies_are_equal():
    model, x = create(head='sparse_fisher', code_dim=4), images()
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize('average', [ModelEmaV2, ModelEmaV3])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_timms_moving_average_of_weights(average, memory_format):
    model = create(head='sparse_fisher', code_dim=4).to(memory_format=memory_format)
    moving = average(model, decay=0.5)
    before = {name: value.clone() for name, value in moving.module.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    moving.update(model)
    for name, value in moving.module.named_parameters():
        torch.testing.assert_close(value, before[name] + 0.5)


# Classifier


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('place', [torch.bfloat16, torch.float64, 'meta'])
def test_reset_classifier_keeps_device_dtype_and_mode(place, training):
    model = create().to(place).train(training)
    old = model.classifier.weight
    model.reset_classifier(7)
    assert model.num_classes == model.classifier.out_features == 7
    assert model.classifier.weight.dtype == old.dtype
    assert model.classifier.weight.device == old.device
    assert model.classifier.training == training
    assert model(images().to(place)).shape == (2, 7)


def test_reset_classifier_to_none_and_back():
    model, x = create(), images()
    embedding = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert torch.equal(model(x), embedding)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)


def test_reset_classifier_forgets_the_names_of_the_old_classes(tmp_path):
    model = timm_fisher.create_model('test_resnet', num_classes=2)
    timm_fisher.save_model(model, tmp_path, label_names=['ash', 'elm'])
    model = timm_fisher.from_pretrained(tmp_path)
    assert class_names(model) == ['ash', 'elm']
    for pretrained in (True, False):
        other = timm_fisher.from_pretrained(tmp_path, num_classes=3, pretrained=pretrained)
        assert len(class_names(other)) == 3
    names = {'label_names': ['a', 'b', 'c']}
    other = timm_fisher.from_pretrained(tmp_path, num_classes=3, pretrained_cfg_overlay=names)
    assert class_names(other) == ['a', 'b', 'c']
    model.reset_classifier(2)
    assert 'ash' not in class_names(model)
    timm_fisher.save_model(model, tmp_path / 'again')
    assert 'ash' not in (tmp_path / 'again/config.json').read_text()


def test_without_any_parameter():
    """A classifier can be added, and a fit has nothing to do."""
    model = timm_fisher.create_model('pixels', 'avg', num_classes=0, img_size=8)
    loader = DataLoader(TensorDataset(torch.rand(4, *model.pretrained_cfg['input_size'])), 2)
    assert timm_fisher.fit(model, loader) == 0
    model.reset_classifier(3)
    assert model(next(iter(loader))[0]).shape == (2, 3)


def test_flag_that_is_a_text():
    with pytest.raises(TypeError, match="takes pre_norm=True or pre_norm=False, not 'false'"):
        timm_fisher.create_model('test_resnet', pre_norm='false')


def test_reset_classifier_refuses_another_pool():
    model = create()
    with pytest.raises(ValueError, match="global_pool='avg' cannot be set"):
        model.reset_classifier(7, global_pool='avg')
    assert model.num_classes == model.classifier.out_features == 5


# Training


@pytest.mark.parametrize('backbone', ['test_resnet', 'test_vit', 'test_vit3'])
def test_gradient_checkpointing_changes_no_gradient(backbone):
    def gradients(model):
        model.zero_grad()
        model(images()).square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model = create(backbone, img_size=64).train()
    expected = gradients(model)
    model.set_grad_checkpointing()
    assert model.backbone.grad_checkpointing
    torch.testing.assert_close(gradients(model), expected)
    model.set_grad_checkpointing(False)
    assert not model.backbone.grad_checkpointing


def test_no_weight_decay_names_parameters():
    model = create('test_vit')
    spared = {'backbone.cls_token', 'backbone.pos_embed'}
    assert model.no_weight_decay() & names(model) == spared
    groups = create_optimizer_v2(model, 'adamw', weight_decay=0.1).param_groups
    decay = {parameter: group['weight_decay'] for group in groups for parameter in group['params']}
    parameters = dict(model.named_parameters())
    assert {decay[parameters[name]] for name in spared} == {0}
    assert decay[parameters['backbone.blocks.0.attn.qkv.weight']] == 0.1


def test_no_weight_decay_of_heads():
    several = [{'name': 'avg'}, {'name': 'gmm_fisher', 'components': 3}]
    for head, prefix in (('gmm_fisher', 'head.'), (several, 'head.1.')):
        model = create(head=head)
        spared = {f'{prefix}means', f'{prefix}log_stds'}
        assert model.no_weight_decay() == spared
        groups = create_optimizer_v2(model, 'adamw', weight_decay=0.1).param_groups
        decay = {p: group['weight_decay'] for group in groups for p in group['params']}
        assert {decay[model.get_parameter(name)] for name in spared} == {0}
        assert decay[model.get_parameter(f'{prefix}reduce.weight')] == 0.1


@pytest.mark.parametrize('backbone', BACKBONES)
def test_layer_decay_has_head_and_classifier_last(backbone):
    model = create(backbone, head='sparse_fisher', code_dim=4)
    groups = create_optimizer_v2(model, 'adamw', layer_decay=0.7).param_groups
    scale = {parameter: group['lr_scale'] for group in groups for parameter in group['params']}
    assert set(scale) == set(model.parameters())
    assert {scale[parameter] for parameter in model.classifier.parameters()} == {1}
    assert {scale[parameter] for parameter in model.head.parameters()} == {1}
    of_backbone = {scale[parameter] for parameter in model.backbone.parameters()}
    assert max(of_backbone) == pytest.approx(0.7)
    assert scale[model.get_submodule(model.pretrained_cfg['first_conv']).weight] == min(of_backbone)
    assert len(of_backbone) > 2


@pytest.mark.parametrize('backbone', ['test_resnet', 'test_vit', 'test_vit3'])
@pytest.mark.parametrize('img_size', [96, (96, 64)])
def test_img_size(backbone, img_size):
    """Whether the backbone fixes its input size or not."""
    model = create(backbone, img_size=img_size)
    height, width = (96, 96) if img_size == 96 else img_size
    assert resolve_input_data_config(model)['input_size'] == (3, height, width)
    assert model(torch.randn(2, 3, height, width)).shape == (2, 5)


def test_img_size_replaces_the_recommended_test_size():
    def test_size(**arguments):
        with torch.device('meta'):
            model = PooledModel('resnet50', num_classes=5, **arguments)
        return resolve_input_data_config(model, use_test_size=True)['input_size'][1:]

    assert test_size() == (288, 288)
    assert test_size(img_size=448) == (448, 448)


def test_frozen_backbone_stays_in_eval_mode():
    model = create(head='sparse_fisher', drop_rate=0.5).train()
    model.freeze_backbone()
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    model(images())
    assert model.training
    assert model.head.training
    assert model.head_drop.training
    assert not any(module.training for module in model.backbone.modules())
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name

    model.freeze_backbone(False)
    model(images())
    assert model.backbone.training
    assert not torch.equal(model.backbone.bn1.running_mean, before['bn1.running_mean'])


def test_thawed_backbone_keeps_its_dead_parameters_frozen():
    with torch.device('meta'):
        model = PooledModel('crossvit_9_240', num_classes=2)
    expected = {name for name, p in model.named_parameters() if p.requires_grad}
    model.freeze_backbone().freeze_backbone(False)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    assert len(expected) < len(list(model.parameters()))


def test_partly_frozen_backbone_trains():
    model = create()
    model.backbone.conv1.requires_grad_(False)
    assert model.train().backbone.training


def test_project_reaches_the_head():
    model = create(head='sparse_fisher')
    model.head.dictionary.data.mul_(10)
    model.project_()
    assert model.head.dictionary.norm(dim=0).max() <= 1 + 1e-6


@pytest.mark.parametrize('arguments', [{}, {'num_classes': 2}, {'in_chans': 1}])
def test_steps_of_timm_validate(tmp_path, arguments):
    """What timm's validate.py does with `--model local-dir:FOLDER`."""
    model = create(head='sparse_fisher', code_dim=4)
    data = {'mean': (0.1, 0.2, 0.3), 'crop_pct': 0.5, 'input_size': (3, 96, 96)}
    timm_fisher.save_model(model, tmp_path, data_config=data)

    script = {'img_size': None, 'input_size': None, 'in_chans': arguments.get('in_chans')}
    requested = {'num_classes': arguments.get('num_classes'), 'global_pool': None}
    resolved = resolve_model_input_args(
        f'local-dir:{tmp_path}', script, pretrained=True, scriptable=False, **requested
    )
    loaded = timm.create_model(**resolved).eval()
    config = resolve_input_data_config(loaded, script, use_test_size=True)
    pixels = np.random.default_rng(0).integers(0, 256, (100, 120, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert('L' if arguments.get('in_chans') == 1 else 'RGB')
    x = create_transform(**config)(image)[None]
    assert x.shape == (1, *config['input_size']) == (1, arguments.get('in_chans', 3), 96, 96)
    assert config['crop_pct'] == 0.5
    logits = loaded(x)
    assert logits.shape == (1, arguments.get('num_classes', 5))
    if not arguments:
        assert tuple(config['mean']) == data['mean']
        assert torch.equal(logits, model(x))


@pytest.mark.parametrize(
    ('result', 'error'),
    [
        (lambda x: x, r"Head 'gem' of the distribution .* returns a tensor \[2, 100, 96\], not a"),
        (lambda x: x.mean(), r"Head 'gem' .* returns a tensor \[\], not a tensor \[2, 96\]"),
        (lambda x: (x.mean(1),), r"Head 'gem' .* returns a tuple, not a tensor \[2, 96\]"),
    ],
)
def test_a_head_that_returns_something_else(monkeypatch, result, error):
    """It is named, with its distribution, when the model is built."""
    monkeypatch.setattr('timm_fisher.heads.gem.GeM.forward', lambda self, x: result(x))
    with pytest.raises((TypeError, ValueError), match=error):
        create(head='gem')


def test_pre_norm(tmp_path):
    """Batch norm without weights between head and classifier, kept in saved models."""
    model, x = create(pre_norm=True, num_classes=3), images()
    assert not list(model.pre_norm.parameters())
    pooled = model.train().pool(model.forward_features(x))
    expected = torch.nn.functional.batch_norm(pooled, None, None, training=True, eps=1e-6)
    torch.testing.assert_close(model(x), model.classifier(expected))
    mean = model.pre_norm.running_mean.clone()
    one = model.pre_norm(pooled[:1])  # one image has no spread
    assert torch.equal(one, model.eval().pre_norm(pooled[:1]))
    assert torch.equal(model.pre_norm.running_mean, mean)
    timm_fisher.save_model(model, tmp_path / 'saved')
    again = timm.create_model(f'local-dir:{tmp_path}/saved', pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    assert torch.equal(
        model.classifier(model.forward_head(model.forward_features(x), True)), model(x)
    )
