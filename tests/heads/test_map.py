"""map against timm's AttentionPoolLatent, whose weights it holds."""

from __future__ import annotations

import pytest
import torch
from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import VisionTransformer
from timm_pool import check_equals_timm

import timm_fisher
from timm_fisher.heads.map import LatentAttention

CASES = [
    {},
    {'num_heads': 3, 'norm_layer': '', 'act_layer': 'silu', 'qkv_bias': False},
    {'qk_norm': True, 'norm_layer': 'rmsnorm'},
    {'qk_norm': True, 'norm_layer': ''},
    {'latent_len': 3, 'pool_type': 'avg', 'latent_dim': 5, 'mlp_ratio': 1.5},
    {'latent_len': 3, 'q_proj': False, 'out_features': 7},
    {'out_features': 0, 'act_layer': 'gelu_tanh'},
]


def made(**arguments) -> LatentAttention:
    torch.manual_seed(0)
    return LatentAttention(24, **arguments)


@pytest.mark.parametrize('arguments', CASES, ids=str)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_equals_timm(arguments, dtype):
    """Output and gradients, of timm's own module with the same weights."""
    head = made(**arguments).to(dtype)
    assert type(head.pool) is AttentionPoolLatent
    check_equals_timm(head, dtype)


def test_takes_the_pool_of_timms_vision_transformers():
    sizes = {'img_size': 32, 'embed_dim': 24, 'depth': 1, 'num_heads': 4, 'class_token': False}
    theirs = VisionTransformer(global_pool='map', num_classes=0, **sizes).attn_pool
    head = made(num_heads=4)
    head.pool.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 24)
    torch.testing.assert_close(head(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('arguments', [{}, {'qk_norm': True}, {'latent_len': 2}], ids=str)
def test_attention_is_what_timm_multiplies_the_values_with(arguments):
    """Without projection, values that are one channel of the descriptors give its weighted mean."""
    head = made(num_heads=4, out_features=0, pool_type='avg', **arguments).double()
    x = torch.randn(3, 7, 24, dtype=torch.float64)
    a = head.attention(x)
    latents = arguments.get('latent_len', 1)
    assert a.shape == (3, 4 * latents, 7)
    torch.testing.assert_close(a.sum(2), torch.ones(3, 4 * latents).double())
    with torch.no_grad():
        head.pool.kv.weight[24:] = torch.eye(24)
        head.pool.kv.bias[24:] = 0
    means = (a @ x).unflatten(1, (latents, 4)).mean(1)  # each head reads its own channels
    expected = torch.cat([means[:, h, 6 * h : 6 * h + 6] for h in range(4)], 1)
    torch.testing.assert_close(head.pool(x), expected)
    assert head.half().attention(x.half()).dtype == torch.float16


def test_drop_is_of_training_alone():
    head, x = made(drop=0.5).eval(), torch.randn(2, 5, 24)
    assert torch.equal(head(x), head(x))
    head.train()
    assert not torch.equal(head(x), head(x))


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        ({'num_heads': 5}, 'num_heads=5 does not divide 24'),
        ({'q_proj': False, 'latent_dim': 7}, 'latent_dim must be 24, the number of channels, or'),
        ({'pool_type': 'max'}, "map takes pool_type as one of 'token', 'avg', got 'max'"),
        ({'norm_layer': 'batchnorm'}, "one of 'layernorm', 'rmsnorm', '', got 'batchnorm'"),
        ({'act_layer': 3}, "one of 'gelu', 'gelu_tanh', 'relu', 'silu', got 3"),
    ],
)
def test_what_does_not_fit_is_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        timm_fisher.create_head('map', 24, **arguments)
