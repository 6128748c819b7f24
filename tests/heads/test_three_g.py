"""3g and isqrt_cov against the authors' published code, the slow reference and theorem 1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from references import three_g
from safetensors.torch import load_file

import timm_fisher
from timm_fisher.heads.isqrt_cov import ISqrtCov
from timm_fisher.heads.three_g import ThreeG, convert_state_dict, shrunk_root

TRACES = [10.0, 1.0, 1e-2, 1e-4]
# float64 outputs and gradients of the authors' code on random weights and inputs.
GOLDEN = load_file(Path(__file__).parent.parent / 'golden' / 'three_g_parity.safetensors')


def authors_state() -> dict[str, torch.Tensor]:
    return {k.removeprefix('state.'): v for k, v in GOLDEN.items() if k.startswith('state.')}


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize('mode', ['eval', 'train'])
def test_3g_equals_the_authors_code(mode):
    head = ThreeG(48, reduce_dim=32).double()
    ours = {k.removeprefix('head.'): v for k, v in convert_state_dict(authors_state()).items()}
    head.load_state_dict(ours)
    head.train(mode == 'train')
    x = GOLDEN['input'].clone().requires_grad_()
    out = head(x.flatten(2).transpose(1, 2))
    assert_equal(out, GOLDEN[f'{mode}.triangle_lower'])
    out.backward(GOLDEN['grad_output'])
    assert_equal(x.grad, GOLDEN[f'{mode}.grad_input'])
    weight = head.reduce.linear.weight
    assert_equal(weight.grad, GOLDEN[f'{mode}.grad_reduce_weight'].flatten(1))


def test_isqrt_cov_equals_the_authors_code():
    x = GOLDEN['isqrt.input'].clone().requires_grad_()
    out = ISqrtCov(32, reduce_dim=None)(x.flatten(2).transpose(1, 2))
    assert_equal(out, GOLDEN['isqrt.triangle_upper'])
    out.backward(GOLDEN['grad_output'])
    assert_equal(x.grad, GOLDEN['isqrt.grad_input'])


def test_isqrt_cov_is_3g_without_blocks():
    three_g = ThreeG(24, reduce_dim=8, blocks=0)
    isqrt = ISqrtCov(24, reduce_dim=8)
    isqrt.load_state_dict(three_g.state_dict())
    x = torch.randn(2, 20, 24)
    lower, upper = torch.zeros(2, 8, 8), torch.zeros(2, 8, 8)
    with torch.no_grad():
        lower[:, *torch.tril_indices(8, 8)] = three_g(x)
        upper[:, *torch.triu_indices(8, 8)] = isqrt(x)
    torch.testing.assert_close(lower, upper.transpose(1, 2), atol=1e-6, rtol=1e-4)


def test_authors_checkpoint_loads_into_a_model():
    """With DataParallel's prefix, a backbone and a classifier, strictly."""
    model = timm_fisher.create_model('resnet18', head='3g', reduce_dim=32, num_classes=5)
    checkpoint = {f'module.{key}': 0.5 * v for key, v in model.backbone.state_dict().items()}
    state = authors_state()
    state['layer_reduce.weight'] = torch.randn(32, 512, 1, 1, dtype=torch.float64)
    state |= {'fc.weight': torch.randn(5, 528), 'fc.bias': torch.randn(5)}
    checkpoint |= {f'module.{key}': value for key, value in state.items()}
    model.load_state_dict(convert_state_dict(checkpoint), strict=True)
    assert torch.equal(model.classifier.weight, state['fc.weight'])
    assert torch.equal(model.backbone.conv1.weight, checkpoint['module.conv1.weight'])
    assert model.head.blocks[1].scale == state['AtMp2.atmap3.weight'].float()


@pytest.mark.parametrize('number', [7, 60])  # descriptors: fewer and more than the 24 dimensions
@pytest.mark.parametrize('trace', TRACES)
def test_exact_at_any_trace(number, trace):
    """The whole head against the slow float64 reference, as eps gains weight."""
    torch.manual_seed(0)
    head = ThreeG(40, reduce_dim=24, blocks=1).double().eval()
    x = torch.randn(2, number, 40, dtype=torch.float64)
    with torch.no_grad():
        x0 = torch.relu(head.reduce(x))
        now = head.blocks[0](x0, x0).var(1, correction=0).sum(1).mean()
        head.reduce.norm.weight.mul_((trace / now).sqrt())  # near it: the block is not linear
    state = {key: value.double().numpy() for key, value in head.state_dict().items()}
    arguments = {'blocks': 1, 'iterations': 5, 'shrinkage': 1}
    expected = torch.from_numpy(three_g.pool(state, x.numpy(), arguments))
    assert (head(x) - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize('shrinkage', [0.5, 1.0, 3.0])
@pytest.mark.parametrize('number', [5, 12])
def test_shrinkage_is_theorem_1(shrinkage, number):
    """On either side, with repeated eigenvalues among those of a rank-deficient covariance."""
    x = torch.randn(2, number, 8, dtype=torch.float64, requires_grad=True)
    root = shrunk_root(x, shrinkage, 1e-7)
    centred = x - x.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(centred.transpose(1, 2) @ centred / number)
    c = (1 - shrinkage) / (2 * shrinkage)
    values = (c**2 + (values + 1e-7) / shrinkage).sqrt() - c
    torch.testing.assert_close(root, vectors @ values.diag_embed() @ vectors.transpose(1, 2))
    assert torch.autograd.gradcheck(lambda x: shrunk_root(x, shrinkage, 1e-7), x)


def test_shrinkage_gradient_at_equal_eigenvalues():
    """Where that of an eigendecomposition is NaN: covariances that are multiples of I, or 0."""
    x = torch.cat([torch.eye(4), -torch.eye(4)])[None].double()
    for points in (x, 0 * x, x[:, :1]):
        points = points.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: shrunk_root(x, 0.5, 1e-7), points)


def test_a_frozen_head_keeps_its_statistics():
    model = timm_fisher.create_model('test_resnet', head='3g', reduce_dim=8, num_classes=2)
    model.head.requires_grad_(False)
    model.train()
    assert model.backbone.training
    assert not any(module.training for module in model.head.modules())
    model.head.requires_grad_(True)
    assert model.train().head.training
