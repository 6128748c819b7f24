"""`create_model` and `timm.create_model`: arguments, and who takes them."""

from functools import partial

import pytest
import timm
import torch
from small_models import create

import timm_fisher

# Creation


def test_both_ways_to_create_are_the_same():
    arguments = {'backbone': 'test_resnet', 'head': 'sparse_fisher', 'num_classes': 3}
    made = []
    for function in (partial(timm.create_model, 'timm_fisher'), timm_fisher.create_model):
        for of_head in ({'code_dim': 3}, {'head_kwargs': {'code_dim': 3}}):
            torch.manual_seed(0)
            made.append(function(**arguments, **of_head))
    assert timm.is_model('timm_fisher')
    assert made[0].head.dictionary.shape[1] == 3
    for other in made[1:]:
        assert repr(other) == repr(made[0])
        torch.testing.assert_close(other.state_dict(), made[0].state_dict(), rtol=0, atol=0)


def test_none_is_a_value():
    """timm drops what is None from the arguments of a model."""
    for of_head in ({'reduce_dim': None}, {'head_kwargs': {'reduce_dim': None}}):
        model = timm_fisher.create_model('resnet18', 'sparse_fisher', code_dim=2, **of_head)
        assert model.head_hidden_size == 512 * 2


def test_arguments_of_the_head_may_come_both_ways():
    head = create(
        head='sparse_fisher', head_kwargs={'iterations': 4, 'code_dim': 9}, code_dim=3
    ).head
    assert head.iterations == 4
    assert head.dictionary.shape[1] == 3


@pytest.mark.parametrize(
    ('arguments', 'error'),
    [
        ({'head': 'sparse_fisher', 'cod_dim': 3}, "head 'sparse_fisher' .*'cod_dim'.*'code_dim'"),
        (
            {'head': 'avg', 'code_dim': 3},
            "head 'avg' nor .* has an argument 'code_dim'",
        ),
        ({'drop_rat': 0.5}, "'drop_rat'.*'drop_rate'"),
        ({'head_kwargs': {'normalise': True}}, "Head 'avg' has no .*'normalise'.*'normalize'"),
    ],
)
def test_unknown_arguments(arguments, error):
    with pytest.raises(TypeError, match=error):
        create(**arguments)


def test_unknown_argument_of_the_architecture():
    with pytest.raises(TypeError, match=r"Neither .* has an argument 'hed'.*Did you mean 'head'"):
        timm.create_model('timm_fisher', backbone='test_resnet', hed='avg')
    with pytest.raises(TypeError, match="timm_fisher needs the argument 'backbone'"):
        timm.create_model('timm_fisher', head='avg')


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_creation_needs_no_gradient_mode(mode):
    with mode():
        model = timm_fisher.create_model('mobilenetv3_small_050', num_classes=3)
    assert not any('conv_head' in name for name, _ in model.named_parameters())
