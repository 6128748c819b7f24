"""The card of a saved model: what it says, and what becomes of an edited one."""

import json
import warnings

import pytest
import timm
import torch
from huggingface_hub import ModelCard

import timm_fisher
from timm_fisher.hub.card import count_macs, merge_cards, seal

METRICS = {
    'test': {'accuracy': 0.51234, 'balanced_accuracy': 0.4, 'samples': 10},
    'seed': 0,
    'seeds': {'0': 0.51234, '1': 0.6},
    'command': 'accelerate launch recipes/train.py --head gem',
    'dataset': 'Leaves',
    'versions': {'torch': '1.2.3'},
    'best': {'stage': 'warmup', 'epoch': 3, 'val_accuracy': 0.5},
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
    assert (accuracy.dataset_name, accuracy.dataset_split) == ('Leaves', 'test')
    assert (accuracy.metric_type, accuracy.metric_value) == ('accuracy', 51.23)
    assert (balanced.metric_type, balanced.metric_value) == ('balanced_accuracy', 40.0)
    for line in (
        'Leaves, test split, 10 images:',
        '| accuracy | 51.23 |',
        'Over seeds 0, 1, test accuracy was 51.23, 60.00 %.',
        METRICS['command'],
        'those after epoch 3 of the stage `warmup`, the best on the validation split.',
        'Versions: torch 1.2.3.',
        '| classes | ash, elm/oak |',
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
        ({'data_config': {'crop_pct': 9}}, ValueError, 'crop_pct is 9, not a number from 0.1 to'),
        ({'label_names': {'a': 1, 'b': 0}}, ValueError, 'must be a list of texts'),
        (
            {'card': {'limits': 'cats'}},
            TypeError,
            "card's limits must be a list of texts, not 'cats'",
        ),
        ({'backbone_id': 'a b/c'}, ValueError, 'a b/c'),
        ({'backbone_id': 'a/b'}, ValueError, 'with pretrained weights; this one has none'),
        ({'metrics': {'test': 0.5}}, ValueError, r"metrics\['test'\] is 0.5, not a table"),
        (
            {'metrics': {'val': {'accuracy': 51.2}}},
            ValueError,
            "'accuracy'.* is 51.2, not a .* 0 to",
        ),
        ({'metrics': {'test': {'accuracy': None}}}, ValueError, 'is None, not a number'),
        ({'metrics': {'seeds': [0.5]}}, ValueError, r"metrics\['seeds'\] is \[0.5\], not a table"),
        (
            {'metrics': {'seeds': {'0': 'x'}}},
            ValueError,
            r"\['seeds'\]\['0'\] is 'x', not a number",
        ),
        (
            {'metrics': {'accuracy': 0.5}},
            ValueError,
            r"no 'test' and no 'val', only \['accuracy'\]",
        ),
        ({'metrics': {'val': {'acc': 0.5}}}, ValueError, r"has no 'accuracy', only \['acc'\]"),
        ({'metrics': {'test': None}}, ValueError, r"metrics\['test'\] is None, not a table"),
        ({'metrics': METRICS | {'dataset': 3}}, ValueError, r"\['dataset'\] is 3, not a text"),
        ({'metrics': METRICS | {'versions': 2}}, ValueError, r"\['versions'\] is 2, not a table"),
        (
            {'metrics': METRICS | {'head': 'avg'}},
            ValueError,
            'another model: head is avg there, gem',
        ),
        (
            {'metrics': METRICS | {'out_features': 9}},
            ValueError,
            'out_features is 9 there, 96 here',
        ),
        (
            {'metrics': METRICS | {'parameters': 9}},
            ValueError,
            'parameters is 9 there, 372883 here',
        ),
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
    model.head.dictionary.data[0, 0] = 7e4
    with pytest.raises(ValueError, match=r"'head\.dictionary' holds numbers that are too large"):
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
    found = card(tmp_path / 'grey', grey, backbone_id='timm/test_resnet.x')
    assert found.data.base_model == 'timm/test_resnet.x'
    assert found.data.base_model_relation == 'finetune'
    again = timm_fisher.from_pretrained(tmp_path / 'grey')
    assert again.backbone_weights == grey.backbone_weights
    with pytest.raises(ValueError, match=r'resnet18\.y.* is not of this backbone, test_resnet'):
        timm_fisher.save_pretrained(model, tmp_path / 'x', backbone_id='timm/resnet18.y')
    bare = timm.create_model(f'local-dir:{tmp_path}/adapter')  # random weights
    assert bare.backbone_weights is None


# Edited cards


def made(*sections, **data):
    lines = ''.join(f'{key}: {json.dumps(value)}\n' for key, value in data.items())
    return seal(f'---\n{lines}---\n\n' + '\n\n'.join(sections) + '\n')


def merge(new, old):
    """The merged card, and what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        found = merge_cards(new, old.encode(), 'the card')
    return ModelCard(found), ' '.join(str(each.message) for each in caught)


def parts(card):
    """Its text without the seal."""
    return [part for part in card.text.strip().split('\n\n') if not part.startswith('<!--')]


DATA = {'tags': ['timm', 'avg'], 'library_name': 'timm', 'license': 'mit'}
OLD = made('# old', '## Use\nold', '## Results\n50', base_model='a/old', datasets=['a/b'], **DATA)
NEW = made('# new', '## Use\nold', '## Results\n90', base_model='a/new', **DATA)


def test_merging_again_changes_nothing():
    for old in (
        NEW,
        OLD,
        'no metadata',
        '',
        '---\nlicense: mit\n---\n',
        '---\r\ntags:\r\n- x\r\nnested:\r\n  a: [1, 2]\r\n---\r\nText\r\n',
        '---\nday: 2026-01-02\n---\n## Use\nmine\n## Use\ntwice',
        OLD.replace('# old', '# mine').replace('50', '51\n\n## More\nof it'),
        OLD.replace('## Use\nold', ''),
        OLD.replace('made by timm_fisher: ', 'made by timm_fisher: x'),
    ):
        once = str(merge(NEW, old)[0])
        assert merge_cards(NEW, once.encode(), 'the card') == once
    assert merge_cards(NEW, NEW.encode(), 'the card') == NEW


def test_an_unedited_card_is_replaced():
    assert merge_cards(NEW, OLD.encode(), 'the card') == NEW
    index = [{'name': 'x', 'results': []}]
    old = made('# old', **{**DATA, 'tags': ['trees', 'gem'], 'model-index': index})
    found, warned = merge(NEW, old.replace('tags:', 'language: la\ntags:'))
    assert parts(found) == ['# new', '## Use\nold', '## Results\n90']
    assert found.data.tags == ['trees', 'timm', 'avg']  # 'gem' was the head of the old model
    assert found.data.language == 'la'
    assert found.data.base_model == 'a/new'
    assert 'model-index' not in found.content
    assert not warned


@pytest.mark.parametrize('old', ['', '---\nlicense: apache-2.0\n---\n'])
def test_an_empty_card_is_filled(old):
    found, warned = merge(NEW, old)
    assert parts(found)[0] == '# new'
    assert found.data.license == ('apache-2.0' if old else 'mit')
    assert not warned


def test_edits_stay_and_figures_follow_the_model():
    """Each part by itself: the text around an edited section is that of the new model."""
    old = OLD.replace('## Use\nold', '## Use\nmine\n\n## News\nmore').replace('- a/b', '- a/mine')
    found, warned = merge(NEW, old.replace('license: mit', 'license: cc-by-4.0'))
    expected = ['# new', '## Use\nmine', '## News\nmore', '## Results\n90']
    assert parts(found) == expected
    assert found.data.license == 'cc-by-4.0'
    assert found.data.datasets == ['a/mine']
    assert found.data.base_model == 'a/new'
    assert not warned  # what was made for Use is what it was

    found, warned = merge(NEW, OLD.replace('## Results\n50', '## Results\nabout 50'))
    assert parts(found) == ['# new', '## Use\nold', '## Results\nabout 50']
    assert warned == (
        'the card keeps the edited text of ## Results: see whether it fits this model.'
    )


def test_what_was_taken_out_stays_out():
    old = OLD.replace('## Use\nold\n', '').replace('license: mit\n', '')
    found, _ = merge(NEW, old.replace('base_model: a/old\n', ''))
    assert parts(found) == ['# new', '## Results\n90']
    assert found.data.license is None
    assert found.data.base_model == 'a/new'  # it describes the model


def test_edits_of_the_new_card_count_more():
    """An edited folder is pushed twice: the second edit arrives, too."""
    once = NEW.replace('# new', '# once')
    pushed = str(merge(once, OLD)[0])
    assert parts(ModelCard(pushed))[0] == '# once'
    found, warned = merge(NEW.replace('# new', '# twice'), pushed)
    assert parts(found)[0] == '# twice'
    assert not warned
    assert parts(merge(NEW, pushed)[0])[0] == '# once'

    old = str(ModelCard(OLD)).replace('# old', '## News\nof old')
    for _ in range(3):
        old = str(merge(once, old)[0])
    assert parts(ModelCard(old))[:3] == ['# once', '## News\nof old', '## Use\nold']


def test_edits_of_a_folder_without_seal():
    """Somebody's own text, pushed, changed, and pushed again; then a card that was made."""
    first, second = ('---\nlicense: mit\n---\n# Mine\n\n' + text + '\n' for text in ('a', 'b'))
    pushed = str(merge(second, first)[0])
    assert parts(ModelCard(pushed)) == ['# Mine', 'b']
    assert '<!--' not in pushed
    assert parts(merge(NEW, pushed)[0]) == ['# Mine', 'b']


def test_a_card_that_somebody_wrote():
    """All of its text stays, and its own metadata; what describes the model is added."""
    old = '---\nlicense: cc-by-4.0\nbase_model: a/other\n---\n# Mine\n\n## Results\nsome\n'
    found, warned = merge(NEW, old)
    assert parts(found) == ['# Mine', '## Results\nsome']
    assert (found.data.license, found.data.base_model) == ('cc-by-4.0', 'a/new')
    assert found.data.tags == ['timm', 'avg']
    assert warned.startswith("the card is somebody's own: its text stays")


def test_saving_again_keeps_what_was_written(tmp_path):
    metrics = {'val': {'accuracy': 0.5}, 'dataset': 'Leaves'}
    card(tmp_path, metrics=metrics)
    text = (tmp_path / 'README.md').read_text()
    (tmp_path / 'README.md').write_text(text.replace('## Use', '## News\n\nIt is mine.\n\n## Use'))
    found = card(tmp_path, create('avg'), metrics={'val': {'accuracy': 0.75}, 'dataset': 'Leaves'})
    assert 'It is mine.' in found.text
    assert '| accuracy | 75.00 |' in found.text
    assert '| head | `avg` |' in found.text
    assert '50.00' not in found.text


@pytest.mark.parametrize(
    'old', [b'---\na: [\n---\n', b'---\ntags: [{a: 1}]\n---\n', b'---\n1: a\n---\n', b'\xe9t\xe9']
)
def test_a_card_that_cannot_be_read(old):
    with pytest.raises(ValueError, match=r'^the card has text or metadata that cannot be read'):
        merge_cards(NEW, old, 'the card')
