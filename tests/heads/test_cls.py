"""cls gives the class token, and cannot do without one; keywords under `precise`."""

from __future__ import annotations

import pytest
import torch

from timm_fisher import PoolingHead
from timm_fisher.heads.cls import ClassToken
from timm_fisher.numerics.linalg import precise


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_gives_the_class_token(dtype):
    x, token = torch.randn(2, 5, 8, dtype=dtype), torch.randn(2, 8, dtype=dtype)
    assert torch.equal(ClassToken(8)(x, class_token=token), token)
    z, loss = ClassToken(8).forward_with_loss(x, class_token=token)
    assert torch.equal(z, token)
    assert loss == 0


def test_power_l2():
    token = torch.tensor([[4.0, -9.0, 0.0, 12.0]])
    z = ClassToken(4, normalize=True)(torch.zeros(1, 2, 4), class_token=token)
    expected = torch.tensor([[0.4, -0.6, 0.0, 12**0.5 / 5]])
    torch.testing.assert_close(z, expected, atol=1e-5, rtol=1e-5)


def test_needs_a_class_token():
    with pytest.raises(TypeError, match='class_token'):
        ClassToken(8)(torch.randn(2, 5, 8))


def test_keywords_come_in_the_precision_of_the_descriptors():
    class Context(PoolingHead):
        @precise
        def forward(self, x, *, class_token=None, grid=None, mask=None):
            seen.update(class_token=class_token, grid=grid, mask=mask)
            return x.mean(1)

    x, seen = torch.randn(2, 6, 8), {}
    context = {'class_token': x[:, 0].half(), 'grid': (2, 3), 'mask': x[..., 0] > 0}
    for dtype, raised in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        z, _ = Context().forward_with_loss(x.to(dtype), **context)
        assert z.dtype == dtype
        assert seen['class_token'].dtype == raised
        assert seen['grid'] == (2, 3)
        assert seen['mask'].dtype == torch.bool
    Context()(x)
    assert seen == {'class_token': None, 'grid': None, 'mask': None}
