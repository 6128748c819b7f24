"""What every head keeps, built-in or not: the contract of `PoolingHead`."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import itertools
import json
import math
import re
import time
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from largest_tensor import LargestTensor
from torch import Tensor
from torch.func import functional_call

from timm_fisher import ListStream, PoolingHead, create_head, get_head, list_heads

CHANNELS = 32  # which the default arguments of every head divide, where they must
# Options that change the mathematics are held to the contract too.
OPTIONS = {
    '3g': [{'blocks': 1, 'shrinkage': 0.5}, {'reduce_dim': 8}],
    'avg': [{'normalize': True}],
    'bilinear': [{'reduce_dim': None}, {'normalize': False}],
    'cls': [{'normalize': True}],
    'compact_bilinear': [{'sketch_dim': 5, 'seed': 3}],  # so short that it takes the FFT
    'dbm_idfk': [
        {'hidden': [5, 4], 'rank': None, 'ridge': 0.1},
        {'hidden': [6], 'whiten': False},
    ],
    'deepten': [{'reduce_dim': None, 'codes': 5}],
    'dropcov': [{'reduce_dim': None}, {'reduce_dim': 6}],
    'ep': [{'queries': 4}, {'queries': 2, 'out_divisor': 4}],
    'gem': [{'p': 1.0}],
    'gmm_fisher': [
        {'l2_descriptors': False, 'components': 5},
        {'reduce_dim': None, 'normalize': False},
    ],
    'gsnmf': [
        {'components': 5, 'signed': 'split'},
        {'signed': 'softplus', 'components': 20, 'l2_penalty': 0.0, 'l1_penalty': 0.0},
    ],
    'hscfv': [{'code_dim': 5, 'residual_code_dim': 20, 'reduce_dim': None}],
    'isqrt_cov': [{'reduce_dim': None}, {'reduce_dim': 6}],
    'map': [
        {'latent_len': 3, 'pool_type': 'avg', 'latent_dim': 5, 'norm_layer': 'rmsnorm'},
        {'qk_norm': True, 'q_proj': False, 'num_heads': 4, 'norm_layer': '', 'out_features': 6},
        {'out_features': 0, 'qkv_bias': False},
    ],
    'mpn_cov': [{'reduce_dim': None, 'power': 0.8}, {'log': True}, {'reduce_dim': 6, 'log': True}],
    'netvlad': [{'reduce_dim': None, 'clusters': 5}],
    'salad': [{'clusters': 3, 'cluster_dim': 5, 'token_dim': 7, 'hidden': 9, 'iterations': 1}],
    'simpool': [
        {'gamma': 1.25},
        {'num_heads': 4, 'qk_norm': True, 'qkv_bias': True, 'gamma': 2.0},
    ],
    'smso': [{'features': 20}],
    'sparse_fisher': [{'tied': True}, {'normalize': False}],
}
HEADS = [(name, options) for name in list_heads() for options in [{}, *OPTIONS.get(name, [])]]
WITH_ATTENTION = [head for head in HEADS if hasattr(get_head(head[0]), 'attention')]
INPUTS = {
    'random': lambda x: x,
    'zero': lambda x: 0 * x,
    'constant': lambda x: 0 * x + 1,
    'huge': lambda x: 1e4 * x,
    'tiny': lambda x: 1e-6 * x,
    'dead channel': lambda x: x * (torch.arange(CHANNELS) != 3),
}


def descriptors(
    seed: int = 0, batch: int = 3, number: int = 10, head: PoolingHead | None = None
) -> Tensor:
    """Descriptors of so many images; more of each where a head needs them."""
    number = max(number, getattr(head, 'least_descriptors', 1))
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(99))
    return torch.randn(batch, number, CHANNELS, generator=generator) @ mixing


def fitted(head: tuple[str, dict], dtype: torch.dtype = torch.float32) -> PoolingHead:
    name, options = head
    return copy.deepcopy(_fitted(name, json.dumps(options))).to(dtype)


def context(head: PoolingHead, x: Tensor) -> dict:
    """What a head asks for by its signature, made of its descriptors: the order of these does not
    matter to it, and their gradient goes through it."""
    asked = inspect.signature(head.forward).parameters
    given = {'class_token': x.mean(1) + x.amax(1), 'grid': (1, x.shape[1])}
    return {key: value for key, value in given.items() if key in asked}


def pool(head: PoolingHead, x: Tensor) -> Tensor:
    return head(x, **context(head, x))


def pool_with_loss(head: PoolingHead, x: Tensor) -> tuple[Tensor, Tensor]:
    return head.forward_with_loss(x, **context(head, x))


@cache
def _fitted(name: str, options: str) -> PoolingHead:
    torch.manual_seed(0)
    head = create_head(name, CHANNELS, **json.loads(options))
    x = descriptors(1, batch=20, head=head)
    head.fit(ListStream([x, descriptors(2, batch=20, head=head)]))
    with torch.no_grad():
        for _ in range(20):  # statistics of batch norms
            pool(head, x)
    return head.eval()


def reference(name: str) -> ModuleType:
    module = inspect.getmodule(get_head(name))
    path = Path(__file__).parent.parent / 'references' / f'{module.__name__.rsplit(".")[-1]}.py'
    spec = importlib.util.spec_from_file_location(f'reference_{path.stem}', path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def numpy_state(head: PoolingHead) -> dict:
    return {key: value.double().numpy() for key, value in head.state_dict().items()}


@pytest.mark.parametrize('name', HEADS, ids=str)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shape_and_dtype(name, dtype):
    head = fitted(name)
    x = descriptors(head=head).to(dtype)
    for model, training in itertools.product((head, fitted(name, dtype)), (False, True)):
        model.train(training)
        torch.manual_seed(0)  # of dropout
        out = pool(model, x)
        assert out.shape == (3, head.out_features)
        assert out.dtype == dtype
        torch.manual_seed(0)
        pooled, loss = pool_with_loss(model, x)
        assert torch.equal(pooled, out)
        assert loss.shape == ()


@pytest.mark.parametrize('name', HEADS, ids=str)
def test_order_and_number_of_descriptors_do_not_matter(name):
    head = fitted(name, torch.float64)
    x = descriptors(head=head).double()
    out = pool(head, x)
    torch.testing.assert_close(pool(head, x.flip(1)), out, rtol=1e-9, atol=1e-12)
    if head.least_descriptors == 1:  # otherwise their number means something to the head
        torch.testing.assert_close(pool(head, x.repeat(1, 3, 1)), out, rtol=1e-9, atol=1e-12)
    # Images do not see one another.
    torch.testing.assert_close(pool(head, x[1:2]), out[1:2], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(out[0], out[1])


@pytest.mark.parametrize('name', HEADS, ids=str)
def test_gradient_reaches_everything(name):
    """In evaluation or in training, whose dropout may have parameters of its own."""
    head = fitted(name)
    x = descriptors(head=head).requires_grad_()
    for training in (False, True):
        pooled, loss = pool_with_loss(head.train(training), x)
        (pooled * torch.randn_like(pooled)).sum().add(loss).backward()
    assert x.grad.abs().sum() > 0
    for key, parameter in head.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize('name', HEADS, ids=str)
def test_gradient_is_right(name):
    # A smooth point: soft thresholds and the like are differentiable almost everywhere.
    head = fitted(name, torch.float64)
    x = descriptors(batch=1, number=3, head=head).double().requires_grad_()
    keys = [key for key, _ in head.named_parameters()]

    def call(x, *values):
        state = dict(zip(keys, values, strict=True))
        return functional_call(head, state, (x,), context(head, x))

    inputs = (x, *head.parameters())
    assert torch.autograd.gradcheck(call, inputs, eps=1e-7, atol=1e-4, rtol=1e-3, fast_mode=True)


@pytest.mark.parametrize('name', HEADS, ids=str)
@pytest.mark.parametrize('case', [*INPUTS, 'fewest descriptors'])
def test_degenerate_inputs_stay_finite(name, case):
    for autocast, training in itertools.product([False, True], repeat=2):
        check_finite(fitted(name).train(training), case, autocast)


def check_finite(head, case, autocast):
    x = descriptors(head=head)
    x = INPUTS[case](x) if case in INPUTS else x[:, : head.least_descriptors]
    x = x.requires_grad_()
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        pooled, loss = pool_with_loss(head, x.bfloat16() if autocast else x)
        total = pooled.float().pow(2).sum() + pooled.float().sum() + loss
    total.backward()
    assert torch.isfinite(pooled).all()
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()
    for key, parameter in head.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize('name', HEADS, ids=str)
@pytest.mark.parametrize('autocast', [False, True])
def test_dead_component_stays_finite(name, autocast):
    """The first atom, cluster, Gaussian or channel of each parameter is zero in all respects."""
    head = fitted(name)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.ndim:
                parameter[0] = 0.0
        if hasattr(head, 'log_weights'):
            head.log_weights[0] = -1e4
    x = descriptors(head=head).requires_grad_()
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        pooled, loss = pool_with_loss(head, x.bfloat16() if autocast else x)
        total = pooled.float().pow(2).sum() + pooled.float().sum() + loss
    total.backward()
    assert torch.isfinite(pooled).all()
    for tensor in (x, *head.parameters()):
        assert tensor.grad is None or torch.isfinite(tensor.grad).all()


@pytest.mark.parametrize('name', HEADS, ids=str)
def test_autocast_does_not_touch_the_mathematics(name):
    head = fitted(name)
    x = descriptors(head=head)
    with torch.autocast('cpu', torch.bfloat16):
        pooled = pool(head, x)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, pool(head, x))


@pytest.mark.parametrize('name', HEADS, ids=str)
@pytest.mark.parametrize('case', ['random', 'constant', 'zero', 'tiny', 'huge'])
def test_fit_is_finite_and_repeatable(name, case):
    def fit():
        torch.manual_seed(0)
        head = create_head(name[0], CHANNELS, **name[1])
        head.fit(ListStream([INPUTS[case](descriptors(1, batch=20, head=head))]))
        return head

    first, second = fit().state_dict(), fit().state_dict()
    for key, value in first.items():
        assert torch.isfinite(value).all(), key
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize('name', HEADS, ids=str)
def test_no_pooled_vector_per_descriptor(name):
    """Neither forward nor backward builds `[B, N, K, D]`: one output for each descriptor."""
    head = fitted(name)
    own = max((tensor.numel() for tensor in head.state_dict().values()), default=0)
    x = descriptors(batch=2, number=5 * CHANNELS, head=head).requires_grad_()
    with LargestTensor() as largest:
        pool(head, x).sum().backward()
    per_descriptor = x[..., 0].numel() * head.out_features
    assert largest.elements <= max(2 * x.numel(), per_descriptor // 4, own)


@pytest.mark.parametrize('name', WITH_ATTENTION, ids=str)
@pytest.mark.parametrize('case', INPUTS)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_attention_is_of_each_descriptor(name, case, dtype):
    """Not negative, and in another order for descriptors in another order."""
    head = fitted(name)
    x = INPUTS[case](descriptors(head=head)).to(dtype)
    with torch.autocast('cpu', torch.bfloat16):
        weights = head.attention(x)
    assert weights.ndim == 3
    assert (len(weights), weights.shape[2]) == x.shape[:2]
    assert weights.dtype == dtype
    assert weights.isfinite().all()
    assert weights.min() >= 0
    assert weights.max() > 0
    torch.testing.assert_close(head.attention(x.flip(1)), weights.flip(2))


@pytest.mark.parametrize('name', HEADS, ids=str)
def test_state_dict_is_the_head(name):
    head = fitted(name)
    torch.manual_seed(1)
    other = create_head(name[0], CHANNELS, **name[1]).eval()
    other.load_state_dict(head.state_dict(), strict=True)
    x = descriptors(head=head)
    assert torch.equal(pool(other, x), pool(head, x))


@pytest.mark.parametrize('name', HEADS, ids=str)
def test_from_meta(name):
    """As transformers loads: built without memory, then weights, then what is derived."""
    head = fitted(name)
    with torch.device('meta'):
        empty = create_head(name[0], CHANNELS, **name[1]).eval()
    empty.to_empty(device='cpu')
    derived = dict(empty.named_buffers()).keys() - empty.state_dict().keys()
    for key in derived:
        empty.get_buffer(key).zero_()
    empty.load_state_dict(head.state_dict(), strict=True)
    for module in empty.modules():
        if hasattr(module, 'init_non_persistent_buffers'):
            module.init_non_persistent_buffers()
    x = descriptors(head=head)
    assert torch.equal(pool(empty, x), pool(head, x))


@pytest.mark.parametrize('name', HEADS, ids=str)
def test_no_weight_decay_names_parameters(name):
    head = create_head(name[0], CHANNELS, **name[1])
    assert head.no_weight_decay() <= dict(head.named_parameters()).keys()


@pytest.mark.parametrize('name', HEADS, ids=str)
def test_project_keeps_a_feasible_head(name):
    head = fitted(name)
    before = {key: value.clone() for key, value in head.state_dict().items()}
    head.project_()
    for key, value in head.state_dict().items():
        torch.testing.assert_close(value, before[key])


@pytest.mark.parametrize('name', HEADS, ids=str)
def test_equals_reference(name):
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(get_head(name[0])).parameters.items()
        if key != 'in_features'
    }
    arguments = defaults | name[1]
    head = fitted(name, torch.float64)
    x = descriptors(head=head).double()
    asked = {key: np.asarray(value) for key, value in context(head, x).items()}
    rows = reference(name[0]).pool(numpy_state(head), x.numpy(), arguments, **asked)
    expected = torch.from_numpy(rows)
    # The floors of roots and powers show in entries that are near zero.
    has_root = name[0] in ('compact_bilinear', 'hscfv') or arguments.get('normalize')
    share = 5e-4 if has_root else 1e-5 if name[0] in ('gem', 'smso') else 1e-7
    largest = expected.abs().max().item()
    torch.testing.assert_close(pool(head, x), expected, rtol=share, atol=share * largest)


# Limits of arguments


def numbers(name: str) -> list[inspect.Parameter]:
    """The arguments of a head that are numbers, or None."""
    return [
        parameter
        for parameter in inspect.signature(get_head(name)).parameters.values()
        if not isinstance(parameter.default, str | bool | tuple | list | type)
    ]


NUMBERS = [(name, parameter) for name in list_heads() for parameter in numbers(name)]


@pytest.mark.parametrize(('name', 'parameter'), NUMBERS, ids=str)
def test_numbers_out_of_range_are_named(name, parameter):
    values = [-1, 10**30, -0.5, math.nan, math.inf, -math.inf, True, '3', [3], {}]
    for wrong in values if 'None' in parameter.annotation else [*values, None]:
        said = rf'{name} takes {parameter.name} from .*, got {re.escape(repr(wrong))}\.$'
        with pytest.raises(ValueError, match=said):
            create_head(name, CHANNELS, **{parameter.name: wrong})


@pytest.mark.parametrize('name', list_heads())
def test_flags_are_true_or_false(name):
    """'false' in a saved config would count as true."""
    for parameter in inspect.signature(get_head(name)).parameters.values():
        if isinstance(parameter.default, bool):
            said = rf'takes {parameter.name}=True or {parameter.name}=False, not .*'
            for wrong in ('false', 0, 1.0, None):
                with pytest.raises(TypeError, match=f"{said}{wrong}'?\\.$"):
                    create_head(name, CHANNELS, **{parameter.name: wrong})


@pytest.mark.parametrize('name', list_heads())
def test_largest_head_is_built_at_once(name):
    """What a downloaded config may ask for takes no time, and on the meta device no memory."""
    start = time.perf_counter()
    with torch.device('meta'):
        largest = {'hidden': [65_536, 65_536]} if name == 'dbm_idfk' else {}
        for parameter in numbers(name):
            for most in (64, 1000, 65_536):
                with contextlib.suppress(ValueError):  # beyond the limit of this one
                    create_head(name, 1280, **{parameter.name: most})
                    largest[parameter.name] = most
        head = create_head(name, 1280, **largest)
        pool(head, torch.empty(2, max(3, head.least_descriptors), 1280))
    assert time.perf_counter() - start < 30


def test_a_head_without_forward_says_so():
    with pytest.raises(NotImplementedError, match=r'PoolingHead must define forward\(\)'):
        PoolingHead()(descriptors())
