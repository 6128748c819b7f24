"""Saving a model: what is stored, what is refused, and how little of it is believed."""

import json
import os

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from limits import within

import timm_fisher
from timm_fisher.hub.push import push_folder
from timm_fisher.hub.readme import BEGIN, END
from timm_fisher.hub.save import FILES
from timm_fisher.hub.text import LONGEST_LABEL, problem

WEIGHTS = 'model.safetensors'


def create(head='sparse_fisher', **arguments):
    """A model with every weight moved from where it starts, so that loading must restore all."""
    model = timm_fisher.create_model('test_resnet', head, **{'num_classes': 5, **arguments}).eval()
    for value in model.state_dict(keep_vars=True).values():
        if value.is_floating_point():
            value.data.mul_(1 + 0.1 * torch.rand_like(value))
    return model


def load(folder, **arguments):
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **arguments).eval()


def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_channels_last(tmp_path):
    model, x = create().to(memory_format=torch.channels_last), images()
    timm_fisher.save_model(model, tmp_path)
    torch.testing.assert_close(load(tmp_path)(x), model(x))
    weight = model.backbone.conv1[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last), 'saving changed the model'


def test_labels_and_data_config_are_stored(tmp_path):
    names = ['ash', 'beech', 'elm', 'fir', 'oak']
    data = {'input_size': (3, 96, 96), 'mean': [0.1, 0.2, 0.3], 'crop_pct': 0.5}
    timm_fisher.save_model(create(), tmp_path / 'a', label_names=names, data_config=data)
    config = json.loads((tmp_path / 'a' / 'config.json').read_text())
    assert config['architecture'] == 'timm_fisher'
    assert config['num_classes'] == 5
    assert config['label_names'] == names

    timm_fisher.save_model(load(tmp_path / 'a'), tmp_path / 'b')  # saved again: still there
    for folder in 'ab':
        loaded = load(tmp_path / folder)
        assert loaded.pretrained_cfg['label_names'] == names
        used = timm.data.resolve_model_data_config(loaded)
        assert {key: used[key] for key in data} == data

    timm_fisher.save_model(load(tmp_path / 'a', num_classes=2), tmp_path / 'c')
    loaded = load(tmp_path / 'c')
    assert loaded.num_classes == loaded.pretrained_cfg['num_classes'] == 2
    assert loaded.pretrained_cfg.get('label_names') is None


def test_number_of_labels_must_be_that_of_the_classes(tmp_path):
    with pytest.raises(ValueError, match='there are 2 label_names for 5 classes'):
        timm_fisher.save_model(create(), tmp_path, label_names=['a', 'b'])
    assert not files(tmp_path)


def test_saving_again_replaces(tmp_path):
    for head in ('sparse_fisher', 'avg'):
        model = create(head)
        timm_fisher.save_model(model, tmp_path)
    assert files(tmp_path) == ['config.json', WEIGHTS]
    assert torch.equal(load(tmp_path)(images()), model(images()))


def test_figures_of_an_earlier_model_go(tmp_path):
    """What is left cannot be pushed: card and weights would not belong together."""
    timm_fisher.save_pretrained(create(), tmp_path)
    timm_fisher.save_model(create(), tmp_path)
    assert files(tmp_path) == ['README.md', 'config.json', WEIGHTS]
    with pytest.raises(ValueError, match=r'lacks metrics\.json\. Write it by .*save_pretrained'):
        push_folder(tmp_path, 'user/name')


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        ({'label_names': [0, 1]}, ValueError, r'label_names is \[0, 1\], not a list'),
        ({'label_names': 'ab'}, ValueError, 'must be a list of texts'),
        ({'label_names': ['a']}, ValueError, 'there are 1 label_names for 2 classes'),
        ({'card': {'data_set': 'x'}}, TypeError, "argument 'data_set'"),
        ({'adapter': True}, ValueError, 'No adapter can be saved: the backbone was not loaded'),
        ({'float16': ['head.q']}, ValueError, "no tensor 'head.q'"),
        ({'data_config': {'crop_pct': 9}}, ValueError, 'crop_pct is 9, not a number from 0.1 to'),
        ({'label_names': {'a': 1, 'b': 0}}, ValueError, 'must be a list of texts'),
        (
            {'card': {'limits': 'cats'}},
            TypeError,
            "card's limits must be a list of texts, not 'cats'",
        ),
        ({'backbone_id': 'a/b'}, ValueError, 'with pretrained weights; this one has none'),
    ],
)
def test_mistakes_leave_nothing(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        timm_fisher.save_pretrained(create('gem', num_classes=2), tmp_path / 'new', **arguments)
    assert not [path for path in tmp_path.rglob('*') if path.is_file()]
    with pytest.raises(TypeError, match='Sequential is not a PooledModel'):
        timm_fisher.save_pretrained(torch.nn.Sequential(create('gem')), tmp_path)


def test_half_precision_of_large_tensors(tmp_path):
    model = create('sparse_fisher', code_dim=3).eval()
    timm_fisher.save_pretrained(model, tmp_path, float16=['head.dictionary'])
    loaded = timm_fisher.from_pretrained(tmp_path)
    assert loaded.head.dictionary.dtype == torch.float32
    expected = model.head.dictionary.half().float()
    assert torch.equal(loaded.head.dictionary, expected)
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    model.head.dictionary.data[0, 0] = 7e4
    with pytest.raises(ValueError, match=r"'head\.dictionary' holds .* numbers that are too large"):
        timm_fisher.save_pretrained(model, tmp_path, float16=['head.dictionary'])


# Adapters, as far as no Hub is needed


def test_adapter_of_a_backbone_from_a_folder(tmp_path):
    plain = timm.create_model('test_resnet')
    timm.models.save_for_hf(plain, tmp_path / 'backbone', safe_serialization=True)
    source = f'local-dir:{tmp_path}/backbone'
    model = timm_fisher.create_model(source, 'gem', pretrained=True, num_classes=2).eval()
    timm_fisher.save_pretrained(model, tmp_path / 'whole')  # nobody says where it comes from
    timm_fisher.save_pretrained(model, tmp_path / 'adapter', backbone_id='timm/test_resnet.x')
    sizes = {n: (tmp_path / n / 'model.safetensors').stat().st_size for n in ('whole', 'adapter')}
    assert sizes['adapter'] < 0.1 * sizes['whole']
    x = torch.randn(2, 3, 64, 64)
    loaded = timm_fisher.from_pretrained(tmp_path / 'adapter', backbone=source).eval()
    assert torch.equal(loaded(x), model(x))
    assert 'sha256' in loaded.backbone_weights

    timm.models.save_for_hf(
        timm.create_model('test_resnet'), tmp_path / 'other', safe_serialization=True
    )
    other = f'local-dir:{tmp_path}/other'
    with pytest.raises(timm_fisher.LoadError, match=r'are not those that .* was trained with'):
        timm_fisher.from_pretrained(tmp_path / 'adapter', backbone=other)
    taken = timm_fisher.from_pretrained(tmp_path / 'adapter', backbone=other, any_backbone=True)
    timm_fisher.save_pretrained(taken, tmp_path / 'taken')
    assert 'base_model' not in (tmp_path / 'taken' / 'README.md').read_text()

    grey = timm_fisher.create_model(source, 'gem', pretrained=True, in_chans=1)
    assert grey.backbone_weights['sha256'] is None  # adapted by arithmetic
    with pytest.raises(ValueError, match='were adapted to other images than they came for'):
        timm_fisher.save_pretrained(grey, tmp_path / 'grey', adapter=True)
    timm_fisher.save_pretrained(grey, tmp_path / 'grey', backbone_id='timm/test_resnet.x')
    loaded = ModelCard.load(tmp_path / 'grey' / 'README.md')
    assert loaded.data.base_model == 'timm/test_resnet.x'
    assert loaded.data.base_model_relation == 'finetune'
    again = timm_fisher.from_pretrained(tmp_path / 'grey')
    assert again.backbone_weights == {'hf_hub_id': 'timm/test_resnet.x', 'sha256': None}
    assert grey.backbone_weights['hf_hub_id'] is None, 'saving changed the model'
    with pytest.raises(ValueError, match='a b/c'):
        timm_fisher.save_pretrained(model, tmp_path / 'x', backbone_id='a b/c')
    with pytest.raises(TypeError, match='data_set'):
        timm_fisher.save_pretrained(model, tmp_path / 'x', backbone_id='a/b', card={'data_set': 1})
    assert model.backbone_weights['hf_hub_id'] is None
    for path in (tmp_path / name / file for name in ('whole', 'adapter', 'grey') for file in FILES):
        assert str(tmp_path).encode() not in path.read_bytes(), 'a local path is published'
    bare = timm.create_model(f'local-dir:{tmp_path}/adapter')  # random weights
    assert bare.backbone_weights is None


def test_file_of_a_backbones_weights_is_not_recorded(tmp_path):
    """The saved model has the weights, and must not tell where they were."""
    path = tmp_path / 'secret' / 'weights.pth'
    path.parent.mkdir()
    torch.save(timm.create_model('test_resnet', num_classes=0).state_dict(), path)
    places = {'checkpoint_path': str(path), 'pretrained_cfg_overlay': {'file': str(path)}}
    model = create('avg', backbone_kwargs={**places, 'output_stride': 16})
    timm_fisher.save_pretrained(model, tmp_path / 'model')
    path.unlink()
    assert not any(b'secret' in file.read_bytes() for file in (tmp_path / 'model').iterdir())
    assert torch.equal(load(tmp_path / 'model')(images()), model(images()))


# Hostile text


def saved_with(folder, readme):
    """A folder with a README.md that somebody made."""
    folder.mkdir()
    (folder / 'README.md').write_bytes(readme)
    return folder


SECRET = 'the content of another file'


@pytest.mark.parametrize('name', FILES)
def test_links_are_refused(tmp_path, name):
    """A README.md would be copied into the new card, and pushed."""
    (tmp_path / 'secret').write_text(SECRET)
    folder = tmp_path / 'model'
    timm_fisher.save_pretrained(create('avg'), folder)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.name != name}
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / 'secret')
    for wrong in (
        lambda: timm_fisher.save_pretrained(create('avg'), folder),
        lambda: push_folder(folder, 'user/name'),
    ):
        with pytest.raises(ValueError, match=rf"model/{name}' is a symbolic link or no regular"):
            wrong()
    assert {path: path.read_bytes() for path in before} == before
    assert (folder / name).is_symlink()
    assert (tmp_path / 'secret').read_text() == SECRET


@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused(tmp_path, make):
    (tmp_path / 'model').mkdir()
    make(tmp_path / 'model' / 'README.md')
    with within(60), pytest.raises(ValueError, match='symbolic link or no regular file'):
        timm_fisher.save_pretrained(create('avg'), tmp_path / 'model')
    assert files(tmp_path / 'model') == ['README.md']


ALIASES = '---\na: &a [x]\n' + ''.join(
    f'{b}: &{b} [{", ".join(9 * ["*" + a])}]\n' for a, b in zip('abcdefgh', 'bcdefghi', strict=True)
)


def test_aliases_in_the_metadata(tmp_path):
    """A few hundred bytes, which stood for 43 million values."""
    folder = saved_with(tmp_path / 'model', f'{ALIASES}---\n'.encode())
    with within(60), pytest.raises(ValueError, match=r"README\.md' cannot be read: .*anchor 'a'"):
        timm_fisher.save_pretrained(create('avg'), folder)
    assert files(folder) == ['README.md']


def test_a_long_comment(tmp_path):
    """It took 11 seconds by a regular expression."""
    comment = b'<!-- made by timm_fisher: ' + b'a' * 40_000 + b' -->\n' + b' ' * 40_000
    folder = saved_with(tmp_path / 'model', comment)
    model = create('avg')
    timm_fisher.save_pretrained(model, tmp_path / 'warm')
    with within(5), pytest.warns(match='keeps the text that somebody wrote'):
        timm_fisher.save_pretrained(model, folder)
    assert (folder / 'README.md').read_bytes().endswith(comment)


def test_a_large_readme(tmp_path):
    folder = saved_with(tmp_path / 'model', b'x' * 2**21)
    with pytest.raises(ValueError, match='more than 1048576 bytes'):
        timm_fisher.save_pretrained(create('avg'), folder)


BAD_LABELS = {
    '\n': 'control character', '\x00': 'null', '\x1b[31m': 'terminal escape', '\x9b': 'C1 escape',
    '\ud800': 'lone surrogate', '\u202e': 'change of direction', '\u2028': 'line separator',
    'x' * 200_000: 'too long',
}  # fmt: skip


@pytest.mark.parametrize('label', BAD_LABELS, ids=BAD_LABELS.values())
def test_labels_that_are_refused(tmp_path, label):
    model = create('avg', num_classes=2)
    for save in (timm_fisher.save_model, timm_fisher.save_pretrained):
        with within(60), pytest.raises(ValueError, match=r'label_names\[1\]') as caught:
            save(model, tmp_path, label_names=['ash', f'elm{label}'])
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 200
    model.pretrained_cfg['label_names'] = ['ash', f'elm{label}']
    with pytest.raises(ValueError, match=r'label_names\[1\]'):
        timm_fisher.save_model(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_labels_that_are_not(tmp_path):
    labels = ['Ångström', '犬 (イヌ)', 'नमस्\u200dते', '👩\u200d🌾', 'x' * LONGEST_LABEL]
    assert not any(problem(label, LONGEST_LABEL) for label in labels)
    timm_fisher.save_pretrained(create('avg'), tmp_path, label_names=labels)
    assert load(tmp_path).pretrained_cfg['label_names'] == labels
    for label in labels:
        assert label in (tmp_path / 'README.md').read_text(encoding='utf-8')


def test_more_labels_than_can_be_loaded(tmp_path):
    model = create('avg', num_classes=50_000)
    with pytest.raises(
        ValueError, match=r'config\.json is refused: it has \d+ bytes; at most 8388608'
    ):
        timm_fisher.save_model(model, tmp_path, label_names=['x' * LONGEST_LABEL] * 50_000)
    assert not list(tmp_path.iterdir())


# A folder that holds a card already


def test_saving_again_changes_no_byte(tmp_path):
    model = create('avg', num_classes=2)
    options = {
        'metrics': {'val': {'accuracy': 0.5}, 'dataset': 'Leaves'},
        'label_names': ['ash', 'elm|oak'],
        'card': {'license': 'mit', 'dataset_id': 'a/leaves', 'limits': ['Trees only.']},
    }
    timm_fisher.save_pretrained(model, tmp_path, **options)
    text = (tmp_path / 'README.md').read_bytes()
    mine = text.replace(b'license: mit', b'license: mit # or so\nlanguage: no')
    mine = mine.replace(BEGIN.encode(), b'Above.\r\n' + BEGIN.encode()) + b'\nBelow.\r\n\r\n'
    for content in (text, mine):
        (tmp_path / 'README.md').write_bytes(content)
        for _ in range(2):
            timm_fisher.save_pretrained(model, tmp_path, **options)
            assert (tmp_path / 'README.md').read_bytes() == content
    timm_fisher.save_pretrained(create('gem', num_classes=2), tmp_path)
    after = (tmp_path / 'README.md').read_bytes()
    assert after.endswith(END.encode() + b'\n\nBelow.\r\n\r\n')
    assert b"license: mit\nlanguage: 'no'\n" in after
    assert b'Above.\r\n<!--' in after
    assert b'`gem`' in after
    assert b'accuracy' not in after
    ModelCard(after.decode()).data.to_dict()
