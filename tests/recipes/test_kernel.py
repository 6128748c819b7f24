"""recipes/papers/kernel.py: what a run leaves, and who chooses its settings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import yaml
from conftest import ENVIRONMENT, ROOT, load_script
from sklearn.datasets import load_digits
from sklearn.preprocessing import normalize

from timm_fisher.training.command_line import parse
from timm_fisher.training.data import load_splits
from timm_fisher.training.embeddings import create_embedder
from timm_fisher.training.measurements import Measurement
from timm_fisher.training.rows import read_rows

CONFIGS = sorted(ROOT.glob('recipes/configs/kernel_*.yaml'))


@pytest.fixture(scope='module')
def kernel():
    return load_script('papers/kernel')


@pytest.fixture
def digits(tmp_path):
    """Four classes of scikit-learn's digits, 120 images, as an .npz file."""
    x, y = load_digits(n_class=4, return_X_y=True)
    path = tmp_path / 'digits.npz'
    np.savez(path, x=(x[:120].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), y=y[:120])
    return path


@pytest.fixture
def run(kernel, digits, tmp_path, monkeypatch):
    """`run(seeds='[0]', ...)` runs the recipe in this process, and returns the output folder."""
    config = {
        'data_dir': str(digits),
        'output': str(tmp_path / 'out'),
        'train': {
            'dataset': 'npz', 'backbone': 'pixels', 'cache_dir': str(tmp_path / 'cache'),
            'backbone_kwargs': {'img_size': 8}, 'workers': 0,
            'head_kwargs': {'hidden': [6, 4], 'squash': False, 'epochs': 5},
        },
        'rbm': {'hidden': [3]}, 'ranks': [5, 30], 'ridges': [0.01, 0.1], 'svm_c': [1.0],
    }  # fmt: skip
    (tmp_path / 'kernel.yaml').write_text(yaml.safe_dump(config))
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)

    def start(**options):
        arguments = [f'--{key}={value}' for key, value in options.items()]
        file = str(tmp_path / 'kernel.yaml')
        kernel.main(parse(kernel.Kernels, arguments=['--config', file, *arguments]))
        return Path(options.get('output', tmp_path / 'out'))

    return start


def read_results(output):
    return [json.loads(path.read_text()) for path in sorted(output.glob('results-s*.json'))]


def test_run_leaves_everything(run, capsys):
    output = run(seeds='[0]')
    for name in ('tsne.png', 'features.png', 'sgd.png'):
        assert (output / name).read_bytes().startswith(b'\x89PNG')
    (result,) = read_results(output)
    rows = result['rows']
    assert list(rows) == ['IDFK', 'DFK', 'FK']
    assert rows['DFK']['svm']['dimensions'] == 64 * 6 + 6 * 4
    assert rows['FK']['1nn']['dimensions'] == 64 * 3
    assert rows['IDFK']['svm']['dimensions'] in (5, 30)
    # Four classes: 25 % by chance.
    assert min(row[key]['accuracy'] for row in rows.values() for key in ('svm', '1nn')) > 0.6
    assert '| IDFK (6 x 4) |' in (output / 'table.md').read_text()
    lines = read_rows(output / 'measurements.jsonl', Measurement)
    assert [line.row for line in lines] == ['IDFK (6 x 4)', 'DFK (6 x 4)', 'FK (3)']
    assert lines[1].shares['1-NN'] == rows['DFK']['1nn']['accuracy']
    capsys.readouterr()

    # Another seed goes on where the first one stopped; other settings are refused.
    before = (output / 'dbm/s0/model.safetensors').stat().st_mtime_ns
    chosen = (output / 'chosen-f0.json').read_text()
    run(seeds='[0, 1]')
    assert (output / 'dbm/s0/model.safetensors').stat().st_mtime_ns == before
    assert (output / 'chosen-f0.json').read_text() == chosen
    again = read_results(output)
    assert [result['seed'] for result in again] == [0, 1]
    assert again[0] == result
    weights = [
        safetensors.torch.load_file(output / f'dbm/s{seed}/model.safetensors') for seed in (0, 1)
    ]
    assert not torch.equal(weights[0]['head.weights.0'], weights[1]['head.weights.0'])
    with pytest.raises(ValueError, match='holds results of other settings'):
        run(svm_c='[2.0]')


def test_saved_model_gives_the_vectors_that_were_measured(kernel, run, digits):
    output = run(seeds='[0]')
    settings = yaml.safe_load((output / 'config.yaml').read_text())
    settings.pop('first_seed')
    kernels = kernel.Kernels(**settings)
    chosen = json.loads((output / 'chosen-f0.json').read_text())['IDFK']['svm']
    model = timm.create_model(f'local-dir:{output}/model', pretrained=True).eval()
    assert model.head.ridge == chosen['ridge']
    with torch.no_grad():
        z = model(torch.from_numpy(np.load(digits)['x'][:, None].astype(np.float32) / 255)).numpy()
    assert z.shape[1] == chosen['rank']
    splits, _ = load_splits(kernels.config(0, 0))
    z = normalize(z[splits['test'].indices] - z[splits['train'].indices].mean(0))
    vectors = kernel.Vectors(kernels, 0, 0, output)
    np.testing.assert_allclose(vectors.get('IDFK', chosen)['test'], z, atol=1e-3)


@pytest.mark.slow
def test_settings_are_chosen_on_validation_images(kernel, run, tmp_path, monkeypatch):
    """Other labels of the test images do not change them."""
    first = run(seeds='[0]')

    def garbled(config):
        splits, classes = load_splits(config)
        splits['test'].labels = (splits['test'].labels + 1) % 4
        return splits, classes

    monkeypatch.setattr(kernel, 'load_splits', garbled)
    second = run(seeds='[0]', output=tmp_path / 'other')
    assert (second / 'chosen-f0.json').read_text() == (first / 'chosen-f0.json').read_text()
    rows = [read_results(path)[0] for path in (first, second)]
    assert rows[1]['rows']['IDFK']['svm']['accuracy'] < 0.3
    assert rows[0]['rows']['IDFK']['svm']['accuracy'] > 0.6


@pytest.mark.slow
def test_folds_choose_for_themselves(run, tmp_path):
    """No validation image of one fold, which other folds test with, has a say in them."""
    file = tmp_path / 'kernel.yaml'
    config = yaml.safe_load(file.read_text())
    config['train']['folds'] = 3
    file.write_text(yaml.safe_dump(config))
    output = run(seeds='[0]')
    results = read_results(output)
    assert [result['fold'] for result in results] == [0, 1, 2]
    assert sum(result['images']['test'] for result in results) == 120
    for fold, result in enumerate(results):
        chosen = json.loads((output / f'chosen-f{fold}.json').read_text())
        assert result['rows']['IDFK']['svm']['ridge'] == chosen['IDFK']['svm']['ridge']
    (line, *_) = read_rows(output / 'measurements.jsonl', Measurement)
    of_folds = [result['rows']['IDFK']['svm']['accuracy'] for result in results]
    assert line.shares['linear SVM'] == pytest.approx(np.mean(of_folds))
    assert 'Folds: 3.' in (output / 'table.md').read_text()


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_configuration_that_is_shipped(kernel, path):
    assert f'recipes/papers/kernel.py --config recipes/configs/{path.name} ' in path.read_text()
    kernels = parse(kernel.Kernels, arguments=['--config', str(path)])
    config = kernels.config(0, 0)
    head = create_embedder(config).head
    rbm = create_embedder(config, **kernels.rbm, whiten=False).head
    assert (
        head.score_features == head.in_features * head.hidden[0] + head.hidden[0] * head.hidden[1]
    )
    assert rbm.out_features == 10 * head.in_features


@pytest.mark.parametrize('option', ['seeds', 'ranks', 'ridges', 'svm_c'])
def test_empty_grid_is_refused(run, option, capsys):
    with pytest.raises(SystemExit):
        run(**{option: '[]'})
    assert f'{option} is []; give one or more' in capsys.readouterr().err
