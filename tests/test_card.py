"""The card of a saved model: what it says, and what becomes of an edited one."""

import json

import pytest
import timm
import torch
from huggingface_hub import ModelCard

import timm_fisher
from timm_fisher.card import count_macs
from timm_fisher.hub import merge_cards, seal

METRICS = {
    'test': {'accuracy': 0.51234, 'balanced_accuracy': 0.4, 'samples': 10},
    'seed': 0,
    'seeds': {'0': 0.51234, '1': 0.6},
    'command': 'accelerate launch recipes/train.py --head gem',
    'dataset': 'Leaves',
    'versions': {'torch': '1.2.3'},
}


def create(head='gem', **arguments):
    return timm_fisher.create_model('test_resnet', head, **{'num_classes': 2, **arguments})


def card(folder, model=None, **arguments):
    timm_fisher.save_pretrained(model or create(), folder, **arguments)
    return ModelCard.load(folder / 'README.md')


def test_figures_of_a_run(tmp_path):
    (tmp_path / 'metrics.json').write_text(json.dumps(METRICS))
    found = card(tmp_path, metrics=tmp_path / 'metrics.json', label_names=['ash', 'elm|oak'])
    accuracy, balanced = found.data.eval_results
    assert (accuracy.dataset_name, accuracy.metric_type, accuracy.metric_value) == (
        *('Leaves', 'accuracy'),
        51.23,
    )
    assert (balanced.metric_type, balanced.metric_value) == ('balanced_accuracy', 40.0)
    for line in (
        'Leaves, test split, 10 images:',
        '| accuracy | 51.23 |',
        'Over seeds 0, 1, test accuracy was 51.23, 60.00 %.',
        METRICS['command'],
        'Versions: torch 1.2.3.',
        '| classes | ash, elm/oak |',
        'Licence: apache-2.0.',
    ):
        assert line in found.text, line
    assert timm_fisher.heads.gem.__doc__.splitlines()[0] in found.text
    assert json.loads((tmp_path / 'metrics.json').read_text()) == METRICS


def test_without_figures_or_classes(tmp_path):
    found = card(tmp_path / 'a')
    assert 'None were given when this card was written' in found.text
    assert found.data.eval_results is None
    assert found.data.pipeline_tag == 'image-classification'

    found = card(tmp_path / 'b', create(num_classes=0, in_chans=1))
    assert found.data.pipeline_tag == 'image-feature-extraction'
    assert 'A feature extractor' in found.text
    assert "convert('L')" in found.text
    assert 'probabilities' not in found.text


def test_card_says_how_the_model_is_built(tmp_path):
    heads = [{'name': 'avg', 'normalize': True}, {'name': 'gmm_fisher', 'components': 2}]
    found = card(tmp_path, create(heads, stage=-2))
    assert '| head | `gmm_fisher`, components 2 |' in found.text
    assert '| stage | -2, an earlier one |' in found.text
    assert {'avg', 'gmm_fisher'} < set(found.data.tags)


def test_multiplications_are_counted():
    """Of a convolution and a linear layer, by hand; modes stay as they are."""
    model = create('avg').train()
    model.backbone.bn1.eval()
    modes = [module.training for module in model.modules()]
    total = count_macs(model, (3, 64, 64))
    assert [module.training for module in model.modules()] == modes
    by_hand = 0

    def count(module, inputs, output):
        nonlocal by_hand
        weight = module.weight
        positions = output.shape[-2:].numel() if weight.ndim == 4 else 1
        by_hand += positions * weight.numel()

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    model.eval()(torch.zeros(1, 3, 64, 64))
    assert total == by_hand > 0


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        ({'label_names': [0, 1]}, ValueError, 'must be a list of texts'),
        ({'label_names': 'ab'}, ValueError, 'must be a list of texts'),
        ({'label_names': ['a']}, ValueError, '1 label names were given for 2 classes'),
        ({'card': {'data_set': 'x'}}, TypeError, r"no argument 'data_set'.*'dataset'"),
        ({'adapter': True}, ValueError, 'No adapter can be saved: the backbone was not loaded'),
        ({'float16': ['head.q']}, ValueError, "no tensor 'head.q'"),
        ({'backbone_id': 'a b/c'}, ValueError, 'a b/c'),
        ({'metrics': {'test': 0.5}}, ValueError, r"metrics\['test'\] is 0.5, not a table"),
        (
            {'metrics': {'val': {'accuracy': 51.2}}},
            ValueError,
            "'accuracy'.* is 51.2, not a .* 0 to",
        ),
        ({'metrics': {'test': {'accuracy': None}}}, ValueError, 'is None, not a number'),
        ({'metrics': {'seeds': [0.5]}}, ValueError, r"metrics\['seeds'\] is \[0.5\], not a table"),
        ({'metrics': {'seeds': {'0': 'x'}}}, ValueError, r"\['seeds'\]\['0'\] is x, not a number"),
        ({'metrics': {'versions': 2}}, ValueError, r"metrics\['versions'\] is 2, not a table"),
        ({'metrics': [1]}, ValueError, r'metrics are \[1\], not a table'),
    ],
)
def test_mistakes_leave_nothing(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        timm_fisher.save_pretrained(create(), tmp_path / 'new', **arguments)
    assert not [path for path in tmp_path.rglob('*') if path.is_file()]
    with pytest.raises(TypeError, match='Sequential is not a PooledModel'):
        timm_fisher.save_pretrained(torch.nn.Sequential(create()), tmp_path)


def test_metrics_that_are_no_json(tmp_path):
    (tmp_path / 'metrics.json').write_text('{')
    with pytest.raises(ValueError, match=r"metrics\.json' is not readable JSON"):
        timm_fisher.save_pretrained(create(), tmp_path / 'a', metrics=tmp_path / 'metrics.json')


def test_half_precision_of_large_tensors(tmp_path):
    model = create('sparse_fisher', code_dim=3).eval()
    timm_fisher.save_pretrained(model, tmp_path, float16=['head.dictionary'])
    loaded = timm_fisher.from_pretrained(tmp_path)
    assert loaded.head.dictionary.dtype == torch.float32
    expected = model.head.dictionary.half().float()
    assert torch.equal(loaded.head.dictionary, expected)
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)


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
    assert grey.backbone_weights is None  # adapted by arithmetic
    bare = timm.create_model(f'local-dir:{tmp_path}/adapter')  # random weights
    assert bare.backbone_weights is None


# Edited cards


def sealed(body, **data):
    lines = ''.join(f'{key}: {json.dumps(value)}\n' for key, value in data.items())
    return seal(f'---\n{lines}---\n\n{body}\n')


NEW = sealed('new', tags=['timm', 'avg'], library_name='timm', base_model='a/new')


def test_merging_again_changes_nothing():
    for old in (
        NEW,
        'no metadata',
        '',
        '---\nlicense: mit\n---\n',
        '---\r\ntags:\r\n- x\r\nnested:\r\n  a: [1, 2]\r\n---\r\nText\r\n',
        sealed('old', tags=['trees', 'gem'], language='la'),
    ):
        once = merge_cards(NEW, old)
        assert merge_cards(NEW, once) == once
    assert merge_cards(NEW, NEW) == NEW


def test_an_unedited_card_is_replaced():
    index = [{'name': 'x', 'results': []}]
    data = {'tags': ['trees', 'gem'], 'language': 'la', 'datasets': ['a/b'], 'model-index': index}
    old = sealed('old', **data)
    found = ModelCard(merge_cards(NEW, old))
    assert found.text.lstrip().startswith('new')
    assert found.data.tags == ['trees', 'timm', 'avg']  # 'gem' was the head of the old model
    assert found.data.language == 'la'
    assert found.data.base_model == 'a/new'
    assert 'model-index' not in found.content
    assert 'datasets' not in found.content


@pytest.mark.parametrize('old', ['', '---\nlicense: mit\n---\n'])
def test_an_empty_card_is_filled(old):
    found = ModelCard(merge_cards(NEW, old))
    assert found.text.lstrip().startswith('new')
    assert found.data.license == ('mit' if old else None)


def test_an_edited_card_keeps_its_text():
    old = sealed('old', tags=['gem'], base_model='a/old').replace('old\n', 'old, and mine\n')
    found = ModelCard(merge_cards(NEW, old))
    assert found.text.lstrip().startswith('old, and mine')
    assert found.data.base_model == 'a/new'


def test_a_card_that_cannot_be_read():
    with pytest.raises(ValueError, match=r'README\.md on the Hub has metadata that cannot be read'):
        merge_cards(NEW, '---\na: [\n---\n')
