"""Local descriptors of every timm architecture: small models of every other family here, of each
family and then all of them with `pytest -m slow`."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
from conftest import load_script

from timm_fisher import PooledModel
from timm_fisher.backbone import is_ours

# The quickest of each family on the meta device, as of timm 1.0.31.
FAMILIES = """
beit_base_patch16_384 botnet26t_256 test_byobnet cait_xxs24_384 coat_lite_tiny convit_base
convmixer_1024_20_ks9_p14 test_convnext3 cpubone_nano crossvit_9_240 csatv2 darknet17 cspnext_tiny
davit_tiny deepseek_vit_412m_align deit_base_distilled_patch16_224 densenetblur121d dla34 dpn48b
edgenext_xx_small efficientformer_l1 efficientformerv2_s0 test_efficientnet efficientvim_m2_dist
efficientvit_b0 efficientvit_m2 eva02_tiny_patch14_336 fasternet_t2 fastvit_t8 focalnet_tiny_srf
gcvit_xxtiny gemma4_vit_570m_enc ghostnet_130 hardcorenas_a hgnet_tiny hiera_tiny_224
sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3
inception_v4 lcnetv2_small levit_384_s8 lowformer_e1 test_mambaout test_coatnet convformer_s18
resmlp_12_224 tf_mobilenetv3_small_minimal_100 mobilenetv5_base mobilevitv2_100 mvitv2_tiny
naflexvit_base_patch16_radio_v3 nasnetalarge nest_tiny_jx nextvit_small test_nfnet
pit_ti_distilled_224 pnasnet5large pvt_v2_b1 qwen3_vit_88m_enc rdnet_tiny regnetx_002
repghostnet_050 repvit_m1_1 res2net50_48w_2s resnest14d resnet10t resnetv2_18 rexnetr_200
selecsls42 legacy_seresnet18 shvit_s2 skresnet18 starnet_s050 swiftformer_xs
swin_tiny_patch4_window7_224 swinv2_tiny_window16_256 swinv2_cr_tiny_224 tiny_vit_21m_224
tnt_s_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny test_vit vit_base_mci_224
test_vit_relpos samvit_base_patch16 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim
legacy_xception xception41p xcit_tiny_12_p16_224
""".split()
LARGE = ('gemma4_vit_570m_enc', 'nasnetalarge')
SLOW_ON_META = ['sequencer2d_s']  # a Python loop over LSTM steps
# Known counts, written down by hand: input side / stride, squared, without class tokens.
GRIDS = {
    'resnet10t': 6 * 6,  # NCHW, input 176
    'swin_tiny_patch4_window7_224': 7 * 7,  # NHWC
    'test_vit': 10 * 10,  # a class token
    'deit_base_distilled_patch16_224': 14 * 14,  # class and distillation token
    'cait_xxs24_384': 24 * 24,
    'xcit_tiny_12_p16_224': 14 * 14,
    'volo_d1_224': 14 * 14,  # a class token that num_prefix_tokens does not tell
    'coat_lite_tiny': 7 * 7,  # the same
    'pit_ti_distilled_224': 7 * 7,  # forward_features gives class tokens alone
    'crossvit_9_240': 14 * 14,  # forward_features gives a list; the coarse branch is 224 px
    'coat_tiny': 7 * 7,
    'efficientvim_m1': 4 * 4,
    'gemma4_vit_570m_enc': 48 * 48,  # forward_intermediates cannot run on meta
}


@pytest.fixture(scope='module')
def sweep():
    return load_script('maintenance/sweep_backbones')


@pytest.mark.parametrize(
    'name',
    [
        name if i % 4 == 1 and name not in LARGE else pytest.param(name, marks=pytest.mark.slow)
        for i, name in enumerate(FAMILIES)
    ],
)
def test_family(sweep, name):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        sweep.try_backbone(name)


@pytest.mark.parametrize('name', GRIDS)
def test_number_of_descriptors_is_the_grids(name):
    with torch.device('meta'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = PooledModel(name, num_classes=2)
        size = timm.models.get_model_input_config(model.backbone)['input_size']
        (descriptors,) = model.descriptors([model.forward_features(torch.empty(2, *size))])
    assert descriptors.shape == (2, GRIDS[name], model.num_features)


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'swin_tiny_patch4_window7_224'])
def test_descriptors_are_where_the_image_says(name):
    """What changes in one corner of the image changes the descriptors of that corner most."""
    torch.manual_seed(0)
    model = PooledModel(name, num_classes=2).eval()
    size = timm.models.get_model_input_config(model.backbone)['input_size']
    image = torch.randn(1, *size)
    changed = image.clone()
    changed[..., :16, :16] += 1
    with torch.no_grad():
        before, after = (
            model.descriptors([model.forward_features(x)])[0] for x in (image, changed)
        )
    assert (after - before).norm(dim=2)[0].argmax() == 0


@pytest.mark.parametrize('name', ['crossvit_9_240', 'test_vit', 'mobilenetv3_small_050', 'vgg11'])
@pytest.mark.parametrize('stage', [-1, -2])
def test_every_trained_parameter_gets_a_gradient(name, stage):
    """Or DDP would stop: whole modules behind the pool, and lone parameters, must be out."""
    with torch.device('meta'):
        model = PooledModel(name, num_classes=2, stage=stage).requires_grad_(False)
        model.requires_grad_(True)
        size = timm.models.get_model_input_config(model.backbone)['input_size']
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.autograd.grad(model(torch.empty(2, *size)).sum(), trained)


@pytest.mark.slow
@pytest.mark.parametrize('name', SLOW_ON_META)
def test_slow_family(sweep, name):
    sweep.try_backbone(name)


@pytest.mark.slow
def test_every_family_is_here():
    shown = {timm.models.model_entrypoint(name).__module__ for name in FAMILIES + SLOW_ON_META}
    known = {timm.models.model_entrypoint(name).__module__ for name in timm.list_models()}
    assert {module for module in known if module.startswith('timm.')} - shown == set()


@pytest.mark.slow
def test_every_architecture(sweep):
    refused = {}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for name in timm.list_models():
            if not is_ours(name):
                try:
                    sweep.try_backbone(name)
                except Exception as error:
                    refused[name] = repr(error)
    assert refused == {}
