"""ep against the authors' published code, and its attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from references import ep
from safetensors.torch import load_file

import timm_fisher
from timm_fisher.heads.ep import EfficientProbing

# float64 inputs, weights, outputs and gradients of the authors' code.
GOLDEN = load_file(Path(__file__).parent.parent / 'golden' / 'attention_parity.safetensors')


def test_equals_the_authors_code():
    head = EfficientProbing(48, queries=6, out_divisor=2).double()
    head.load_state_dict({key: GOLDEN[f'ep.{key}'] for key in ('queries', 'value.weight')})
    x = GOLDEN['ep.input'].clone().requires_grad_()
    out = head(x)
    torch.testing.assert_close(out, GOLDEN['ep.output'], rtol=0, atol=1e-10)
    out.backward(GOLDEN['ep.grad_output'])
    torch.testing.assert_close(x.grad, GOLDEN['ep.grad_input'], rtol=0, atol=1e-10)
    torch.testing.assert_close(head.queries.grad, GOLDEN['ep.grad_queries'], rtol=0, atol=1e-10)


def test_attention():
    head = EfficientProbing(12, queries=4).double()
    x = torch.randn(3, 7, 12, dtype=torch.float64)
    a = head.attention(x)
    assert a.shape == (3, 4, 7)
    for image, weights in zip(x.numpy(), a, strict=True):
        for query, row in zip(head.queries.detach().numpy(), weights, strict=True):
            expected = torch.from_numpy(ep.attention(query, image))
            torch.testing.assert_close(row, expected)
    assert head.half().attention(x.half()).dtype == torch.float16


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        ({}, r'queries=32 does not divide 112 \(= 112 channels / out_divisor=1\)\. Take 28\.'),
        ({'queries': 16, 'out_divisor': 2}, r'queries=16 does not divide 56 \(= 112 .* Take 14\.'),
        ({'out_divisor': 3}, r'out_divisor=3 does not divide 112\. Take 2\.'),
        ({'out_divisor': 500}, r'out_divisor=500 does not divide 112\. Take 112\.'),
    ],
)
def test_what_does_not_divide_is_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        timm_fisher.create_head('ep', 112, **arguments)
