"""Loading a saved model by plain `timm.create_model`: what comes back, and what is refused."""

import os
import re
import shutil
from functools import partial

import pytest
import timm
import torch
from conftest import ROOT
from distributed_checks import SMALL
from safetensors.torch import load_file, save_file
from small_models import backbone_of, images

import timm_fisher

SAVE = {
    'timm': partial(timm.models.save_for_hf, safe_serialization=True),
    'timm_fisher': timm_fisher.save_model,
}
FILES = ['config.json', 'model.safetensors']
WEIGHTS = 'model.safetensors'


def create(head='sparse_fisher', **arguments):
    """A model with every weight moved from where it starts, so that loading must restore all."""
    arguments = {'num_classes': 5} | arguments
    model = timm_fisher.create_model(backbone_of(head), head=head, **arguments).eval()
    for value in model.state_dict(keep_vars=True).values():
        if value.is_floating_point():
            value.data.mul_(1 + 0.1 * torch.rand_like(value))
    return model


def load(folder, **arguments):
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **arguments).eval()


def pooled(model, x):
    return model.forward_head(model.forward_features(x), pre_logits=True)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# What comes back


@pytest.mark.parametrize(
    ('head', 'save'),
    [('sparse_fisher', 'timm'), *((head, 'timm_fisher') for head in timm_fisher.list_heads())],
)
def test_every_head_comes_back(tmp_path, head, save):
    size = 160 if backbone_of(head) == 'test_vit' else 64
    model, x = create(head, **SMALL.get(head, {})), images(size=size)
    SAVE[save](model, tmp_path)
    assert files(tmp_path) == FILES
    loaded = load(tmp_path)
    assert torch.equal(loaded(x), model(x))
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)

    loaded = load(tmp_path, num_classes=7)
    assert torch.equal(pooled(loaded, x), pooled(model, x))
    assert loaded(x).shape == (2, 7)


@pytest.mark.parametrize('save', SAVE)
@pytest.mark.parametrize(
    'arguments',
    [
        {'code_dim': 3, 'iterations': 4, 'reduce_dim': None},
        {'stage': -2},
        {'in_chans': 1},
        {'num_classes': 0},
        {'backbone_kwargs': {'output_stride': 16}},
    ],
    ids=str,
)
def test_arguments_come_back(tmp_path, arguments, save):
    model, x = create(**arguments), images(arguments.get('in_chans', 3))
    SAVE[save](model, tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(loaded(x), model(x))
    assert repr(loaded) == repr(model)


@pytest.mark.parametrize(('before', 'after'), [(5, 0), (0, 5)])
def test_classifier_comes_and_goes(tmp_path, before, after):
    model, x = create(num_classes=before), images()
    timm_fisher.save_model(model, tmp_path)
    loaded = load(tmp_path, num_classes=after)
    assert torch.equal(pooled(loaded, x), pooled(model, x))
    assert loaded(x).shape == (2, after or model.head_hidden_size)


def test_colour_model_for_grey_images(tmp_path):
    """timm adds up the stem's channels: a grey image counts as three equal channels."""
    model, x = create(), images(channels=1)
    timm_fisher.save_model(model, tmp_path)
    loaded = load(tmp_path, in_chans=1)
    assert loaded.in_chans == 1
    torch.testing.assert_close(loaded(x), model(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_grey_model_of_a_deep_stem(tmp_path):
    """Its stem has sixteen channels for each of the image's."""
    model = timm_fisher.create_model('tresnet_m', 'avg', num_classes=3).eval()
    timm_fisher.save_model(model, tmp_path)
    x = images(channels=1)
    expected = model(x.expand(-1, 3, -1, -1))
    torch.testing.assert_close(load(tmp_path, in_chans=1)(x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(('saved', 'wanted'), [(3, 6), (1, 1), (4, 4)])
def test_other_channels(tmp_path, saved, wanted):
    timm_fisher.save_model(create(in_chans=saved), tmp_path)
    assert load(tmp_path, in_chans=wanted)(images(wanted)).shape == (2, 5)


@pytest.mark.parametrize(('saved', 'wanted'), [(1, 3), (4, 1), (4, 3), (6, 3), (6, 1)])
def test_channels_that_cannot_be_adapted(tmp_path, saved, wanted):
    timm_fisher.save_model(create(in_chans=saved), tmp_path)
    error = f'cannot be adapted to images of {wanted} channels'
    with pytest.raises(timm_fisher.LoadError, match=error):
        load(tmp_path, in_chans=wanted)


def test_arguments_of_the_head_are_merged(tmp_path):
    model = create(code_dim=8, iterations=3, normalize=False)
    timm_fisher.save_model(model, tmp_path)
    x = images()
    assert torch.equal(load(tmp_path, head_kwargs={'code_dim': 8})(x), model(x))
    other = load(tmp_path, head_kwargs={'normalize': True})
    assert other.head.iterations == 3
    assert other.head.normalize
    assert torch.equal(load(tmp_path, last_stride=None, in_chans=None)(x), model(x))


def test_loaded_in_inference_mode(tmp_path):
    timm_fisher.save_model(create(), tmp_path)
    with torch.inference_mode():
        model = load(tmp_path)
    model(images()).sum().backward()


class Plain(timm_fisher.PoolingHead):
    """A head of somebody who does not know what a model keeps."""

    def __init__(self, in_features, *, kind='persistent'):
        super().__init__()
        self.in_features = self.out_features = in_features
        self.norm = torch.nn.BatchNorm1d(in_features).eval()
        if kind in ('persistent', 'other'):
            self.register_buffer('w', torch.arange(in_features), persistent=kind == 'persistent')
        elif kind == 'uint8':
            self.register_buffer('w', torch.arange(in_features).to(torch.uint8))
        else:
            self.w = torch.arange(in_features)
        self.seen = {}

    def forward(self, x):
        self.seen.setdefault('w', torch.ones(len(self.w), device=x.device))
        return x.mean(1) * self.w * self.seen['w']


@pytest.mark.parametrize('kind', ['persistent', 'uint8', 'other', 'attribute'])
def test_head_of_somebody_else(tmp_path, monkeypatch, kind):
    """What could not be loaded is not saved."""
    monkeypatch.setattr('timm_fisher.heads.gem.GeM', Plain)
    model, x = create('gem', kind=kind).eval(), images()
    assert not model.head.norm.training
    before = model(x)
    if kind in ('persistent', 'uint8'):
        timm_fisher.save_model(model, tmp_path)
        assert torch.equal(load(tmp_path)(x), before)
        return
    with pytest.raises(ValueError, match=r"cannot be saved: .*Plain has the tensor 'w', which is"):
        timm_fisher.save_model(model, tmp_path / 'new')
    assert not list((tmp_path / 'new').iterdir())


@pytest.mark.parametrize('save', SAVE)
def test_model_that_no_factory_made(tmp_path, save):
    model = timm_fisher.PooledModel('test_resnet', 'sparse_fisher', head_kwargs={'code_dim': 3})
    SAVE[save](model.eval(), tmp_path)
    x = images()
    assert torch.equal(load(tmp_path)(x), model(x))


@pytest.mark.parametrize('save', SAVE)
@pytest.mark.parametrize('backbone', ['test_vit3', 'test_vit', 'test_resnet'])
def test_another_input_size(tmp_path, save, backbone):
    """Position embeddings are resampled, as timm does for a model of its own."""
    model = timm_fisher.create_model(backbone, 'avg', num_classes=3).eval()
    SAVE[save](model, tmp_path / 'first')
    x = torch.randn(2, 3, 224, 224)
    larger = load(tmp_path / 'first', img_size=224)
    assert timm.data.resolve_model_data_config(larger)['input_size'] == (3, 224, 224)
    plain = timm.create_model(backbone, num_classes=0).eval()
    plain.load_state_dict(model.backbone.state_dict(), strict=False)  # it has its own pool
    if backbone == 'test_vit3':  # the others take any size
        with pytest.raises(AssertionError):
            model(x)
        plain.set_input_size(224)
    torch.testing.assert_close(larger.forward_features(x), plain.forward_features(x))

    SAVE[save](larger, tmp_path / 'second')
    again = load(tmp_path / 'second')
    assert torch.equal(again(x), larger(x))
    assert timm.data.resolve_model_data_config(again)['input_size'] == (3, 224, 224)
    assert torch.equal(load(tmp_path / 'second', img_size=224)(x), larger(x))


@pytest.mark.parametrize('save', [pytest.param('timm', marks=pytest.mark.slow), 'timm_fisher'])
@pytest.mark.parametrize('stage', [-1, pytest.param(-2, marks=pytest.mark.slow)])
def test_another_input_size_of_windows(tmp_path, save, stage):
    """A resize changes more than the size here; the stage that was taken out has none."""
    small = {'embed_dim': 16, 'depths': (1, 2, 1), 'num_heads': (1, 2, 4)}
    model = timm_fisher.create_model(
        'swin_tiny_patch4_window7_224', num_classes=3, stage=stage, backbone_kwargs=small
    )
    SAVE[save](model, tmp_path / 'first')
    larger = load(tmp_path / 'first', img_size=448)
    x = torch.randn(1, 3, 448, 448)
    SAVE[save](larger, tmp_path / 'second')
    again = load(tmp_path / 'second')
    assert again.backbone.layers[0].blocks[0].window_size == (14, 14)
    assert torch.equal(again(x), larger(x))
    assert load(tmp_path / 'second', img_size=224)(x[..., :224, :224]).shape == (1, 3)


@pytest.mark.parametrize('save', SAVE)
def test_backbone_that_was_saved_at_another_input_size(tmp_path, save):
    backbone = timm.create_model('test_vit3', img_size=96)
    timm.models.save_for_hf(backbone, tmp_path / 'backbone', safe_serialization=True)
    model = timm_fisher.create_model(f'local-dir:{tmp_path / "backbone"}', pretrained=True).eval()
    SAVE[save](model, tmp_path / 'model')
    shutil.rmtree(tmp_path / 'backbone')
    x = torch.randn(2, 3, 96, 96)
    assert torch.equal(load(tmp_path / 'model')(x), model(x))


def test_input_size_of_a_model_without_its_weights(tmp_path):
    timm_fisher.save_model(timm_fisher.create_model('test_vit3'), tmp_path)
    model = timm.create_model(f'local-dir:{tmp_path}', img_size=96)
    assert timm.data.resolve_model_data_config(model)['input_size'] == (3, 96, 96)
    model(torch.randn(2, 3, 96, 96))


@pytest.mark.parametrize('img_size', [pytest.param(224, marks=pytest.mark.slow), 256])
def test_another_input_size_that_the_weights_do_not_depend_on(tmp_path, img_size):
    """Xcit fixes its input size and cannot change it later."""
    model = timm_fisher.create_model('xcit_nano_12_p16_224', num_classes=3).eval()
    timm_fisher.save_model(model, tmp_path)
    loaded = load(tmp_path, img_size=img_size)
    x = torch.randn(1, 3, img_size, img_size)
    plain = timm.create_model('xcit_nano_12_p16_224', num_classes=0, img_size=img_size).eval()
    plain.load_state_dict(model.backbone.state_dict(), strict=False)
    torch.testing.assert_close(loaded.forward_features(x), plain.forward_features(x))
    assert timm.data.resolve_model_data_config(loaded)['input_size'] == x.shape[1:]


@pytest.mark.slow
def test_another_input_size_that_the_weights_depend_on(tmp_path):
    timm_fisher.save_model(timm_fisher.create_model('levit_128s', num_classes=3), tmp_path)
    load(tmp_path, img_size=224)
    with pytest.raises(RuntimeError, match=r'(?s)images \(3, 256, 256\).*attention_bias'):
        load(tmp_path, img_size=256)


def test_another_input_size_that_the_backbone_refuses():
    with torch.device('meta'):
        model = timm_fisher.PooledModel('levit_128s', num_classes=3)
    with pytest.raises(ValueError, match=r'built for images \(3, 224, 224\).*img_size=\(256, 256'):
        model.set_input_size(256)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_other_dtypes(tmp_path, dtype):
    model = create().to(dtype)
    timm_fisher.save_model(model, tmp_path)
    expected = {name: value.float() for name, value in model.state_dict().items()}
    state = {name: value.float() for name, value in load(tmp_path).state_dict().items()}
    torch.testing.assert_close(state, expected, rtol=0, atol=0)


def test_without_pretrained_only_the_architecture_comes_back(tmp_path):
    model = create(code_dim=3)
    timm_fisher.save_model(model, tmp_path)
    fresh = timm.create_model(f'local-dir:{tmp_path}')
    assert repr(fresh) == repr(model)
    assert not torch.equal(fresh.head.dictionary, model.head.dictionary)


# What is refused


@pytest.fixture(scope='module')
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp('original')
    timm_fisher.save_model(create(), folder)
    return folder


@pytest.fixture
def saved(original, tmp_path):
    """A saved model that a test may damage."""
    return shutil.copytree(original, tmp_path / 'saved')


def edit(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


@pytest.mark.parametrize('keep', [0.5, 0.01, 0.0])
def test_truncated_weights(saved, keep):
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[: int(keep * len(content))])
    with pytest.raises(RuntimeError, match=rf"'{re.escape(str(saved))}' are damaged or cut short"):
        load(saved)


@pytest.mark.parametrize('num_classes', [5, 7])
@pytest.mark.parametrize(
    ('change', 'error'),
    [
        (lambda w: w.pop('head.dictionary'), r'1 differences.*missing head\.dictionary \(96, 32\)'),
        (lambda w: w.pop('backbone.bn1.running_mean'), r'missing backbone\.bn1\.running_mean'),
        (lambda w: w.update({'head.x': torch.ones(2)}), r'1 diff.*unexpected head\.x \(2,\)'),
        (
            lambda w: w.update({'head.dictionary': torch.ones(3, 4)}),
            r'1 differences.*head\.dictionary is \(3, 4\), not \(96, 32\)',
        ),
        (
            lambda w: [w.pop(key) for key in list(w) if key.startswith('head.')],
            r'7 differences.*missing head\.',
        ),
        (lambda w: w.clear(), r'not of this model \(ResNet with SparseFisher'),
    ],
    ids=['missing', 'buffer', 'unexpected', 'shape', 'head', 'empty'],
)
def test_wrong_weights(saved, change, error, num_classes):
    """Also with another number of classes, where timm alone loads what it finds."""
    edit(saved, change)
    with pytest.raises(RuntimeError, match=f'(?s){error}'):
        load(saved, num_classes=num_classes)


@pytest.mark.parametrize(
    ('change', 'error'),
    [
        (lambda w: w.pop('classifier.bias'), r'missing classifier\.bias \(5,\)'),
        (
            lambda w: w.update({'classifier.weight': torch.ones(4, 3072)}),
            r'classifier\.weight is \(4, 3072\), not \(5, 3072\)',
        ),
    ],
    ids=['missing', 'shape'],
)
def test_wrong_classifier_is_refused(saved, change, error):
    """Also where it would be replaced: the weights must be exactly those of the model."""
    edit(saved, change)
    for num_classes in (5, 7):
        with pytest.raises(RuntimeError, match=error):
            load(saved, num_classes=num_classes)


@pytest.mark.parametrize('num_classes', [5, 7])
def test_weights_of_another_head(saved, tmp_path, num_classes):
    timm_fisher.save_model(create('avg'), tmp_path / 'avg')
    os.replace(tmp_path / 'avg' / WEIGHTS, saved / WEIGHTS)
    with pytest.raises(RuntimeError, match=r'missing head\.dictionary') as caught:
        load(saved, num_classes=num_classes)
    assert 'nothing was loaded' in str(caught.value)
    assert str(saved) in str(caught.value)


def test_weights_of_a_backbone_without_head(saved):
    save_file(timm.create_model('test_resnet').state_dict(), saved / WEIGHTS)
    with pytest.raises(RuntimeError, match=r'missing backbone\.conv1\.0\.weight'):
        load(saved)


@pytest.mark.parametrize('legacy', [True, False])
def test_only_safetensors_are_read(saved, legacy):
    (saved / WEIGHTS).unlink()
    if legacy:
        torch.save(create().state_dict(), saved / 'pytorch_model.bin')
    with pytest.raises(RuntimeError, match=r'holds no model\.safetensors.*save_pretrained'):
        load(saved)


def test_names_with_their_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    timm_fisher.save_model(create('avg'), 'runs/model')
    for name in ('runs/model', 'local-dir:runs/model', tmp_path / 'runs/model'):
        assert timm_fisher.from_pretrained(name).num_classes == 5
    with pytest.raises(ValueError, match=r"'runs/model/config\.json' is a file\. Give the folder"):
        timm_fisher.from_pretrained('runs/model/config.json')
    with pytest.raises(ValueError, match="'' is no released model"):
        timm_fisher.from_pretrained('')
    # What is said to be a folder is neither a released model nor a repository.
    timm_fisher.save_model(create('avg'), 'trashnet-fisher')
    assert timm_fisher.from_pretrained('local-dir:trashnet-fisher').num_classes == 5
    for name in ('runs/modle', 'trashnet-3g', ''):
        with pytest.raises(ValueError, match=f"There is no folder '{name}'"):
            timm_fisher.from_pretrained(f'local-dir:{name}')
    with pytest.raises(ValueError, match="is for the Hub, but 'runs/model' is a folder"):
        timm_fisher.from_pretrained('local-dir:runs/model', revision='main')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(timm_fisher.LoadError, match=r"There is no folder 'runs/modle' here\."):
        timm_fisher.from_pretrained('runs/modle')
    with pytest.raises(timm_fisher.LoadError) as caught:
        timm_fisher.from_pretrained('hf-hub:runs/model')
    assert 'no folder' not in str(caught.value)


@pytest.mark.parametrize('name', ['one_head', 'two_heads'])
def test_folder_that_version_0_1_0_saved(name):
    """One head, and two with the class token of a grey model: logits as that version gave them."""
    folder = ROOT / 'tests' / 'golden' / 'saved_0.1.0' / name
    expected = load_file(folder / 'logits.safetensors')['logits']
    for model in (load(folder), timm_fisher.from_pretrained(folder).eval()):
        size = timm.data.resolve_model_data_config(model)['input_size']
        x = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        assert model.pretrained_cfg['label_names'] == ['ash', 'beech', 'elm']
        state, stored = model.state_dict(), load_file(folder / WEIGHTS)
        assert state.keys() == stored.keys()
        assert all(torch.equal(state[key], stored[key]) for key in stored)
