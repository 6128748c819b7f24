"""Saved models made to cost time or memory, or to have other files read: refused soon, within a
gigabyte, nothing loaded."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from saved_models import (
    LOADERS,
    argument,
    copy,
    edit,
    edit_weights,
    measure_loading,
    set_at,
    without_backbone,
)  # fmt: skip

import timm_fisher
from timm_fisher import LoadError
from timm_fisher.backbone import digest

HALF_A_GIGABYTE, SECONDS = 500e6, 10


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def no_network(*_, **__):
        raise OSError('the network was touched')

    for place in ('timm_fisher.hub.weights', 'timm.models._hub'):
        monkeypatch.setattr(f'{place}.hf_hub_download', no_network)


# Time and memory


def many_empty_tensors(folder, number=200_000):
    """A header that claims as many tensors as a model of absurd size has."""
    header = {f'head.blocks.{i}.x': {'dtype': 'F32', 'shape': [0], 'data_offsets': [0, 0]}
              for i in range(number)}  # fmt: skip
    text = json.dumps(header).encode()
    (folder / 'model.safetensors').write_bytes(struct.pack('<Q', len(text)) + text)
    edit(
        folder,
        lambda config: config['model_args'].update(head='3g', head_kwargs={'blocks': 40_000}),
    )


def huge_header(folder):
    (folder / 'model.safetensors').write_bytes(struct.pack('<Q', 2**33) + b'{}' * 100)


def seven_billion(folder):
    """An adapter, right in itself, over a backbone that is nowhere to be found."""
    without_backbone(folder, hf_hub_id='timm/vit_7b_patch16_dinov3.lvd1689m', sha256='0' * 64)
    arguments = {'backbone': 'vit_7b_patch16_dinov3', 'head': 'avg', 'head_kwargs': {}}
    edit(folder, lambda config: config['model_args'].update(arguments))
    shapes = {'weight': (5, 4096), 'bias': (5,)}
    state = {f'classifier.{name}': torch.zeros(shape) for name, shape in shapes.items()}
    save_file(state, folder / 'model.safetensors')


def derived_tables(folder):
    """A file of weights that is right, and has none: all memory is for what is computed."""
    save_file({}, folder / 'model.safetensors')
    arguments = {
        'backbone': 'pixels', 'head': 'bilinear', 'num_classes': 0, 'in_chans': 1,
        'head_kwargs': {'reduce_dim': None, 'normalize': False}, 'img_size': [100, 140],
    }  # fmt: skip
    images = {'input_size': [1, 100, 140], 'mean': [0.0], 'std': [1.0]}
    config = {'architecture': 'timm_fisher', 'model_args': arguments, 'pretrained_cfg': images}
    (folder / 'config.json').write_text(json.dumps({**config, 'num_classes': 0}))


def of_arguments(**arguments):
    return lambda folder: edit(folder, lambda config: config['model_args'].update(arguments))


def of_images(size):
    def change(folder):
        edit(folder, set_at('pretrained_cfg', 'input_size', [3, size, size]))
        edit(folder, argument('img_size', size))

    return change


ATTACKS = {
    'empty tensors': (many_empty_tensors, 'blocks from 0 to'),
    'length of the header': (huge_header, 'header has 8589934592 bytes'),
    'backbone of seven billion': (seven_billion, 'cannot be loaded'),
    'head': (of_arguments(head_kwargs={'code_dim': 900_000}), '900000'),
    'head of another shape': (of_arguments(head_kwargs={'code_dim': 5000}), 'not of this model'),
    'heads': (
        of_arguments(head=[{'name': 'bilinear', 'reduce_dim': None}] * 8, head_kwargs=None),
        'not of this model',
    ),
    'backbone': (
        of_arguments(
            backbone='vit_tiny_patch16_224',
            backbone_kwargs={'embed_dim': 4096, 'depth': 64, 'num_heads': 64},
        ),
        'not of this model',
    ),
    'backbone of another kind': (of_arguments(backbone='vit_giant_patch14_224'), 'not of this mod'),
    'layers': (of_arguments(backbone_kwargs={'layers': [40] * 4}), 'not of this model'),
    'endless loop': (
        of_arguments(
            backbone='tiny_vit_5m_224', backbone_kwargs={'window_sizes': [60] * 4}
        ),
        "'window_sizes', which is not among",
    ),
    'derived tables': (derived_tables, 'tables computed from its arguments would take'),
    'windows': (
        of_arguments(backbone='swinv2_tiny_window8_256', img_size=2048,
                     backbone_kwargs={'window_size': 64}),
        'tables computed from its arguments would take',
    ),
    'blocks of heads': (
        of_arguments(head=[{'name': '3g', 'blocks': 16, 'reduce_dim': 4}] * 8, head_kwargs=None),
        'not of this model',
    ),
    'iterations of heads': (
        of_arguments(head=[{'name': 'gsnmf', 'updates': 1000}] * 8, head_kwargs=None),
        'not of this model',
    ),
    'images': (of_images(7000), 'images of 7000 pixels'),
    'images of a transformer': (
        lambda folder: [of_arguments(backbone='vit_base_patch16_224')(folder),
                        of_images(2048)(folder)],
        'not of this model',
    ),
}  # fmt: skip


WITHOUT_WEIGHTS = ('head', 'backbone', 'derived tables', 'endless loop', 'images')


def test_attacks_cost_little(originals, tmp_path):
    folders = []
    for name, (attack, _) in ATTACKS.items():
        folders.append(copy(originals / 'sparse_fisher', tmp_path / name))
        attack(folders[-1])
    costs = measure_loading('timm', originals / 'sparse_fisher', folders)
    for (name, (_, part)), (error, memory, seconds) in zip(ATTACKS.items(), costs, strict=True):
        assert any(each in error for each in part.split('|')), (name, error)
        assert memory < HALF_A_GIGABYTE, (name, memory)
        assert seconds < SECONDS, (name, seconds)


@pytest.mark.slow
@pytest.mark.parametrize('load', ['from_pretrained', 'without weights'])
def test_attacks_cost_little_however_loaded(originals, tmp_path, load):
    chosen = {
        name: attack for name, (attack, _) in ATTACKS.items()
        if load == 'from_pretrained' or name in WITHOUT_WEIGHTS
    }  # fmt: skip
    folders = []
    for name, attack in chosen.items():
        folders.append(copy(originals / 'sparse_fisher', tmp_path / name))
        attack(folders[-1])
    costs = measure_loading(load, originals / 'sparse_fisher', folders)
    for name, (error, memory, seconds) in zip(chosen, costs, strict=True):
        assert error, name
        assert memory < HALF_A_GIGABYTE, (name, memory)
        assert seconds < SECONDS, (name, seconds)


def test_size_of_what_weights_do_not_prove(saved):
    """The bound is for what a configuration asks for, not for the caller."""
    with torch.device('meta'):
        model = timm.create_model(f'local-dir:{saved}', num_classes=30_000_000)
    assert model.num_classes == 30_000_000


@pytest.mark.parametrize(
    'arguments',
    [
        {'num_classes': 1_000_000},
        {'backbone': 'test_vit', 'backbone_kwargs': {'embed_dim': 4096, 'num_heads': 64}},
        {'backbone': 'vit_giant_patch14_224', 'in_chans': 1024},
        {'backbone': 'gmlp_s16_224', 'img_size': 2048},
    ],
    ids=['classifier', 'backbone', 'channels', 'image'],
)
def test_size_that_no_weights_prove(saved, arguments):
    """Beside timm's architecture itself, of whatever size, little may be asked for."""

    def change(config):
        config.update(num_classes=arguments.get('num_classes', 5), label_names=None)
        config['model_args'].update(arguments)

    edit(saved, change)
    with pytest.raises(LoadError, match=r'without weights it asks for \d{9,} values beside'):
        LOADERS['without weights'](saved)


def test_size_of_the_architecture_itself_is_allowed(saved):
    """303 million values are what timm gives, and nothing that config.json asks for beside them."""
    arguments = {
        'backbone': 'vit_large_patch16_224', 'backbone_kwargs': {'dynamic_img_size': True},
        'head': 'avg', 'head_kwargs': {}, 'img_size': 224, 'in_chans': 3,
    }  # fmt: skip
    edit(saved, lambda config: config['model_args'].update(arguments))
    with torch.device('meta'):
        timm_fisher.from_pretrained(saved, pretrained=False)


def test_nothing_global_is_touched(saved):
    """No profiler, and no hooks that all modules share."""
    seen = []

    def profiler(*_):
        seen.append(sys.getprofile() is profiler)

    sys.setprofile(profiler)
    try:
        timm_fisher.from_pretrained(saved)
    finally:
        sys.setprofile(None)
    assert all(seen)
    from torch.nn.modules import module

    assert not module._global_module_registration_hooks
    assert not module._global_parameter_registration_hooks


# Weights


@pytest.mark.parametrize(
    ('name', 'change', 'error'),
    [
        ('head.dictionary', lambda x: x > 0, 'is of type BOOL, not torch.float32'),
        ('head.dictionary', lambda x: x.to(torch.int8), 'is of type I8'),
        ('head.dictionary', lambda x: x.to(torch.int64), 'is of type I64'),
        ('head.dictionary', lambda x: x.to(torch.complex64), 'is of type C64'),
        ('head.dictionary', lambda x: x.to(torch.float8_e4m3fn), 'is of type F8_E4M3'),
        ('head.dictionary', lambda x: x * float('nan'), 'holds NaN or infinite values'),
        ('head.dictionary', lambda x: x / 0, 'holds NaN or infinite values'),
        ('backbone.bn1.running_var', lambda x: x * float('nan'), 'holds NaN or infinite values'),
        ('classifier.bias', lambda x: x.half() * float('inf'), 'holds NaN or infinite values'),
        ('backbone.bn1.num_batches_tracked', lambda x: x.float(), 'is of type F32, not torch.int'),
    ],
)  # fmt: skip
def test_weights_of_another_kind(saved, name, change, error):
    edit_weights(saved, lambda weights: weights.update({name: change(weights[name])}))
    with pytest.raises(LoadError, match=f'{name} {error}'):
        LOADERS['timm'](saved)


def test_names_of_tensors_in_a_message(saved):
    odd = {f'\x1b[2J{i}' + 'x' * 100_000: torch.zeros(1) for i in range(25)}
    edit_weights(saved, lambda weights: weights.update(odd))
    with pytest.raises(LoadError, match=r'25 differences:\s+unexpected \\x1b') as caught:
        LOADERS['timm'](saved)
    assert len(str(caught.value)) < 3100
    assert '\x1b' not in str(caught.value)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), 'w')


def write_bomb(path, marker):
    path.write_bytes(pickle.dumps(Bomb(marker)))


@pytest.mark.parametrize('load', ['from_pretrained', 'timm'])
def test_other_places_of_weights_are_not_read(saved, tmp_path, load):
    marker, bomb = tmp_path / 'marker', tmp_path / 'bomb.bin'
    write_bomb(bomb, marker)
    write_bomb(saved / 'pytorch_model.bin', marker)
    elsewhere = {
        'url': bomb.as_uri(),
        'file': str(bomb),
        'hf_hub_id': 'evil/x',
        'hf_hub_filename': str(bomb),
        'source': 'url',
        'custom_load': True,
        'state_dict': {'classifier.bias': [1, 2, 3, 4, 5]},
        'label_offset': 1,
        'classifier': 'head',
        'first_conv': 'classifier',
    }
    edit(saved, lambda config: config['pretrained_cfg'].update(elsewhere))
    model = LOADERS[load](saved)
    for name, value in load_file(saved / 'model.safetensors').items():
        assert torch.equal(model.state_dict()[name], value), name
    cfg = model.pretrained_cfg
    assert (cfg['file'], cfg['source']) == (str(saved), 'local-dir')
    assert not {'url', 'hf_hub_id', 'hf_hub_filename', 'custom_load', 'state_dict'} & {
        key for key, value in cfg.items() if value
    }
    assert cfg['classifier'] == 'classifier'

    (saved / 'model.safetensors').unlink()
    with pytest.raises(LoadError, match=r'holds no model\.safetensors'):
        LOADERS[load](saved)
    assert not marker.exists()


def test_bomb_works(tmp_path):
    """The pickle of the tests above would be noticed."""
    write_bomb(tmp_path / 'bomb', tmp_path / 'marker')
    pickle.loads((tmp_path / 'bomb').read_bytes())
    assert (tmp_path / 'marker').exists()


def test_weights_are_copied(saved):
    """The file may be overwritten while the model lives."""
    model = timm_fisher.from_pretrained(saved)
    before = model.head.dictionary.clone()
    path = saved / 'model.safetensors'
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(model.head.dictionary, before)


# Adapters


@pytest.mark.parametrize(
    ('repo_id', 'error'),
    [
        (None, 'does not say which backbone'),
        ('timm/test_resnet.r160_in1k', 'the network was touched'),
        ('evil/test_resnet.mine', 'the network was touched'),
        ('../x', 'the network was touched|repo_id'),
        ('a@b@c', 'cannot be loaded'),
        ('x' * 190, 'the network was touched'),
        ('x' * 900, 'backbone_weights is .* not a table of hf_hub'),
    ],
)
def test_adapter_of_anything(saved, repo_id, error):
    """Only repositories of the Hub are asked."""
    without_backbone(saved, hf_hub_id=repo_id, sha256='0' * 64)
    with pytest.raises(LoadError, match=error):
        LOADERS['timm'](saved)


def backbone_folder(folder, **arguments):
    timm.models.save_for_hf(
        timm.create_model('test_resnet', **arguments), folder, safe_serialization=True
    )
    return f'local-dir:{folder}'


def test_backbone_of_an_adapter(saved, tmp_path):
    """It is taken if it has the right tensors and digest, or if the caller takes any."""
    source = backbone_folder(tmp_path / 'backbone', num_classes=10)  # with timm's own classifier
    weights = load_file(tmp_path / 'backbone' / 'model.safetensors')
    kept = {
        key.removeprefix('backbone.') for key in load_file(saved / 'model.safetensors')
        if key.startswith('backbone.')
    }  # fmt: skip
    right = digest({key: weights[key] for key in kept})
    without_backbone(saved, hf_hub_id='evil/x', sha256='0' * 64)
    with pytest.raises(LoadError, match=r'digest .* are not those that .* was trained with'):
        timm_fisher.from_pretrained(saved, backbone=source)
    timm_fisher.from_pretrained(saved, backbone=source, any_backbone=True)
    edit(saved, argument('backbone_weights', {'hf_hub_id': 'evil/x', 'sha256': right}))
    for model in (
        timm_fisher.from_pretrained(saved, backbone=source),
        timm.create_model(f'local-dir:{saved}', pretrained=True, backbone=source),
    ):
        state = model.backbone.state_dict()
        assert state.keys() == kept
        assert all(torch.equal(state[key], weights[key]) for key in kept)

    grey = timm_fisher.from_pretrained(saved, backbone=source, in_chans=1)
    assert grey.backbone.conv1[0].weight.shape[1] == 1

    edit_weights(tmp_path / 'backbone', lambda w: w.pop('bn1.weight'))
    with pytest.raises(LoadError, match=r'missing backbone\.bn1\.weight'):
        timm_fisher.from_pretrained(saved, backbone=source)


def test_backbone_of_a_whole_model(saved):
    with pytest.raises(LoadError, match=r"holds its backbone; backbone='local-dir:x' is for"):
        timm_fisher.from_pretrained(saved, backbone='local-dir:x')


def test_digest_tells_types_apart():
    zeros = torch.zeros(2)
    assert zeros.numpy().tobytes() == zeros.int().numpy().tobytes()
    assert digest({'a': zeros}) != digest({'a': zeros.int()})


def test_weights_that_are_none(saved):
    save_file({}, saved / 'model.safetensors')
    with pytest.raises(LoadError, match='not of this model'):
        LOADERS['timm'](saved)
    shutil.copy(saved / 'config.json', saved / 'model.safetensors')
    with pytest.raises(LoadError, match=r'damaged or cut short|header has'):
        LOADERS['timm'](saved)
