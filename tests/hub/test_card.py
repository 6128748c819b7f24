"""The card of a saved model: what it says, and how it shows text of somebody else."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from torch.utils.flop_counter import FlopCounterMode

import timm_fisher
from timm_fisher.hub.card import MOST_LABELS_SHOWN, count_macs, make_card
from timm_fisher.hub.readme import BEGIN
from timm_fisher.hub.text import code_block, escape_markdown

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
    loaded = card(tmp_path, metrics=tmp_path / 'metrics.json', label_names=['ash', 'elm|oak'])
    accuracy, balanced = loaded.data.eval_results
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
        '| classes | ash, elm\\|oak |',
    ):
        assert line in loaded.text, line
    assert timm_fisher.heads.gem.__doc__.splitlines()[0] in loaded.text
    assert json.loads((tmp_path / 'metrics.json').read_text()) == METRICS


def test_without_figures_or_classes(tmp_path):
    loaded = card(tmp_path / 'a')
    assert 'No metrics were given when this card was written' in loaded.text
    assert loaded.data.eval_results is None
    assert loaded.data.pipeline_tag == 'image-classification'

    loaded = card(tmp_path / 'b', create(num_classes=0, in_chans=1))
    assert loaded.data.pipeline_tag == 'image-feature-extraction'
    assert 'A feature extractor' in loaded.text
    assert "convert('L')" in loaded.text
    assert 'probabilities' not in loaded.text


def test_card_says_how_the_model_is_built(tmp_path):
    heads = [{'name': 'avg', 'normalize': True}, {'name': 'gmm_fisher', 'components': 2}]
    loaded = card(tmp_path, create(heads, stage=-2))
    assert r'| head | `avg`, stage \-2, normalize True |' in loaded.text
    assert r'| head | `gmm_fisher`, stage \-2, components 2 |' in loaded.text
    assert {'avg', 'gmm_fisher'} < set(loaded.data.tags)


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
    ('backbone', 'head'),
    [('test_resnet', '3g'), *(('test_vit', head) for head in timm_fisher.list_heads())],
)
def test_multiplications_are_those_of_a_real_pass(backbone, head):
    """On the meta device, where the card counts them, attention and heads take other kernels."""
    model = timm_fisher.create_model(backbone, head, num_classes=2)
    size = timm.data.resolve_model_data_config(model)['input_size']
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, *size))
    assert count_macs(model, size) == counter.get_total_flops() // 2
    assert {value.device.type for value in model.state_dict().values()} == {'cpu'}


HUGE = """
import resource, timm_fisher
from timm_fisher.hub.card import count_macs
model = timm_fisher.create_model('test_resnet', '3g', reduce_dim=8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert count_macs(model, (3, 40_000, 40_000)) > 10**12
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_multiplications_for_a_huge_image():
    """19 GB as float32; counted without any of them."""
    done = subprocess.run(
        [sys.executable, '-c', HUGE], capture_output=True, text=True, timeout=120, check=True
    )
    assert int(done.stdout) < 300_000  # KB


def test_multiplications_that_depend_on_values(tmp_path, monkeypatch):
    model = create('avg')
    monkeypatch.setattr(type(model.head), 'forward', lambda self, x: x[:, int(x.sum())])
    assert count_macs(model, (3, 64, 64)) is None
    assert 'GMACs' not in str(card(tmp_path, model))


# Text of somebody else


def test_labels_are_shown_as_they_are(tmp_path):
    labels = ['<script>alert(1)</script>', '[x](http://a) ![y](z) **b** _i_ `c` a|b']
    text = str(card(tmp_path, label_names=labels))
    assert '<script' not in text
    script = '&lt;script&gt;alert(1)&lt;/script&gt;'
    shown = r'\[x\](http://a) !\[y\](z) \*\*b\*\* \_i\_ \`c\` a\|b'
    assert f'| classes | {script}, {shown} |' in text
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['label_names'] == labels


def test_many_labels(tmp_path):
    count = MOST_LABELS_SHOWN + 234
    text = str(card(tmp_path, create(num_classes=count), label_names=['x' * 200] * count))
    assert 'x and 234 more |' in text
    assert text.count('x' * 200) == MOST_LABELS_SHOWN


def test_escaping():
    for text in ('timm_fisher 0.1.0', 't-shirt', 'a_b__c', 'C#, x + y = z (1.5)!'):
        assert escape_markdown(text) == text
    for text in ('# a', '- a', '+ a', '= a', '1. a', '12) a', '_a_', '~a~', '*', '[', '|', '`'):
        assert escape_markdown(text).count('\\') == 1 + (text[0] == text[-1] and len(text) > 1)
    assert escape_markdown('a & <b>') == 'a &amp; &lt;b&gt;'
    assert code_block('a\n```\nb ````', 'bash') == '`````bash\na\n```\nb ````\n`````'


def test_a_command_does_not_leave_its_block(tmp_path):
    command = 'accelerate launch \\\n    --a ```\n<script>alert(1)</script>\n```'
    text = str(card(tmp_path, metrics=METRICS | {'command': command}, card={'commands': ['```']}))
    assert f'\n````bash\n{command}\n````\n' in text
    assert '\n````bash\n```\n````\n' in text


def test_figures_are_shown_as_they_are(tmp_path):
    metrics = METRICS | {
        'dataset': '1. <b>Leaves</b>',
        'best': {'stage': 'a`<i>', 'epoch': 3},
        'seeds': {'[0](x)': 0.5},
        'versions': {'<u>torch': '**1**'},
    }
    loaded = card(tmp_path, metrics=metrics)
    for line in (
        r'1\. &lt;b&gt;Leaves&lt;/b&gt;, test split',
        "the stage `a'<i>`,",
        r'Over seeds \[0\](x), test',
        r'Versions: &lt;u&gt;torch \*\*1\*\*.',
    ):
        assert line in loaded.text, line
    assert loaded.data.eval_results[0].dataset_name == '1. <b>Leaves</b>'


def test_arguments_of_a_head_stay_in_their_row(tmp_path):
    """They may come from the config.json of a model that was downloaded."""
    model = create('gem')
    model._given['head_kwargs'] = {'exponent': 'x |\n\n<script>\x1b[31m\ud800'}
    config = {'model_args': model._model_args, 'pretrained_cfg': {'input_size': [3, 64, 64]}}
    text = make_card(model, config, {})
    assert '| head | `gem`, exponent x \\| &lt;script&gt;\ufffd\\[31m\ufffd |\n' in text


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'dataset_id': 'a/b](c)'}, r'a/b\]\(c\)'),
        ({'repo_id': 'a/<b>'}, '<b>'),
        (
            {'description': f'a {BEGIN} b'},
            'must not hold the comments',
        ),
    ],
)
def test_fields_that_cannot_be(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        card(tmp_path / 'a', card=fields)


def test_backbone_of_a_hostile_name(tmp_path):
    model = create()
    model.backbone_weights = {'hf_hub_id': 'a/b](javascript:x)', 'sha256': None}
    with pytest.raises(ValueError, match='javascript'):
        card(tmp_path / 'a', model)


def test_saving_again_keeps_what_was_written(tmp_path):
    metrics = {'val': {'accuracy': 0.5}, 'dataset': 'Leaves'}
    card(tmp_path, metrics=metrics)
    text = (tmp_path / 'README.md').read_text()
    (tmp_path / 'README.md').write_text(text + '\nIt is mine.\n')
    loaded = card(tmp_path, create('avg'), metrics={'val': {'accuracy': 0.75}, 'dataset': 'Leaves'})
    assert 'It is mine.' in loaded.text
    assert '| accuracy | 75.00 |' in loaded.text
    assert '| head | `avg` |' in loaded.text
    assert '50.00' not in loaded.text
