"""Low-rank changes of a backbone: merged without peft, trained with it, saved as an adapter."""

import copy
import json
import sys

import pytest
import timm
import torch
from hub_server import HubServer, run_python
from safetensors.torch import load_file, save
from saved_models import edit, edit_weights, set_at
from small_models import create, images

import timm_fisher
from timm_fisher.lora import LoRA, is_factor

ALPHA, RANK = 6, 4
LORA = {'r': RANK, 'alpha': ALPHA}
# The first layer, 3 x 3 and 1 x 1 convolutions, linear layers.
TARGETS = {
    'test_resnet': ['conv1.0', 'layer1.0.conv1', 'layer4.0.downsample.1'],
    'test_vit': ['patch_embed.proj', 'attn.qkv', 'mlp.fc1'],
    'test_efficientnet': [],
    'test_convnext': [],
}
BACKBONE = timm.get_pretrained_cfg('test_resnet').hf_hub_id


@pytest.fixture
def peft():
    return pytest.importorskip('peft', reason='needs pip install -e ".[lora]"')


def load(folder, **arguments):
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **arguments).eval()


def with_changes(backbone='test_resnet', **arguments):
    """A model whose factors change what it computes."""
    model = create(backbone, lora={**LORA, 'targets': TARGETS[backbone]}, **arguments)
    generator = torch.Generator().manual_seed(2)
    for name, value in model.state_dict(keep_vars=True).items():
        if name.endswith('lora_B.weight'):
            value.data.normal_(std=0.05, generator=generator)
    return model.eval()


def write_with_factors(folder, backbone='test_resnet'):
    """A saved model with factors that this test has made, without peft; and its plain twin."""
    plain = create(backbone)
    timm_fisher.save_model(plain, folder)
    targets = TARGETS[backbone]
    made = LoRA(RANK, ALPHA, targets).factors(plain.backbone)
    generator = torch.Generator().manual_seed(2)
    factors = {
        f'backbone.{name}': 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in made.items()
    }
    edit(folder, set_at('model_args', 'lora', {**LORA, 'targets': targets}))
    edit_weights(folder, lambda weights: weights.update(factors))
    return plain, factors


@pytest.mark.parametrize('backbone', TARGETS)
def test_factors_are_merged_without_peft(tmp_path, monkeypatch, backbone):
    monkeypatch.setitem(sys.modules, 'peft', None)
    plain, factors = write_with_factors(tmp_path, backbone)
    loaded = load(tmp_path)
    layers = {name.removesuffix('.lora_A.weight') for name in factors if 'lora_A' in name}
    assert len(layers) == len(factors) / 2 >= 3
    before, after = plain.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, value in after.items():
        layer = name.removesuffix('.weight')
        if layer not in layers:
            assert torch.equal(value, before[name]), name
            continue
        a, b = (factors[f'{layer}.lora_{key}.weight'].double() for key in 'AB')
        change = torch.einsum('or,ri...->oi...', b.flatten(1), a) * ALPHA / RANK
        assert change.abs().max() > 0.01
        torch.testing.assert_close(value.double(), before[name] + change, rtol=0, atol=1e-6)


def test_model_without_weights_has_no_factors(tmp_path):
    write_with_factors(tmp_path)
    model = timm.create_model(f'local-dir:{tmp_path}')
    assert not any(map(is_factor, model.state_dict()))
    assert model.lora is None


LAYER = 'backbone.conv1.0'


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda w: w.pop(f'{LAYER}.lora_A.weight'), f'missing {LAYER}.lora_A.weight'),
        (
            lambda w: w.update({f'{LAYER}.lora_B.weight': torch.zeros(16, 5, 1, 1)}),
            r'lora_B.weight is \(16, 5, 1, 1\), not',
        ),
        (
            lambda w: w.update({'backbone.fc.lora_A.weight': torch.zeros(2)}),
            'unexpected backbone.fc.lora_A.weight',
        ),
        (lambda w: w[f'{LAYER}.lora_A.weight'].fill_(float('nan')), 'lora_A.weight holds NaN'),
        (
            lambda w: [w[f'{LAYER}.lora_{key}.weight'].fill_(1e30) for key in 'AB'],
            f'the factors of LoRA make {LAYER}.weight infinite',
        ),
    ],
    ids=['missing', 'another rank', 'unexpected', 'NaN', 'infinite'],
)
def test_factors_are_checked(tmp_path, change, message):
    write_with_factors(tmp_path)
    edit_weights(tmp_path, change)
    with pytest.raises(timm_fisher.LoadError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ('lora', 'message'),
    [
        ({'r': 0}, 'lora is .*, not a table of'),
        ({'r': 4, 'code': 'x'}, 'lora is .*, not a table of'),
        ({'r': 4, 'targets': 'conv1'}, 'lora is .*, not a table of'),
        ({'r': 4, 'targets': ['layer9']}, "'layer9' of lora's targets is no linear layer"),
        ({'r': 4, 'targets': ['\x1b[2J']}, 'lora is .*, not a table of'),
        ({'r': 1024}, 'differences'),
    ],
)
def test_config_is_checked(tmp_path, lora, message):
    write_with_factors(tmp_path)
    edit(tmp_path, set_at('model_args', 'lora', lora))
    with pytest.raises(timm_fisher.LoadError, match=message):
        load(tmp_path)


def test_lora_of_a_saved_model_cannot_be_replaced(tmp_path):
    write_with_factors(tmp_path)
    with pytest.raises(TypeError, match="has no argument 'lora'"):
        load(tmp_path, lora={'r': 2})


def test_other_channels_and_classes(tmp_path):
    """As without factors, those of the first layer included: timm adds up its weights."""
    write_with_factors(tmp_path)
    grey = load(tmp_path, in_chans=1, num_classes=2)
    x = images(channels=1)
    full = load(tmp_path, num_classes=2)
    full.classifier.load_state_dict(grey.classifier.state_dict())
    torch.testing.assert_close(grey(x), full(x.expand(-1, 3, -1, -1)))


def test_missing_peft_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, 'peft', None)
    with pytest.raises(ImportError, match=r'pip install "timm_fisher\[lora\]"'):
        create(lora={})


@pytest.mark.parametrize(
    ('lora', 'error', 'message'),
    [
        ({'rank': 4}, TypeError, "lora has no argument 'rank'.*Arguments: r, alpha, targets"),
        ({'r': 0}, ValueError, 'r of lora is 0; give a whole number from 1 to 1024'),
        ({'r': 2000}, ValueError, 'r of lora is 2000'),
        ({'alpha': 2.5}, ValueError, 'alpha of lora is 2.5; give a whole number'),
        ({'targets': 'conv1'}, ValueError, 'give a list of names'),
        ({'targets': ['conv_dw']}, ValueError, "'conv_dw' of lora's targets"),
        ({'targets': ['pw']}, ValueError, "'pw' of lora's targets"),  # no whole name
    ],
)
def test_mistakes(lora, error, message):
    with pytest.raises(error, match=message):
        create('test_efficientnet', lora=lora)


@pytest.mark.parametrize('backbone', TARGETS)
def test_training_changes_factors_alone(peft, backbone):
    model = create(backbone, lora={'r': 2})
    x = images(size=model.pretrained_cfg['input_size'][1])
    plain = create(backbone)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not is_factor(k)})
    assert torch.equal(model(x), plain(x))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for _ in range(2):  # the gradient of A is zero as long as B is
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    changed = {
        key
        for key, value in model.state_dict().items()
        if key.startswith('backbone.') and not torch.equal(value, before[key])
    }
    factors = {key for key in before if is_factor(key)}
    # Not all: timm starts the last norms of a ResNet's blocks with zeros.
    assert changed <= factors
    assert len(changed) > 10
    model.requires_grad_(False)
    model.requires_grad_(True)
    model.freeze_backbone()
    model.freeze_backbone(False)
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    assert len({key for key in trained if key.startswith('backbone.')}) == len(factors)


@pytest.mark.parametrize('backbone', TARGETS)
def test_merged_and_unmerged_agree(peft, tmp_path, backbone):
    model = with_changes(backbone)
    x = images(size=model.pretrained_cfg['input_size'][1])
    timm_fisher.save_model(model, tmp_path)
    plain = create(backbone)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not is_factor(k)})
    assert (model.forward_features(x) - plain.forward_features(x)).abs().max() > 1e-3
    apart = load(tmp_path, merge_lora=False)
    assert torch.equal(apart(x), model(x))
    assert torch.equal(copy.deepcopy(apart)(x), model(x))
    torch.testing.assert_close(load(tmp_path)(x), model(x), rtol=1e-4, atol=1e-6)
    assert [p.requires_grad for p in apart.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]


def test_size_of_images_and_patches(peft, tmp_path):
    timm_fisher.save_model(with_changes('test_vit'), tmp_path)
    merged, apart = (load(tmp_path, merge_lora=merge, img_size=192) for merge in (True, False))
    x = images(size=192)
    torch.testing.assert_close(merged(x), apart(x), rtol=1e-4, atol=1e-6)
    merged.set_input_size(patch_size=8)
    with pytest.raises(ValueError, match='Patches keep their size beside lora'):
        apart.set_input_size(patch_size=8)
    assert torch.equal(apart(x), load(tmp_path, merge_lora=False, img_size=192)(x))


def test_in_inference_mode(peft):
    with torch.inference_mode():
        model = create('test_resnet', lora={'r': 2})
    model.forward_features(images()).sum().backward()
    assert model.backbone.conv1[0].lora_B.default.weight.grad is not None


def test_stages_can_be_taken_out(peft):
    model = create('test_vit', lora={'r': 2})
    model.prune_intermediate_layers([0], prune_head=False)
    model.requires_grad_(True)
    trained = [name for name, p in model.backbone.named_parameters() if p.requires_grad]
    assert trained
    assert all('.lora_' in name for name in trained)


def test_layer_that_is_not_called_is_refused(peft):
    with torch.device('meta'), pytest.raises(ValueError, match=r"does not call its layer .*\.qkv'"):
        timm_fisher.create_model('beit_base_patch16_224', lora={})
    with torch.device('meta'):
        timm_fisher.create_model('beit_base_patch16_224', lora={'targets': ['fc1', 'fc2']})


PUSH = """
import timm, torch, timm_fisher
from safetensors.torch import save_file
torch.manual_seed(0)
lora = {'r': 4, 'targets': ['conv1', 'conv2']}
model = timm_fisher.create_model('test_resnet', num_classes=3, pretrained=True, lora=lora).eval()
for name, value in model.named_parameters():
    if 'lora_B' in name:
        torch.nn.init.normal_(value, std=0.05)
x = torch.randn(2, 3, 64, 64)
save_file({'x': x, 'logits': model(x).detach()}, FOLDER + '/logits.safetensors')
timm_fisher.push_to_hub(model, 'user/lora')
"""
LOAD = """
import sys, timm, torch, timm_fisher
from safetensors.torch import load_file
expected = load_file(FOLDER + '/logits.safetensors')
apart = timm.create_model('hf-hub:user/lora', pretrained=True, merge_lora=False).eval()
assert torch.equal(apart(expected['x']), expected['logits'])
timm_fisher.save_pretrained(apart, FOLDER + '/again')
sys.modules['peft'] = None
merged = timm.create_model('hf-hub:user/lora', pretrained=True).eval()
torch.testing.assert_close(merged(expected['x']), expected['logits'], rtol=1e-4, atol=1e-6)
timm_fisher.save_pretrained(merged, FOLDER + '/merged')
torch.manual_seed(1)
other = FOLDER + '/other'
timm.models.save_for_hf(timm.create_model('test_resnet'), other, safe_serialization=True)
for name in ('hf-hub:user/lora', f'local-dir:{FOLDER}/again'):
    try:
        timm.create_model(name, pretrained=True, backbone=f'local-dir:{other}')
    except timm_fisher.LoadError as error:
        print(error)
"""


def test_adapter_comes_back_from_the_hub(peft, tmp_path):
    base, place = timm.create_model('test_resnet'), f'FOLDER = {str(tmp_path)!r}\n'
    with HubServer({'hf_writer': 'user'}) as hub:
        hub.create(BACKBONE)
        hub.commit(BACKBONE, {'model.safetensors': save(base.state_dict())})
        done = run_python(hub, place + PUSH, tmp_path, HF_TOKEN='hf_writer')
        assert done.returncode == 0, done.stderr
        files = hub.files('user/lora')
        done = run_python(hub, place + LOAD, tmp_path / 'fresh')
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('are not those that') == 2
    (tmp_path / 'pushed.safetensors').write_bytes(files['model.safetensors'])
    pushed, again = (
        load_file(path)
        for path in (tmp_path / 'pushed.safetensors', tmp_path / 'again' / 'model.safetensors')
    )
    assert pushed.keys() == again.keys()
    assert all(torch.equal(pushed[key], again[key]) for key in pushed)
    assert {key for key in pushed if key.startswith('backbone.')} == set(filter(is_factor, pushed))
    size = len(files['model.safetensors'])
    assert size < 0.2 * len(save(base.state_dict()))
    card = files['README.md'].decode()
    assert 'base_model_relation: adapter' in card
    assert f'({size / 1e6:.3g} MB)' in card
    assert 'factors of LoRA (rank 4)' in card
    merged = json.loads((tmp_path / 'merged' / 'config.json').read_text())
    assert 'lora' not in merged['model_args']
    assert 'base_model_relation: finetune' in (tmp_path / 'merged' / 'README.md').read_text()
