"""Heads that are named in one string, from the string to a saved model."""

from __future__ import annotations

import itertools
import json

import pytest
import timm
import torch
from small_models import create, images

import timm_fisher
from timm_fisher import explain
from timm_fisher.specification import parse_heads

TEXT = 'avg + sparse_fisher@-2'
SMALL = {'reduce_dim': 6, 'code_dim': 4}
AS_LIST = [{'name': 'avg', 'normalize': True}, {'name': 'sparse_fisher', 'stage': -2, **SMALL}]


@pytest.mark.parametrize(
    ('text', 'stage', 'expected'),
    [
        ('gem', -1, [('gem', -1, {})]),
        ('gem', -3, [('gem', -3, {})]),
        (' gem @ -2 ', -1, [('gem', -2, {})]),
        ('avg', -1, [('avg', -1, {})]),
        ('avg@-12', -1, [('avg', -12, {})]),
        (TEXT, -1, [('avg', -1, {'normalize': True}), ('sparse_fisher', -2, {})]),
        ('gem+3g@-2', -1, [('gem', -1, {}), ('3g', -2, {})]),
        ('gem + gem', -2, [('gem', -2, {}), ('gem', -2, {})]),
    ],
)
def test_names_and_stages(text, stage, expected):
    assert parse_heads(text, None, stage) == expected


def test_what_is_written_is_read():
    for number in (1, 2, 3):
        for heads in itertools.product(['avg', 'gem@-1', '3g@-2', 'gmm_fisher@-10'], repeat=number):
            parsed = parse_heads('+'.join(heads))
            text = ' + '.join(map(str, parsed))
            assert parse_heads(text) == parsed
            assert text == ' + '.join(heads).replace('gem@-1', 'gem')


@pytest.mark.parametrize(
    ('text', 'head_kwargs', 'expected'),
    [
        ('gem', {'p': 2}, [{'p': 2}]),
        (TEXT, SMALL, [{'normalize': True}, SMALL]),
        ('avg + gem', {'normalize': False, 'p': 2}, [{'normalize': False}, {'p': 2}]),
        ('cls + gem', {}, [{'normalize': True}, {}]),
    ],
)
def test_arguments_go_to_the_head_that_has_them(text, head_kwargs, expected):
    given = dict(head_kwargs)
    assert [head.arguments for head in parse_heads(text, head_kwargs)] == expected
    assert head_kwargs == given


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        ({'head': ''}, ValueError, "A name is missing in head=''"),
        ({'head': 'avg + '}, ValueError, r"A name is missing in head='avg \+ '"),
        ({'head': 'avg + + gem'}, ValueError, r"A name is missing in head='avg \+ \+ gem'"),
        ({'head': '@-2'}, ValueError, "A name is missing in head='@-2'"),
        ({'head': 'agv@-2'}, ValueError, "Unknown head 'agv'. Did you mean .*'avg'"),
        (
            {'head': 'gem + agv'},
            ValueError,
            r"head='gem \+ agv': Unknown head 'agv'. Did you mean .*'avg'",
        ),
        *(
            (
                {'head': f'avg + gem@{stage}'},
                ValueError,
                f"gem@{stage}' has a stage '{stage}' of 'gem', which is not a negative whole",
            )
            for stage in ('', '2', '0', '-0', '-1.5', 'x', '-²', '-2@-3', '-' + '9' * 9)
        ),
        ({'head': TEXT, 'stage': -3}, ValueError, r"sparse_fisher@-2' names a stage, and stage=-3"),
        ({'head': 'gem@-2', 'stage': -2}, ValueError, "'gem@-2' names a stage, and stage=-2"),
        ({'head': 'gem@-9'}, ValueError, 'stage=-9 does not exist'),
        ({'head': TEXT, 'cod_dim': 3}, TypeError, "argument 'cod_dim'. Did you mean 'code_dim'"),
        (
            {'head': TEXT, 'head_kwargs': {'cod_dim': 3}},
            TypeError,
            "sparse_fisher@-2' has an argument 'cod_dim'. Did you mean 'code_dim'",
        ),
        (
            {'head': TEXT, 'normalize': True},
            TypeError,
            r"More than one of .*@-2' has an argument 'normalize'. .*name='avg', normalize=True",
        ),
    ],
)
def test_mistakes(arguments, error, message):
    with pytest.raises(error, match=message):
        create(**arguments)


@pytest.mark.parametrize(
    'build',
    [
        lambda: create(head=TEXT, **SMALL),
        lambda: create(head=TEXT, head_kwargs=SMALL),
        lambda: timm.create_model(
            'timm_fisher', backbone='test_resnet', head=TEXT, head_kwargs=SMALL, num_classes=5
        ).eval(),
    ],
    ids=['direct', 'head_kwargs', 'timm'],
)
def test_model_of_a_string_is_that_of_a_list(build):
    expected, x = create(head=AS_LIST), images()
    torch.manual_seed(0)
    model = build()
    assert repr(model) == repr(expected)
    assert torch.equal(model(x), expected(x))


def test_single_head_on_its_stage():
    model, x = create(head='sparse_fisher@-2', code_dim=3), images()
    expected = create(head='sparse_fisher', stage=-2, code_dim=3)
    assert isinstance(model.forward_features(x), torch.Tensor)
    assert torch.equal(model(x), expected(x))
    assert not create(head='avg@-2').head.normalize


@pytest.mark.parametrize(
    ('head', 'tags', 'rows'),
    [
        (
            TEXT,
            {'avg', 'sparse_fisher'},
            ['`avg`, normalize True |', r'`sparse_fisher`, stage \-2, reduce_dim 6, code_dim 4 |'],
        ),
        (
            'sparse_fisher@-2',
            {'sparse_fisher'},
            [r'`sparse_fisher`, stage \-2, reduce_dim 6, code_dim 4 |'],
        ),
    ],
)
def test_saved_as_it_was_given(tmp_path, head, tags, rows):
    """In config.json and metrics.json; the card shows the heads by their names."""
    model, x = create(head=head, **SMALL), images()
    metrics = {'head': head, 'test': {'accuracy': 0.5}, 'out_features': model.head_hidden_size}
    timm_fisher.save_pretrained(model, tmp_path, metrics=metrics)
    saved = json.loads((tmp_path / 'config.json').read_text())['model_args']
    assert (saved['head'], saved['head_kwargs']) == (head, SMALL)
    assert 'stage' not in saved
    card = (tmp_path / 'README.md').read_text()
    assert tags == {line[2:] for line in card.splitlines() if line in [f'- {t}' for t in tags]}
    assert [line[9:] for line in card.splitlines() if line.startswith('| head |')] == rows
    for loaded in (
        timm_fisher.from_pretrained(tmp_path),
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True),
    ):
        assert torch.equal(loaded.eval()(x), model(x))
        assert loaded._model_args == model._model_args
    with pytest.raises(ValueError, match='metrics are of another model: head is avg there'):
        timm_fisher.save_pretrained(model, tmp_path, metrics={**metrics, 'head': 'avg'})


def test_explained():
    model, x = create(head=TEXT, **SMALL), images()
    heat = explain.explain(model, x)[1]
    assert heat.shape == (2, 64, 64)
    assert torch.equal(heat, explain.explain(create(head=AS_LIST), x)[1])
