"""Heads of others that a saved model could not bring back are named, with their distribution."""

from __future__ import annotations

import pytest
import torch

import timm_fisher

MAKER = "Head 'odd' of the distribution 'maker'"
POOL = """
    import torch
    from timm_fisher import PoolingHead
    class Pool(PoolingHead):
        def __init__(self, in_features, *, scale=1.0):
            super().__init__()
            self.in_features = self.out_features = in_features
            self.scale, self.calls = scale, 0
            {init}
        def fit(self, stream):
            {fit}
        def forward(self, x):
            self.calls += 1
            return {forward}
        def init_table(self):
            self.table.fill_(2.0)
    """


@pytest.fixture
def create(install):
    """`create(init='...', fit='...', forward='...', scale=...)` -> a model with such a head."""

    def create_model(init='pass', fit='pass', forward='x.mean(1)', **arguments):
        source = POOL.format(init=init, fit=fit, forward=forward)
        if 'table' in init:
            source = source.replace('init_table', 'init_non_persistent_buffers')
        install('maker', 'odd', 'maker_odd:Pool', source)
        return timm_fisher.create_model('test_resnet', 'odd', num_classes=3, **arguments)

    return create_model


TABLE = "self.register_buffer('table', torch.full((), 2.0), persistent=False)"


@pytest.mark.parametrize(
    ('init', 'fit', 'forward'),
    [
        ('self.power = 1.0', 'self.power = 2.0', 'x.mean(1) ** self.power'),
        ('self.means = []', 'self.means = [torch.ones(())]', 'x.mean(1) + sum(self.means)'),
        (TABLE, 'self.table.fill_(5.0)', 'x.mean(1) * self.table'),  # not what it is computed from
    ],
)
@pytest.mark.parametrize('several', [False, True])
def test_state_that_is_not_saved(create, tmp_path, init, fit, forward, several):
    """The fit makes it. Several heads are told apart."""
    model = create(init, fit, forward)
    if several:
        heads = [{'name': 'avg'}, {'name': 'odd', 'stage': -2}]
        model = timm_fisher.create_model('test_resnet', heads, num_classes=3)
    model.heads[-1][0].fit(None)
    with pytest.raises(ValueError, match=f'cannot be saved: {MAKER}: Pool made .* another way'):
        timm_fisher.save_model(model, tmp_path / 'new')
    assert not list((tmp_path / 'new').iterdir())


@pytest.mark.parametrize(
    ('init', 'fit', 'forward'),
    [
        ('pass', 'pass', 'x.mean(1)'),
        ('pass', 'pass', 'x.mean(1) + torch.rand(())'),  # nothing can be said of it
        ('pass', 'pass', 'x[:, :4].transpose(1, 2).reshape(len(x), -1)[:, : self.out_features]'),
        (TABLE, 'pass', 'x.mean(1) * self.table'),
        ("self.register_buffer('w', torch.ones(()))", 'self.w.fill_(3.0)', 'x.mean(1) * self.w'),
        ('self.drop = torch.nn.Dropout()', 'pass', 'self.drop(x.mean(1))'),
        ('self.norm = torch.nn.BatchNorm1d(in_features)', 'pass', 'self.norm(x.mean(1))'),
        ('self.half()', 'pass', 'x.mean(1) * float("nan")'),
    ],
)
def test_state_that_is_saved(create, tmp_path, init, fit, forward):
    """It comes back; saving changes neither the model nor what it draws next."""
    model = create(init, fit, forward).train()
    model.head.fit(None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    timm_fisher.save_model(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert type(timm_fisher.from_pretrained(tmp_path).head) is type(model.head)


@pytest.mark.parametrize('persistent', ['persistent=False', None])
def test_tensor_that_is_not_saved(create, tmp_path, persistent):
    init = "self.register_buffer('w', torch.ones(3), persistent=False)"
    model = create(init if persistent else 'self.w = torch.ones(3)')
    with pytest.raises(ValueError, match=f"cannot be saved: {MAKER}: Pool has the tensor 'w'"):
        timm_fisher.save_model(model, tmp_path / 'new')


@pytest.mark.parametrize('several', [False, True])
@pytest.mark.parametrize('scale', [torch.ones(2), {3}, 1j, len])
def test_argument_that_is_no_json(create, tmp_path, scale, several):
    if several:
        create()
        model = timm_fisher.create_model('test_resnet', 'avg + odd@-2', scale=scale, num_classes=3)
    else:
        model = create(scale=scale)
    with pytest.raises(TypeError, match=f'^{MAKER} was given scale=.*cannot be saved as JSON'):
        timm_fisher.save_model(model, tmp_path / 'new')
    assert not list((tmp_path / 'new').iterdir())


def test_constructor_that_does_not_take_back_what_json_makes_of_an_argument(create, tmp_path):
    """A tuple becomes a list."""
    model = create('assert isinstance(scale, tuple), "no tuple"', scale=(1, 2))
    with pytest.raises(ValueError, match=f'cannot be saved: .*{MAKER} cannot be built: .*no tuple'):
        timm_fisher.save_model(model, tmp_path / 'new')
