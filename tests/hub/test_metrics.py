"""metrics.json of a saved model: what a card can report, and no path of the machine."""

import json
import re

import pytest
from limits import within

import timm_fisher
from timm_fisher.hub.metrics import check_metrics, read_metrics
from timm_fisher.hub.text import hide_paths

METRICS = {
    'test': {'accuracy': 0.51234, 'balanced_accuracy': 0.4, 'samples': 10},
    'seed': 0,
    'seeds': {'0': 0.51234, '1': 0.6},
    'command': 'accelerate launch \\\n    -m timm_fisher.training --head gem',
    'dataset': 'Leaves',
    'versions': {'torch': '1.2.3'},
    'best': {'stage': 'warmup', 'epoch': 3, 'val_accuracy': 0.5},
    'head': 'gem',
    'out_features': 96,
    'parameters': 372883,
}


@pytest.fixture(scope='module')
def model():
    return timm_fisher.create_model('test_resnet', 'gem', num_classes=2)


def check(metrics, model):
    check_metrics(read_metrics(metrics), model)


def test_what_training_writes(model):
    check(METRICS, model)
    check({'val': {'accuracy': 1, 'loss': 0.5, 'samples': 3}, 'seed': None, 'dataset': None}, model)
    check({}, model)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'test': 0.5}, r"metrics\['test'\] is '0.5', not a table"),
        ({'test': None}, r"metrics\['test'\] is 'None', not a table"),
        ({'val': {'accuracy': 51.2}}, "'accuracy'.* is 51.2, not a .* 0 to"),
        ({'test': {'accuracy': None}}, 'is None, not a number'),
        ({'test': {'accuracy': True}}, 'is True, not a number'),
        ({'test': {'accuracy': float('nan')}}, 'is nan, not a number'),
        ({'test': {'acc': 0.5}}, "no 'accuracy' of 'test' or 'val', only .'best', 'command'"),
        ({'test': {'accuracy': 1, 'samples': '9\n'}}, r"'9\\n', contains the character '\\n'"),
        ({'seeds': [0.5]}, r"metrics\['seeds'\] is '\[0.5\]', not a table"),
        ({'seeds': {'0': 'x'}}, r"\['seeds'\]\['0'\] is 'x', not a number"),
        ({'seeds': {'0\x1b[31m': 0.5}}, r"contains the character '\\x1b'"),
        ({'seeds': {str(i): 0.5 for i in range(101)}}, 'not a table of at most 100 entries'),
        ({'seed': '0\n# x'}, r"contains the character '\\n'"),
        ({'best': {'epoch': '3\n'}}, r"contains the character '\\n'"),
        ({'best': {'stage': 'a\nb'}}, r"contains the character '\\n'"),
        ({'best': 3}, r"\['best'\] is '3', not a table"),
        ({'dataset': 'x' * 201}, 'has 201 characters; at most 200'),
        ({'dataset': '\ud800'}, r"contains the character '\\ud800'"),
        ({'versions': 2}, r"\['versions'\] is '2', not a table"),
        ({'versions': {'a\nb': '2'}}, r"contains the character '\\n'"),
        ({'command': 'x' * 10_001}, 'has 10001 characters; at most 10000'),
        ({'command': 'a\n\x1b]0;b\x07'}, r"contains the character '\\x1b'"),
        ({'head': 'avg'}, 'another model: head is avg there, gem'),
        ({'out_features': 9}, 'out_features is 9 there, 96 here'),
        ({'parameters': 9}, 'parameters is 9 there, 372883 here'),
    ],
)
def test_mistakes(model, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        check(METRICS | change, model)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_without_a_result(model):
    with pytest.raises(ValueError, match=r"no 'accuracy' of 'test' or 'val', only \['acc"):
        check({'accuracy': 0.5}, model)
    with pytest.raises(ValueError, match=r'metrics are \[1\], not a table'):
        check([1], model)


@pytest.mark.parametrize('text', ['{', '[' * 100_000, '{"a": ' + '9' * 5000 + '}', 'x' * 2**20])
def test_metrics_that_are_no_json(tmp_path, text):
    (tmp_path / 'metrics.json').write_text(text)
    with within(10), pytest.raises(ValueError, match=r"metrics\.json' is not readable JSON"):
        read_metrics(tmp_path / 'metrics.json')


def test_metrics_that_cannot_be_json():
    for value in (object(), {'x'}):
        with pytest.raises(ValueError, match='metrics is not readable JSON'):
            read_metrics({'test': value})


PATHS = [  # what a run was given, and what is published
    ('local-dir:/home/me/models/resnet', 'local-dir:resnet'),
    ('local-dir:weights/resnet/', 'local-dir:resnet'),
    ('local-dir:../me/resnet', 'local-dir:resnet'),
    ('local-dir:C:\\Users\\me\\resnet', 'local-dir:resnet'),
    ('local-dir:resnet', 'local-dir:resnet'),
    ('/home/me/data', 'data'),
    ('~/me/data', 'data'),
    ('~root/data', 'data'),
    ('D:/me/data.npz', 'data.npz'),
    ('\\\\server\\me\\data', 'data'),
    ('file:///home/me/data', 'file://data'),
    ('./me/data', 'data'),
    ('../me/data', 'data'),
    ('hfds//home/me/data', 'hfds/data'),
    ('hfds/~/me/data', 'hfds/data'),
    ('hfds/../me/data', 'hfds/data'),
    ('hfds/a/me/data/', 'hfds/data'),
    ('hfds/C:\\me\\data', 'hfds/data'),
    ('hfids/./data', 'hfids/data'),
]
OTHERS = [
    'hf-hub:timm/resnet',
    'https://huggingface.co/home/me',
    'torch/cifar10',
    'hfds/user/na.me',
    'hfds/name',
    'avg + sparse_fisher@-2',
    'a / b',
    '/',
    '1/2',
]


def command(text):
    """As it is published."""
    return read_metrics({'command': text})['command']


@pytest.mark.parametrize(('given', 'published'), [*PATHS, *((text, text) for text in OTHERS)])
def test_of_a_path_the_last_name_stays(given, published):
    for form in (
        '{}', '--backbone {}', '--backbone={}', 'run "{}" x', "run '{}' x", '--config={},x', '({})',
        """run --kwargs '{{"a": ["{}"], "b": 1}}' \\\n    --c {}""", "it's {} isn't it", '{}\n{}',
    ):  # fmt: skip
        assert command(form.format(given, given)) == form.format(published, published)
    metrics = {'backbone': given, 'list': [{'deep': given}], 'command': f'run {given} {given}'}
    assert read_metrics({**metrics, 'n': 1}) == {
        'backbone': published,
        'list': [{'deep': published}],
        'command': f'run {published} {published}',
        'n': 1,
    }


@pytest.mark.parametrize('form', ['of `{}`', 'x 2>{}', '@{}', 'a|{}', '{};b&{}', 'x;{}'])
@pytest.mark.parametrize('path', ['/home/me/data', '/R&D/me;/data', '~/me|you/data'])
def test_paths_between_signs(form, path):
    text = command(form.format(*[path] * form.count('{}')))
    assert not re.search('me|R&D|you|home', text)
    assert 'data' in text


@pytest.mark.parametrize(('given', 'published'), PATHS)
def test_paths_with_spaces(given, published):
    given = given.replace('me', 'me and you')
    for form in ('run "{}"', "run --x '{}' y", """'{{"a": "{}"}}'"""):
        assert command(form.format(given)) == form.format(published)
    assert read_metrics({'dataset': given}) == {'dataset': published}


@pytest.mark.parametrize('path', ['weights/me/x.pth', '/home/me/x.pth', 'x.pth', 'me\\x.pth'])
def test_checkpoints(path):
    """Relative paths that nothing tells apart from other texts, but for their name."""
    for form in (
        '--backbone_kwargs.checkpoint_path {}', '--checkpoint-path={} -x', "--checkpoint_path '{}'",
        """--backbone_kwargs '{{"checkpoint_path": "{}", "depth": 3}}'""", 'f(checkpoint_path={})',
    ):  # fmt: skip
        assert command(form.format(path)) == form.format('x.pth')
    head = [{'name': 'avg', 'checkpoint_path': path, 'n': 3}]
    assert hide_paths({'head': head}) == {'head': [{**head[0], 'checkpoint_path': 'x.pth'}]}
    spaces = '{{"checkpoint_path": "{}", "x": "b/c"}}'
    assert command(spaces.format(f'my {path}')).count('x.pth", "x": "b/c"}') == 1
    assert 'me' not in command(spaces.format(f'my {path}'))


@pytest.mark.parametrize(
    'text', ["'", '"\'', '"/', "'/", '~', 'a', '/', 'a=', '-a', '--', 'hfds/', 'checkpoint_path=']
)
def test_hostile_text_takes_no_time(text):
    with within(10):
        for form in (text * 200_000, f'"{text * 200_000}', f' {text * 200_000} '):
            command(form)


def test_saved_metrics_hold_no_path(tmp_path, model):
    metrics = METRICS | {
        'backbone': f'local-dir:{tmp_path}/weights/x',
        'command': f'accelerate launch recipes/train.py --config {tmp_path}/secret/a.yaml',
    }
    (tmp_path / 'metrics.json').write_text(json.dumps(metrics))
    timm_fisher.save_pretrained(model, tmp_path / 'saved', metrics=tmp_path / 'metrics.json')
    for name in ('metrics.json', 'README.md', 'config.json'):
        text = (tmp_path / 'saved' / name).read_text()
        assert not re.search(f'{re.escape(str(tmp_path))}|secret', text), name
    saved = json.loads((tmp_path / 'saved' / 'metrics.json').read_text())
    assert saved['backbone'] == 'local-dir:x'
    assert '--config a.yaml' in saved['command']
    assert saved['command'] in (tmp_path / 'saved' / 'README.md').read_text()
