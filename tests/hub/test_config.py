"""Configurations that no `save_pretrained` wrote: they are refused before anything is built."""

from __future__ import annotations

import json
import re

import pytest
import timm
from PIL import Image
from saved_models import LOADERS, argument, edit, set_at

import timm_fisher
from timm_fisher import LoadError
from timm_fisher.hub import config as saved_config
from timm_fisher.hub.config import check_config, read_config


def several(heads):
    """A change of a config to several heads."""
    return lambda config: config['model_args'].update(head=heads, head_kwargs=None)


def classes(number):
    """A change of the number of classes, everywhere."""

    def change(config):
        config.update(num_classes=number, label_names=None)
        config['model_args']['num_classes'] = number

    return change


ATTACKS = {
    'key with an escape': (argument('x\x1b[2J', 1), r"holds 'x\\x1b\[2J', which is not among"),
    'option with an escape': (argument('backbone_kwargs', {'\x1b[2J': 1}), r"holds '\\x1b\[2J'"),
    'tag with an escape': (argument('backbone', 'test_resnet.\x1b[2J'), "not one of timm's arch"),
    'tag that is long': (argument('backbone', 'test_resnet.' + 'x' * 10**6), "one of timm's arch"),
    'long arguments': (argument('head_kwargs', {'z': ['x' * 1000] * 900}), "no argument 'z'"),
    'unknown head': (argument('head', 'nonsense'), "Unknown head 'nonsense'"),
    'head by path': (argument('head', 'os:system'), "Unknown head 'os:system'"),
    'head by module': (argument('head', 'module.Class'), "Unknown head 'module.Class'"),
    'head as dict': (argument('head', {'name': 'os:system'}), 'head is'),
    'one of several heads': (several([{'name': 'os:system'}]), "head 'os:system'"),
    'many heads': (several([{'name': 'avg'}] * 9), 'head is .*, not the names of 1 to 8 heads'),
    'many names': (several(' + '.join(['avg'] * 9)), 'head is .*, not the names of 1 to 8 heads'),
    'no name': (several('avg + '), r"A name is missing in head='avg \+ '"),
    'unknown name': (several('avg + os:system'), "Unknown head 'os:system'"),
    'stage of a name': (several('avg@-1000'), 'stage=-1000 does not exist'),
    'no heads': (several([]), r'head is \[\], not'),
    'no head': (lambda config: config['model_args'].pop('head'), 'model_args has no head'),
    'argument of head': (argument('head_kwargs', {'code': 3}), "no argument 'code'.*'code_dim'"),
    'argument of model': (argument('any_backbone', True), "model_args holds 'any_backbone'"),
    'trust': (argument('trust_config', True), "model_args holds 'trust_config'"),
    'backbone of a folder': (argument('backbone', 'local-dir:../x'), "not one of timm's arch"),
    'backbone of the Hub': (argument('backbone', 'hf-hub:evil/x'), "not one of timm's arch"),
    'hidden source': (argument('backbone', 'resnet18.hf-hub:evil/x'), 'resnet18.hf-hub'),
    'backbone of ours': (argument('backbone', 'timm_fisher'), "Unknown backbone 'timm_fisher'"),
    'backbone is a preset': (argument('backbone', 'resnet50_3g'), "Unknown backbone 'resnet50_3g'"),
    'backbone is a number': (argument('backbone', 7), 'backbone is 7'),
    'no backbone': (lambda config: config['model_args'].pop('backbone'), 'has no backbone'),
    'many classes': (classes(10**7), 'num_classes is 10000000, not a whole number up to 1000000'),
    'classes that disagree': (argument('num_classes', 900_000), 'num_classes is 5, but 900000'),
    'large code': (argument('head_kwargs', {'code_dim': 10**7}), 'code_dim.*10000000'),
    'blocks': (
        lambda config: config['model_args'].update(head='3g', head_kwargs={'blocks': 40_000}),
        'blocks.*40000',
    ),
    'iterations': (argument('head_kwargs', {'iterations': 10**6}), 'iterations.*1000000'),
    'large layer': (
        lambda config: config['model_args'].update(
            head='dbm_idfk', head_kwargs={'hidden': [10**7]}
        ),
        'hidden.*10000000',
    ),
    'large image': (argument('img_size', [10, 7000]), 'images of 7000 pixels; at most 2048'),
    'stage': (argument('stage', -1000), 'stage is -1000'),
    'NaN': (argument('drop_rate', float('nan')), 'drop_rate is nan'),
    'infinity': (argument('head_kwargs', {'sparsity': float('inf')}), 'inf'),
    'many values': (argument('head_kwargs', {'x': [0] * 10_000}), 'more than 1000 values'),
    'nested values': (argument('head_kwargs', {'x': [[[[0] * 10] * 10] * 10]}), 'more than 1000'),
    'long text': (argument('head', 'x' * 5_000_000), 'head is'),
    'malformed backbone_weights': (argument('backbone_weights', {'sha256': 'x'}), 'backbone_wei'),
    'backbone_weights is a list': (argument('backbone_weights', ['x']), 'backbone_weights'),
    'backbone_kwargs is a list': (argument('backbone_kwargs', [1]), r'backbone_kwargs is \[1\]'),
    'head_kwargs is a text': (argument('head_kwargs', 'abc'), "head_kwargs is 'abc', not a table"),
    'code_dim is a text': (argument('head_kwargs', {'code_dim': '1'}), 'No model can be built'),
    'layers': (argument('backbone_kwargs', {'layers': [500] * 4}), 'layers is'),
    'layers of all stages': (argument('backbone_kwargs', {'layers': [64] * 4}), '160 together'),
    'huge number': (argument('head_kwargs', {'code_dim': 10**400}), 'a number among the argum'),
    'window': (argument('backbone_kwargs', {'window_size': 2000}), 'window_size is 2000'),
    'window sizes': (argument('backbone_kwargs', {'window_sizes': [60] * 4}), 'window_sizes'),
    'label_names is a text': (set_at('label_names', 'abcde'), "label_names is 'abcde', not a list"),
    'label_names of numbers': (set_at('label_names', [1, 2, 3, 4, 5]), 'not a list of texts'),
    'classes are a text': (set_at('num_classes', 'many'), "num_classes is 'many', not"),
    'classes are a fraction': (set_at('num_classes', 5.0), 'num_classes is 5.0'),
    'names of other classes': (set_at('label_names', ['a'] * 4), '4 label_names for 5 classes'),
    'crop': (set_at('pretrained_cfg', 'crop_pct', 0.005), 'crop_pct is 0.005, not a number from'),
    'size of images': (set_at('pretrained_cfg', 'input_size', [3, 160]), 'input_size is'),
    'size of tests': (set_at('pretrained_cfg', 'test_input_size', 'x'), 'test_input_size is'),
    'large input': (set_at('pretrained_cfg', 'input_size', [3, 7000, 7000]), 'images of 7000 pi'),
    'label with an escape': (
        set_at('label_names', ['a', 'b', 'c', 'd', '\x1b[2Je']),
        r"label_names\[4\] contains the character '\\x1b'",
    ),
    'label with a control character': (
        set_at('label_names', ['a\nb', 'b', 'c', 'd', 'e']),
        r"label_names\[0\] contains the character '\\n'",
    ),
    'label of a surrogate': (
        set_at('label_names', ['a', '\ud800', 'c', 'd', 'e']),
        r"label_names\[1\] contains the character '\\ud800'",
    ),
    'label that turns the text': (
        set_at('label_names', ['a', 'b', '\u202egpj', 'd', 'e']),
        r"label_names\[2\] contains the character '\\u202e'",
    ),
    'long label': (
        set_at('label_names', ['x' * 200_000, 'b', 'c', 'd', 'e']),
        r'label_names\[0\] has 200000 characters; at most 200',
    ),
    'licence': (set_at('pretrained_cfg', 'license', 'a\x00'), 'license is'),
    **{
        f'backbone_kwargs: {name}': (
            argument('backbone_kwargs', {name: value}),
            f"backbone_kwargs holds '{name}', which is not among the arguments",
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
            'mlp_ratio': 20,
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize('attack', ATTACKS)
def test_refused_arguments(saved, attack):
    change, error = ATTACKS[attack]
    edit(saved, change)
    for load in LOADERS.values():
        with pytest.raises(LoadError, match=f'(?s){error}') as caught:
            load(saved)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 3100


ALLOWED = [
    {'output_stride': 16},
    {'patch_size': 8, 'embed_dim': 32, 'depth': 2, 'num_heads': 2},
    {
        'embed_dim': [16, 32],
        'depths': [1, 2],
        'num_heads': [1, 2],
        'window_size': [[7, 7], [14, 14]],
    },
    {'global_pool': 'avg', 'dynamic_img_size': True},
    {'threshold': 0.25},
]


@pytest.mark.parametrize('options', ALLOWED)
def test_arguments_of_a_backbone_that_are_allowed(saved, options):
    edit(saved, argument('backbone_kwargs', options))
    assert read_config('local-dir', str(saved)).arguments['backbone_kwargs'] == options


def test_several_heads_that_are_allowed(saved):
    for heads in (' + '.join(['sparse_fisher@-2'] * 8), [{'name': 'avg'}] * 8):
        edit(saved, several(heads))
        assert read_config('local-dir', str(saved)).arguments['head'] == heads


@pytest.mark.parametrize(
    'arguments',
    [
        {'backbone_kwargs': {'stem_width': 16}},
        {'img_size': 2080},
    ],
)
def test_trusted_configuration(tmp_path, arguments):
    """What is on no list is saved with a warning, and needs the word of whoever loads it."""
    model = timm_fisher.create_model('test_resnet', num_classes=5, **arguments)
    with pytest.warns(UserWarning, match=r'To load this model, trust_config=True is needed'):
        timm_fisher.save_model(model, tmp_path)
    for load in LOADERS.values():
        with pytest.raises(LoadError, match=r'If you trust it, give trust_config=True\.$'):
            load(tmp_path)
    for loaded in (
        timm_fisher.from_pretrained(tmp_path, trust_config=True),
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, trust_config=True),
    ):
        assert repr(loaded) == repr(model)
        assert loaded._model_args == model._model_args


@pytest.mark.parametrize(
    'options', [{'init_values': 1e-5}, {'drop_block_rate': 0.1}, {'attn_drop_rate': 0.2}]
)
def test_rates_of_a_backbone(options):
    check_config(config(IMAGES) | {'model_args': {**ARGUMENTS, 'backbone_kwargs': options}})


# Images

IMAGES = {'num_classes': 5, 'input_size': [3, 64, 64]}
REFUSED_IMAGES = [
    ({'crop_pct': 0}, r'crop_pct is 0, not a number from 0\.1 to 2\.0'),
    ({'crop_pct': -1}, 'crop_pct is -1'),
    ({'crop_pct': 2.5}, 'crop_pct is 2.5'),
    ({'crop_pct': 10**4000}, 'crop_pct is 1000'),
    ({'crop_pct': '1'}, "crop_pct is '1', not a number"),
    ({'crop_pct': True}, 'crop_pct is True, not a number'),
    ({'test_crop_pct': 0.01}, 'test_crop_pct is 0.01'),
    ({'crop_pct': 0.1, 'input_size': [3, 64, 900]}, r'resized to 900 / 0\.1 pixels; at most 8192'),
    ({'crop_pct': 0.1, 'test_input_size': [3, 900, 64]}, r'resized to 900 / 0\.1 pixels'),
    ({'test_crop_pct': 0.1, 'input_size': [3, 900, 64]}, r'resized to 900 / 0\.1 pixels'),
    ({'input_size': [3, 64, 2049]}, 'images of 2049 pixels; at most 2048'),
    ({'input_size': [1025, 64, 64]}, 'input_size is .1025, 64, 64., not three whole'),
    ({'interpolation': 'best'}, "interpolation is 'best', not one of nearest, bilinear"),
    ({'interpolation': ['bicubic']}, 'interpolation is .*bicubic'),
    ({'crop_mode': 'middle'}, "crop_mode is 'middle', not one of center, squash, border"),
    ({'std': [0.2, 0, 0.2]}, r'std is \[0\.2, 0, 0\.2\], not numbers from 1e-6 to 1000'),
    ({'std': [-0.2] * 3}, 'std is'),
    ({'std': [1e-300] * 3}, 'std is'),
    ({'std': [float('inf')] * 3}, 'std is'),
    ({'std': [10**4000] * 3}, 'std is'),
    ({'mean': [float('nan')] * 3}, 'mean is .*nan.*, not numbers'),
    ({'mean': [1e300] * 3}, 'mean is'),
    ({'mean': 0.5}, 'mean is 0.5, not'),
    ({'mean': []}, 'mean has 0 values for 3 channels'),
    ({'mean': [0.5] * 2}, 'mean has 2 values for 3 channels'),
    ({'std': [0.5] * 4}, 'std has 4 values for 3 channels'),
    ({'label_names': ['a'] * 4}, 'there are 4 label_names for 5 classes'),
    ({'label_descriptions': {'a': 'x' * 1001}}, 'label_descriptions is'),
]  # fmt: skip


ARGUMENTS = {'backbone': 'test_resnet', 'head': 'avg', 'num_classes': 5}


def config(images):
    arguments = {**ARGUMENTS, 'num_classes': images['num_classes']}
    return {'architecture': 'timm_fisher', 'model_args': arguments, 'pretrained_cfg': images}


@pytest.mark.parametrize(('changes', 'error'), REFUSED_IMAGES)
def test_images_that_are_refused(changes, error):
    """They would fill the memory, or fail, with the first image."""
    with pytest.raises(ValueError, match=error):
        check_config(config({**IMAGES, **changes}))


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
        {'label_names': ['café', 'a\u00a0b', '中文', 'نی\u200cم', '=1+1']},
    ],
)
def test_images_that_are_taken(changes):
    """timm makes a transform of them."""
    cfg = {**IMAGES, 'label_names': list('abcde'), **changes}
    images = check_config(config(cfg)).images
    assert json.loads(json.dumps(images)) == {k: v for k, v in cfg.items() if v is not None}
    given = timm.data.resolve_data_config(pretrained_cfg=images)
    image = timm.data.create_transform(**given)(Image.new('RGB', (40, 30)))
    assert image.shape == tuple(cfg['input_size'])


def test_images_of_timm_are_taken():
    """Of all its pretrained models."""
    for name in timm.list_pretrained():
        cfg = json.loads(json.dumps(timm.get_pretrained_cfg(name).to_dict()))
        check_config(config(cfg | {'label_names': None, 'label_descriptions': None}))
    grey = {**IMAGES, 'input_size': [4, 64, 64], 'mean': [0.5] * 4, 'std': [0.5] * 3}
    check_config(config({**grey, 'num_classes': 0}))


# The file

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
    'architecture of timm': '{"architecture": "vit_giant_patch14_224"}',
    'architecture of a preset': '{"architecture": "resnet50_3g"}',
    'large': ' ' * saved_config.MOST_BYTES + '{}',
}


@pytest.mark.parametrize('content', UNREADABLE)
def test_unreadable_config(saved, content):
    text = UNREADABLE[content]
    (saved / 'config.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(LoadError, match=r'config\.json'):
        timm_fisher.from_pretrained(saved)


def test_large_file_by_plain_timm(saved):
    """timm has read it by then, but nothing is built from it."""
    edit(saved, set_at('padding', ' ' * saved_config.MOST_BYTES))
    for load in LOADERS.values():
        with pytest.raises(LoadError, match=r'\d{7} bytes; at most 8388608'):
            load(saved)


@pytest.mark.parametrize('name', ['pretrained', 'pretrained_cfg', 'cache_dir', 'checkpoint_path'])
def test_arguments_of_the_factory(saved, name):
    edit(saved, argument(name, str(saved / 'x.pth')))
    with pytest.raises(LoadError):
        timm_fisher.from_pretrained(saved)


def test_no_config(tmp_path):
    with pytest.raises(LoadError, match=r'holds no config\.json\. The model of a run is'):
        timm_fisher.from_pretrained(tmp_path)


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


# What is recorded


def test_only_what_the_caller_gave_is_recorded(tmp_path):
    model = timm_fisher.create_model(
        'test_resnet', head='gem', stage=-2, num_classes=3, backbone_kwargs={'output_stride': 16}
    )
    timm_fisher.save_model(model, tmp_path)
    assert json.loads((tmp_path / 'config.json').read_text())['model_args'] == {
        'backbone': 'test_resnet',
        'head': 'gem',
        'stage': -2,
        'backbone_kwargs': {'output_stride': 16},
        'in_chans': 3,
    }
    loaded = timm_fisher.from_pretrained(tmp_path)
    timm_fisher.save_model(loaded, tmp_path / 'again')
    again = json.loads((tmp_path / 'again' / 'config.json').read_text())
    assert again['model_args'] == json.loads((tmp_path / 'config.json').read_text())['model_args']


def test_a_message_shows_no_control_characters():
    assert re.fullmatch(r"'\\x1b\[2J.*'|\\x1b.*", saved_config._shown('\x1b[2Jx'))
    assert len(saved_config._shown('x' * 10**6)) <= 202
