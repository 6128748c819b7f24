"""Configurations that no `save_pretrained` wrote: they are refused before anything is built, and
whatever stands in config.json, loading gives a model or a `LoadError`."""

import copy
import inspect
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import timm_fisher
from timm_fisher import LoadError, checkpoint, saved_config

HEADS = {
    'sparse_fisher': {'code_dim': 3},
    '3g': {'reduce_dim': 8, 'blocks': 1},
    'gsnmf': {'components': 4},
    'dbm_idfk': {'hidden': [3, 2], 'rank': 4},
}
LOADERS = {
    'from_pretrained': timm_fisher.from_pretrained,
    'timm': lambda folder: timm.create_model(f'local-dir:{folder}', pretrained=True),
    'without weights': lambda folder: timm.create_model(f'local-dir:{folder}'),
}
GIGABYTE = 10**9


def no_network(*_, **__):
    raise OSError('the network was touched')


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for place in ('timm_fisher.hub.weights', 'timm.models._hub'):
        monkeypatch.setattr(f'{place}.hf_hub_download', no_network)
    monkeypatch.setattr('timm.models._builder.load_state_dict_from_url', no_network)
    monkeypatch.setattr('timm.models._builder.download_cached_file', no_network)


@pytest.fixture(scope='module')
def originals(tmp_path_factory):
    """A saved model of each head."""
    folder = tmp_path_factory.mktemp('originals')
    for head, arguments in HEADS.items():
        model = timm_fisher.create_model('test_resnet', head=head, num_classes=5, **arguments)
        timm_fisher.save_model(model, folder / head, label_names=list('abcde'))
    return folder


@pytest.fixture
def saved(originals, tmp_path):
    """A saved model that a test may damage."""
    return shutil.copytree(originals / 'sparse_fisher', tmp_path / 'saved')


def edit(folder, change):
    config = json.loads((folder / 'config.json').read_text())
    change(config)
    (folder / 'config.json').write_text(json.dumps(config))


def set_at(*path_and_value):
    """A change of a config: `set_at('model_args', 'head', 'x')`."""
    *path, last, value = path_and_value

    def change(config):
        for key in path:
            config = config[key]
        config[last] = value

    return change


def peak():
    """Most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), 'w')


def write_bomb(path, marker):
    path.write_bytes(pickle.dumps(Bomb(marker)))


# Arguments that are refused


def argument(name, value):
    return set_at('model_args', name, value)


def several(heads, **others):
    """A change of a config to several heads."""
    return lambda config: config['model_args'].update(head=heads, head_kwargs=None, **others)


ATTACKS = {
    'unknown head': (argument('head', 'nonsense'), "Unknown head 'nonsense'"),
    'head by path': (argument('head', 'os:system'), "Unknown head 'os:system'"),
    'head by module': (argument('head', 'module.Class'), "Unknown head 'module.Class'"),
    'head as dict': (argument('head', {'name': 'os:system'}), 'head'),
    'one of several heads': (several([{'name': 'os:system'}]), "head 'os:system'"),
    'many heads': (several([{'name': 'avg'}] * 65), 'there are 65 heads; at most 64'),
    'no heads': (several([]), 'empty list'),
    'argument of head': (argument('head_kwargs', {'code': 3}), "no argument 'code'.*'code_dim'"),
    'argument of model': (argument('any_backbone', True), 'model_args holds any_backbone'),
    'backbone of a folder': (argument('backbone', 'local-dir:../x'), "not one of timm's arch"),
    'backbone of the Hub': (argument('backbone', 'hf-hub:evil/x'), "not one of timm's arch"),
    'hidden source': (argument('backbone', 'resnet18.hf-hub:evil/x'), 'resnet18.hf-hub'),
    'backbone of ours': (argument('backbone', 'timm_fisher'), "Unknown backbone 'timm_fisher'"),
    'backbone is a preset': (argument('backbone', 'resnet50_3g'), "Unknown backbone 'resnet50_3g'"),
    'backbone is a number': (argument('backbone', 7), "backbone is '7'"),
    'no backbone': (lambda config: config['model_args'].pop('backbone'), "backbone is 'None'"),
    'many classes': (
        lambda config: [
            config.update(num_classes=10**7),
            config['model_args'].update(num_classes=10**7),
        ],
        'num_classes is 10000000; at most 1000000',
    ),
    'classes that disagree': (argument('num_classes', 900_000), 'num_classes is 5, but 900000'),
    'large code': (argument('head_kwargs', {'code_dim': 10**7}), 'code_dim is 10000000'),
    'large layer': (
        lambda config: config['model_args'].update(
            head='dbm_idfk', head_kwargs={'hidden': [10**7]}
        ),
        'hidden is 10000000',
    ),
    'sum of numbers': (argument('head_kwargs', {'hidden': [10**6] * 5}), 'more than 1000000 tog'),
    'number in backbone': (argument('backbone_kwargs', {'width': 2049}), 'width is 2049'),
    'large image': (argument('img_size', [10, 9000]), 'img_size is 9000; at most 8192'),
    'NaN': (argument('drop_rate', float('nan')), 'drop_rate is nan'),
    'infinity': (argument('head_kwargs', {'sparsity': float('inf')}), 'sparsity is inf'),
    'many values': (argument('head_kwargs', {'x': [0] * 10_000}), 'more than 10000 values'),
    'long text': (argument('head', 'x' * 5_000_000), 'more than 1000 characters'),
    'malformed backbone_weights': (argument('backbone_weights', {'sha256': 'x'}), 'backbone_wei'),
    'backbone_weights is a list': (argument('backbone_weights', ['x']), 'backbone_weights'),
    'backbone_kwargs is a list': (argument('backbone_kwargs', [1]), 'No model can be built'),
    'head_kwargs is a text': (argument('head_kwargs', 'abc'), 'No model can be built'),
    'code_dim is a text': (argument('head_kwargs', {'code_dim': '1'}), 'No model can be built'),
    'label_names is a text': (set_at('label_names', 'abcde'), 'label_names is abcde, not a list'),
    'label_names of numbers': (set_at('label_names', [1, 2, 3, 4, 5]), 'not a list of texts'),
    'classes are a text': (set_at('num_classes', 'many'), "num_classes is many, but 5"),
    'classes are a fraction': (set_at('num_classes', 5.0), 'num_classes is 5.0'),
    'unknown field': (set_at('pretrained_cfg', 'x', 1), 'unexpected keyword'),
    'names of other classes': (set_at('label_names', ['a'] * 4), '4 label_names for 5 classes'),
    'crop': (set_at('pretrained_cfg', 'crop_pct', 0.005), 'crop_pct is 0.005, not a number from'),
    'size of images': (set_at('pretrained_cfg', 'input_size', [3, 160]), 'input_size is'),
    'size of tests': (set_at('pretrained_cfg', 'test_input_size', 'x'), 'test_input_size is'),
    **{
        f'backbone_kwargs: {name}': (
            argument('backbone_kwargs', {name: value}),
            f'backbone_kwargs holds {name}, which only a caller may give',
        )
        for name, value in {
            'checkpoint_path': 'x.pth',
            'pretrained': True,
            'pretrained_cfg': {'file': 'x.pth'},
            'pretrained_cfg_overlay': {'file': 'x.pth'},
            'cache_dir': 'x',
            'device': 'cpu',
            'features_only': True,
            'pretrained_filter_fn': 'x',
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize('attack', ATTACKS)
def test_refused_arguments(saved, attack):
    change, error = ATTACKS[attack]
    edit(saved, change)
    for load in LOADERS.values():
        with pytest.raises(LoadError, match=f'(?s){error}'):
            load(saved)


IMAGES = {'num_classes': 5, 'input_size': [3, 64, 64], 'source': 'local-dir', 'file': 'x'}
REFUSED_IMAGES = [
    ({'crop_pct': 0}, r'crop_pct is 0, not a number from 0\.1 to 2\.0'),
    ({'crop_pct': -1}, 'crop_pct is -1'),
    ({'crop_pct': 0.005}, 'crop_pct is 0.005'),
    ({'crop_pct': 2.5}, 'crop_pct is 2.5'),
    ({'crop_pct': 10**4000}, 'crop_pct is 1000'),
    ({'crop_pct': '1'}, 'crop_pct is 1, not a number'),
    ({'test_crop_pct': 0.01}, 'test_crop_pct is 0.01'),
    ({'crop_pct': 0.1, 'input_size': [3, 64, 900]}, r'resized to 900 / 0\.1 pixels; at most 8192'),
    ({'crop_pct': 0.1, 'test_input_size': [3, 900, 64]}, r'resized to 900 / 0\.1 pixels'),
    ({'test_crop_pct': 0.1, 'input_size': [3, 900, 64]}, r'resized to 900 / 0\.1 pixels'),
    ({'interpolation': 'best'}, 'interpolation is best, not one of nearest, bilinear'),
    ({'interpolation': ['bicubic']}, 'interpolation is .*bicubic'),
    ({'crop_mode': 'middle'}, 'crop_mode is middle, not one of center, squash, border'),
    ({'std': [0.2, 0, 0.2]}, r'std is \[0\.2, 0, 0\.2\], not a list of numbers from 1e-6 to 1000'),
    ({'std': [-0.2] * 3}, 'std is'),
    ({'std': [1e-300] * 3}, 'std is'),
    ({'std': [float('inf')] * 3}, 'std is'),
    ({'std': [10**4000] * 3}, 'std is'),
    ({'mean': [float('nan')] * 3}, 'mean is .*nan.*, not a list of numbers up to 1000'),
    ({'mean': [1e300] * 3}, 'mean is'),
    ({'mean': 0.5}, 'mean is 0.5, not a list'),
    ({'mean': []}, 'mean has 0 values for 3 channels'),
    ({'mean': [0.5] * 2}, 'mean has 2 values for 3 channels'),
    ({'std': [0.5] * 4}, 'std has 4 values for 3 channels'),
    ({'label_names': ['a'] * 4}, 'there are 4 label_names for 5 classes'),
    ({'label_names': []}, 'there are 0 label_names for 5 classes'),
    ({'num_classes': 0, 'label_names': ['a']}, 'there are 1 label_names for 0 classes'),
]  # fmt: skip


@pytest.mark.parametrize(('changes', 'error'), REFUSED_IMAGES)
def test_images_that_are_refused(changes, error):
    """They would fill the memory, or fail, with the first image."""
    cfg = {**IMAGES, **changes}
    with pytest.raises(LoadError, match=rf"config\.json of 'x' is refused: .*{error}"):
        saved_config.check_images(cfg, {'num_classes': cfg['num_classes']}, 'x')


@pytest.mark.parametrize(
    'changes',
    [
        *({'crop_pct': crop, 'test_crop_pct': crop} for crop in (0.1, 1, 1.15, 2, None)),
        {'crop_pct': 0.1, 'input_size': [3, 400, 64]},
        *({'interpolation': name} for name in saved_config.INTERPOLATIONS),
        *({'crop_mode': name} for name in saved_config.CROP_MODES),
        {'mean': [0.5], 'std': [0.2]},
        {'mean': None, 'std': None, 'interpolation': None, 'crop_mode': None},
        {'mean': [0.5] * 3, 'std': [1 / 255] * 3},
    ],
)
def test_images_that_are_taken(changes):
    """timm makes a transform of them."""
    cfg = {**IMAGES, 'label_names': list('abcde'), **changes}
    assert saved_config.check_images(cfg, {'num_classes': 5}, 'x') == cfg
    given = timm.data.resolve_data_config(pretrained_cfg=cfg)
    image = timm.data.create_transform(**given)(Image.new('RGB', (40, 30)))
    assert image.shape == tuple(cfg['input_size'])


def test_images_of_timm_are_taken():
    """Of all its pretrained models, and of channels and classes that are ours to choose."""
    for name in timm.list_pretrained():
        cfg = timm.get_pretrained_cfg(name).to_dict() | {'label_names': None}
        classes = {'num_classes': cfg['num_classes']}
        saved_config.check_images({**cfg, 'source': 'local-dir'}, classes, name)
    grey = {**IMAGES, 'input_size': [4, 64, 64], 'mean': [0.5] * 4, 'std': [0.5] * 3}
    saved_config.check_images({**grey, 'num_classes': 0}, {'num_classes': 0}, 'x')


# Arguments of heads


def numbers_of_heads():
    """Every whole number that is an argument of an installed head."""
    for head in timm_fisher.list_heads():
        for name, argument in inspect.signature(timm_fisher.get_head(head)).parameters.items():
            if type(argument.default) is int:
                yield pytest.param(head, name, argument.default, id=f'{head} {name}')


@pytest.mark.parametrize(('head', 'name', 'default'), list(numbers_of_heads()))
def test_no_number_stalls_a_head(head, name, default):
    """A head with the largest number that a configuration may hold is refused, or quick."""

    def create(value):
        arguments = {'backbone': 'test_resnet', 'head': head, 'head_kwargs': {name: value}}
        saved_config.check_config(arguments, arguments, 'x')
        with saved_config.bounded(saved_config.UNPROVEN):
            timm_fisher.create_head(head, 96, **{name: value})
        return timm_fisher.create_head(head, 96, **{name: value}).eval()

    create(default)
    refused = ''
    try:
        model = create(900_000)
    except (LoadError, ValueError) as error:
        refused = str(error)
    if refused:
        assert re.search('at most 1000 is possible|would be (built|filled)', refused)
        return
    start = time.thread_time()
    with torch.no_grad():
        model(torch.rand(1, 25, 96))
    assert time.thread_time() - start < 3


ITERATIONS = [('isqrt_cov', 'iterations'), ('gsnmf', 'updates'), ('dbm_idfk', 'mean_field_steps')]


@pytest.mark.parametrize(('head', 'name'), ITERATIONS)
def test_iterations_of_a_head(head, name):
    for value in (1, 1000):
        arguments = {'backbone': 'test_resnet', 'head': head, 'head_kwargs': {name: value}}
        saved_config.check_config(arguments, arguments, 'x')
    for value in (1001, 1e5, float('nan')):
        single = {'backbone': 'test_resnet', 'head': head, 'head_kwargs': {name: value}}
        several = {'backbone': 'test_resnet', 'head': [{'name': head, name: value}]}
        for arguments in (single, several):
            with pytest.raises(LoadError, match=f'{name} is {value}; at most 1000 is possible'):
                saved_config.check_config(arguments, arguments, 'x')


# What timm itself reads, before it comes to us.
UNREADABLE = {
    'not JSON': '{',
    'not UTF-8': b'\xff\xfe',
    'empty': '',
    'a list': '[]',
    'a number': '7',
    'nested': '[' * 100_000 + ']' * 100_000,
    'nested dicts': '{"a":' * 100_000 + '1' + '}' * 100_000,
    'long number': '{"num_classes": ' + '9' * 10_000 + '}',
    'no fields': '{}',
    'model_args is a list': '{"architecture": "timm_fisher", "model_args": []}',
    'model_args is a text': '{"architecture": "timm_fisher", "model_args": "x"}',
    'no model_args': '{"architecture": "timm_fisher", "pretrained_cfg": {}}',
    'pretrained_cfg is a list': '{"architecture": "timm_fisher", "pretrained_cfg": []}',
    'architecture is a number': '{"architecture": 7, "pretrained_cfg": {}}',
    'architecture is null': '{"architecture": null, "pretrained_cfg": {}}',
}


@pytest.mark.parametrize('content', UNREADABLE)
def test_unreadable_config(saved, content):
    text = UNREADABLE[content]
    (saved / 'config.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(LoadError, match=r'config\.json'):
        timm_fisher.from_pretrained(saved)


@pytest.mark.parametrize('name', ['pretrained', 'pretrained_cfg', 'cache_dir', 'checkpoint_path'])
def test_arguments_of_the_factory(saved, name):
    edit(saved, argument(name, str(saved / 'x.pth')))
    with pytest.raises(LoadError):
        timm_fisher.from_pretrained(saved)


@pytest.mark.parametrize(
    ('content', 'error'),
    [
        ('[]', "architecture in its config.json is 'None'"),
        ('{"architecture": "vit_giant_patch14_224"}', "is 'vit_giant_patch14_224'"),
        ('{"architecture": "resnet50_3g"}', "is 'resnet50_3g'"),
        ('[' * 100_000, 'is not readable JSON'),
        (' ' * saved_config.MOST_BYTES + '{}', r'8388610 bytes; at most 8388608'),
    ],
    ids=['list', 'timm', 'preset', 'nested', 'large'],
)
def test_file_that_timm_should_not_read(saved, content, error):
    saved_config.check_file(f'local-dir:{saved}', None)
    (saved / 'config.json').write_text(content)
    with pytest.raises(LoadError, match=error):
        saved_config.check_file(f'local-dir:{saved}', None)


def test_other_architectures_are_not_built(saved):
    """timm would build any of its models, and load it from a pickle."""
    edit(saved, set_at('architecture', 'test_vit'))
    with pytest.raises(LoadError, match=r"architecture in its config.* is 'test_vit'"):
        timm_fisher.from_pretrained(saved)


def test_no_config(tmp_path):
    with pytest.raises(LoadError, match=r'holds no config\.json\. Save it by'):
        saved_config.check_file(f'local-dir:{tmp_path}', None)


def test_absent_fields(saved):
    """What may be left out, and what not; never another error."""
    config = json.loads((saved / 'config.json').read_text())
    wanted = {'architecture', 'model_args', 'pretrained_cfg'}
    for field in config:
        edit(saved, lambda other, field=field: other.pop(field))
        if field in wanted:
            with pytest.raises(LoadError):
                timm_fisher.from_pretrained(saved)
        else:
            timm_fisher.from_pretrained(saved)
        (saved / 'config.json').write_text(json.dumps(config))


# Weights from elsewhere


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


@pytest.mark.parametrize('key', ['classifier', 'first_conv'])
def test_config_does_not_choose_what_is_left_unchecked(saved, key):
    """timm leaves out the classifier that `pretrained_cfg` names if the classes differ."""
    weights = load_file(saved / 'model.safetensors')
    weights['head.dictionary'] = torch.ones(2, 2)
    save_file(weights, saved / 'model.safetensors')
    edit(saved, set_at('pretrained_cfg', key, 'head'))
    edit(saved, set_at('pretrained_cfg', 'input_size', [4, 160, 160]))
    with pytest.raises(LoadError, match=r'head\.dictionary is \(2, 2\)'):
        timm.create_model(f'local-dir:{saved}', pretrained=True, num_classes=7)


def without_backbone(folder, **backbone_weights):
    """Make a saved model an adapter."""
    weights = load_file(folder / 'model.safetensors')
    kept = {key: value for key, value in weights.items() if not key.startswith('backbone.')}
    save_file(kept, folder / 'model.safetensors')
    edit(folder, argument('backbone_weights', backbone_weights))


@pytest.mark.parametrize(
    ('repo_id', 'error'),
    [
        (None, 'does not say which backbone'),
        ('timm/test_resnet.r160_in1k', 'the network was touched'),
        ('timm/vit_giant_patch14_dinov2.lvd142m', 'the network was touched'),
        ('evil/test_resnet.mine', 'the network was touched'),
        ('../x', 'the network was touched|repo_id'),
        ('a@b@c', 'cannot be loaded'),
        ('x' * 900, 'the network was touched'),
    ],
)
def test_adapter_of_anything(saved, monkeypatch, repo_id, error):
    """Only repositories of the Hub are asked, and no other architecture is built."""
    without_backbone(saved, hf_hub_id=repo_id, sha256='0' * 64)
    monkeypatch.setattr('timm.models.vision_transformer.VisionTransformer.__init__', None)
    with pytest.raises(LoadError, match=error):
        LOADERS['timm'](saved)


@pytest.mark.parametrize('options', [{'num_classes': 3}, {'nonsense': 1}, {'layers': 'x'}])
def test_adapter_with_odd_arguments(saved, options):
    without_backbone(saved, hf_hub_id='evil/x', sha256='0' * 64)
    edit(saved, argument('backbone_kwargs', options))
    with pytest.raises(LoadError):
        LOADERS['timm'](saved)


@pytest.mark.parametrize('load', ['from_pretrained', 'timm'])
def test_adapter_of_a_wider_backbone(saved, load):
    """Its weights are not beside the configuration: nothing else bounds it by what they fill."""
    without_backbone(saved, hf_hub_id='timm/test_resnet.r160_in1k', sha256='0' * 64)
    edit(saved, argument('backbone_kwargs', {'channels': [320, 480, 480, 96]}))
    with pytest.raises(LoadError, match=r'asks for a backbone of \d{8} parameters, where pretrain'):
        LOADERS[load](saved)


def test_digest_tells_types_apart():
    zeros = torch.zeros(2)
    assert zeros.numpy().tobytes() == zeros.int().numpy().tobytes()
    assert checkpoint.digest({'a': zeros}) != checkpoint.digest({'a': zeros.int()})


# Sizes

BYTES, PARTS = 'bytes would be filled', 'modules and tensors would be built'
HUGE = {
    'head': (argument('head_kwargs', {'code_dim': 900_000}), BYTES),
    'head of another shape': (argument('head_kwargs', {'code_dim': 5000}), 'not of this model'),
    'blocks': (
        lambda config: config['model_args'].update(head='3g', head_kwargs={'blocks': 100_000}),
        PARTS,
    ),
    'classes': (
        lambda config: [
            config.update(num_classes=900_000, label_names=None),
            config['model_args'].update(num_classes=900_000),
        ],
        BYTES,
    ),
    'heads': (
        lambda config: [
            config.update(num_classes=1000, label_names=None),
            several([{'name': 'bilinear'}] * 64, num_classes=1000)(config),
        ],
        BYTES,
    ),
    'layers': (argument('backbone_kwargs', {'layers': [500] * 4}), PARTS),
    'unused layer': (  # taken out again, but only once it is there
        lambda config: config['model_args'].update(
            backbone='vgg11', backbone_kwargs={'mlp_ratio': 20}
        ),
        BYTES,
    ),
    'window': (
        lambda config: config['model_args'].update(
            backbone='swin_tiny_patch4_window7_224',
            backbone_kwargs={'window_size': 2000},
            img_size=8000,
        ),
        BYTES,
    ),
}
MEASURE = """
import json, resource, sys, time
import timm, timm_fisher
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
pretrained = sys.argv[1] == 'True'
timm.create_model('local-dir:' + sys.argv[2], pretrained=pretrained)
found = []
for folder in sys.argv[3:]:
    before, start = peak(), time.thread_time()
    try:
        timm.create_model('local-dir:' + folder, pretrained=pretrained)
        error = 'none'
    except timm_fisher.LoadError as caught:
        error = str(caught)
    found.append((error, peak() - before, time.thread_time() - start))
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize('pretrained', [True, False])
def test_huge_models_are_not_attempted(originals, tmp_path, pretrained):
    """In a process of its own: the peak of memory of this one is others' work."""
    cases = {name: HUGE[name] for name in HUGE if pretrained or name != 'head of another shape'}
    folders = []
    for name, (change, _) in cases.items():
        folders.append(shutil.copytree(originals / 'sparse_fisher', tmp_path / name))
        edit(folders[-1], change)
    arguments = [str(pretrained), originals / 'sparse_fisher', *folders]
    done = subprocess.run(
        [sys.executable, '-c', MEASURE, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'},
    )
    for (error, grown, seconds), (_, part) in zip(
        json.loads(done.stdout), cases.values(), strict=True
    ):
        assert part in error
        assert grown < 100e6, error
        assert seconds < 20, error


@pytest.mark.parametrize('attack', ['head', 'classes', 'unused layer'])
def test_huge_models_without_weights(saved, attack):
    change, error = HUGE[attack]
    edit(saved, change)
    with pytest.raises(LoadError, match=error):
        LOADERS['without weights'](saved)


def test_endless_building_is_stopped(saved, monkeypatch):
    """This backbone loops over all pairs of positions in a window, 1.3e7 of them."""
    monkeypatch.setattr(saved_config, 'MOST_SECONDS', 0.5)
    arguments = {'backbone': 'tiny_vit_5m_224', 'backbone_kwargs': {'window_sizes': [60] * 4}}
    edit(saved, lambda config: config['model_args'].update(arguments))
    start, profile = time.thread_time(), sys.getprofile()
    with pytest.raises(LoadError, match=r'it takes more than'):
        LOADERS['without weights'](saved)
    assert time.thread_time() - start < 10
    assert sys.getprofile() is profile


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        ({'backbone_kwargs': {'window_size': 7}}, True),
        ({'backbone_kwargs': {'window_sizes': [[7]]}}, True),
        ({'img_size': 1025}, True),
        ({'img_size': [64, 2000.0]}, True),
        ({'img_size': [1024, 64], 'backbone_kwargs': {'norm_layer': 'x'}}, False),
        ({'head_kwargs': {'code_dim': 2000}}, False),
    ],
)
def test_what_is_timed(arguments, expected):
    assert saved_config.may_take_long(arguments) is expected


def test_large_classifier_of_the_caller(saved):
    """The bounds are for what a configuration asks for."""
    classes = saved_config.UNPROVEN.bytes // (4 * 96 * 3)  # and as many biases: it is beyond
    with torch.device('meta'):
        model = timm.create_model(f'local-dir:{saved}', num_classes=classes)
    assert model.num_classes == classes


# Anything at all

WORDS = sorted(
    {
        *('architecture num_classes num_features model_args pretrained_cfg label_names').split(),
        *('label_descriptions labels url file source state_dict hf_hub_id custom_load').split(),
        *(
            'backbone head head_kwargs backbone_kwargs stage class_token last_stride in_chans'
        ).split(),
        *('img_size drop_rate drop_path_rate backbone_weights sha256 name normalize seed').split(),
        *('code_dim hidden components blocks iterations reduce_dim rank input_size mean').split(),
        *('fixed_input_size first_conv classifier label_offset crop_pct output_stride').split(),
        *('layers channels stem_width norm_layer act_layer block aa_layer drop_block_rate').split(),
        *('embed_dim depth num_heads window_size patch_size dynamic_img_size pos_embed').split(),
        *('avg gem bilinear netvlad sparse_fisher 3g gsnmf dbm_idfk append keep tf').split(),
        *('test_resnet test_vit test_vit3 test_efficientnet test_byobnet test_mambaout').split(),
        *('local-dir:.. hf-hub:evil/x os:system ../x /etc/passwd timm_fisher relu').split(),
    }
)
IMAGE_WORDS = [
    *('input_size test_input_size min_input_size fixed_input_size mean std crop_pct').split(),
    *('test_crop_pct interpolation crop_mode license num_classes first_conv classifier').split(),
    *('url file source state_dict hf_hub_id custom_load label_offset pool_size').split(),
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.integers()
    | st.sampled_from([10**k for k in range(2, 20)])
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(max_size=8)
)
KEYS = st.sampled_from(WORDS) | st.text(max_size=8)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)
# What is often refused only late, or not at all.
MILD = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.floats(-1, 2)
    | st.sampled_from(WORDS)
    | st.lists(st.integers(1, 70), max_size=4)
)
BACKBONES = [name for name in WORDS if name.startswith('test_')]
# Of our architecture, with a backbone: these come past timm, and often past the first checks.
OURS = st.fixed_dictionaries(
    {
        'architecture': st.just('timm_fisher'),
        'model_args': st.dictionaries(KEYS, JSON, max_size=5)
        | st.fixed_dictionaries(
            {'backbone': st.sampled_from(BACKBONES)},
            optional={
                'head': st.sampled_from(['avg', 'gem', 'netvlad', *HEADS]) | JSON,
                'head_kwargs': st.dictionaries(KEYS, MILD | JSON, max_size=2) | MILD,
                'backbone_kwargs': st.dictionaries(KEYS, MILD, max_size=2) | MILD,
                **dict.fromkeys(('num_classes', 'in_chans', 'img_size', 'drop_rate'), MILD),
                **dict.fromkeys(('stage', 'class_token', 'last_stride'), MILD),
                'backbone_weights': st.just({'hf_hub_id': 'evil/x', 'sha256': '0'}) | JSON,
            },
        ),
        'pretrained_cfg': st.dictionaries(st.sampled_from(IMAGE_WORDS), MILD | JSON, max_size=3),
    },
    optional={'num_classes': MILD, 'label_names': JSON, 'label_descriptions': JSON},
)
CONFIGS = JSON | OURS | OURS | OURS
CHANGES = st.lists(
    st.tuples(
        st.integers(0),
        st.sampled_from(['replace', 'delete', 'insert', 'nudge', 'nudge', 'nudge']),
        KEYS,
        MILD | JSON,
    ),
    min_size=1,
    max_size=4,
)
OFTEN = settings(
    deadline=20_000,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def places(value):
    """Every container in a JSON value with each of its keys."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield value, key
            yield from places(inner)


def nudge(value):
    """A value like this one, which is often taken."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value * 1.1
    return value[:-1] if isinstance(value, list) else value


def mutate(config, changes):
    """Changed copy of a config, whose architecture stays."""
    config = copy.deepcopy(config)
    for number, change, name, value in changes:
        choices = list(places(config))
        if not choices:
            break
        container, key = choices[number % len(choices)]
        value = copy.deepcopy(value)  # one value may stand at two places
        if change == 'delete':
            del container[key]
        elif change == 'replace':
            container[key] = value
        elif change == 'nudge':
            container[key] = nudge(container[key])
        elif isinstance(container, dict):
            container[name] = value
        else:
            container.insert(key, value)
    return {**config, 'architecture': 'timm_fisher'}


@pytest.fixture(scope='module')
def watch():
    """Files outside of the model and of what is installed, connections, and commands."""
    found, allowed = [], []
    installed = [sys.prefix, sys.base_prefix, os.path.dirname(timm_fisher.__path__[0]), '/dev/']

    def hook(event, arguments):
        if not allowed:
            return
        if event == 'open' and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(tuple(map(os.path.realpath, [*installed, *allowed]))):
                found.append((event, path))
        elif event in ('socket.connect', 'subprocess.Popen', 'os.system', 'pickle.find_class'):
            found.append((event, *arguments))

    sys.addaudithook(hook)  # for ever: it is idle once nothing is allowed

    def during(folder):
        found.clear()
        allowed[:] = [str(folder)] if folder else []
        return found

    yield during
    allowed.clear()


def load_or_refuse(folder, watch):
    """Load in three ways. What timm raises before it calls us is its own."""
    for name, load in LOADERS.items():
        found = watch(folder)
        before = peak()
        try:
            load(folder)
        except LoadError:
            pass
        except Exception as error:
            trace, functions = error.__traceback__, []
            while trace is not None:
                functions.append(trace.tb_frame.f_code.co_name)
                trace = trace.tb_next
            if name == 'from_pretrained' or 'timm_fisher' in functions:
                raise
        finally:
            grown = peak() - before
            seen = list(found)
            watch(None)
        assert not seen
        assert grown < GIGABYTE


@pytest.fixture
def entered(monkeypatch):
    """How often each check of a loaded model was entered."""
    counts = Counter()

    def count(module, name):
        function = getattr(module, name)

        def counted(*arguments):
            counts[name] += 1
            return function(*arguments)

        monkeypatch.setattr(module, name, counted)

    count(saved_config, 'check_config')
    count(saved_config, 'check_images')
    count(checkpoint, 'check_shapes')
    return counts


def fuzz(examples):
    """Tests of random configurations, with this many examples. Most of them, loaded in three ways,
    come as far as to our checks."""
    few = settings(OFTEN, max_examples=examples)

    def test_random(originals, tmp_path, watch, entered):
        @few
        @given(config=CONFIGS)
        def load_random(config):
            shutil.copytree(originals / 'sparse_fisher', tmp_path / 'a', dirs_exist_ok=True)
            (tmp_path / 'a' / 'config.json').write_text(json.dumps(config))
            load_or_refuse(tmp_path / 'a', watch)

        load_random()
        assert entered['check_config'] > examples
        assert entered['check_images'] > examples / 2

    @pytest.mark.parametrize('head', HEADS)
    def test_mutated(originals, tmp_path, watch, entered, head):
        @settings(few, max_examples=examples // 8)
        @given(changes=CHANGES)
        def load_mutated(changes):
            shutil.copytree(originals / head, tmp_path / head, dirs_exist_ok=True)
            config = json.loads((originals / head / 'config.json').read_text())
            (tmp_path / head / 'config.json').write_text(json.dumps(mutate(config, changes)))
            load_or_refuse(tmp_path / head, watch)

        load_mutated()
        assert entered['check_images'] > examples // 8
        assert entered['check_shapes'] > examples // 16

    return test_random, test_mutated


test_random_config, test_mutated_config = fuzz(40)
test_many_random_configs, test_many_mutated_configs = map(pytest.mark.slow, fuzz(2000))
