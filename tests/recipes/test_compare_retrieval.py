"""recipes/compare_retrieval.py: what it measures, and on which classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT, TINY, load_script
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize

from timm_fisher.layers import Projection
from timm_fisher.retrieval import evaluate_retrieval
from timm_fisher.training.data import Split
from timm_fisher.training.embeddings import parse_options
from timm_fisher.training.measurements import Measurement
from timm_fisher.training.rows import read_rows


@pytest.fixture(scope='module')
def script():
    return load_script('compare_retrieval')


def test_configuration_that_is_shipped(script):
    config = yaml.safe_load((ROOT / 'recipes/configs/retrieval.yaml').read_text())
    with pytest.raises(ValueError, match='say --data-dir'):
        script.Comparison(**config)
    comparison = script.Comparison(**config, data_dir='x')
    for options in comparison.heads.values():
        stages = parse_options({**comparison.train, **options}).stages.values()
        assert all(stage.loss for stage in stages)


def test_run(script, tmp_path, monkeypatch):
    """Classes of training, validation and test are different ones; the rows are those of vectors
    made here, and of the trained model."""
    random = np.random.default_rng(0)
    y = np.arange(120) % 8
    colours = random.integers(0, 255, (8, 1, 1, 3))
    pixels = random.normal(colours[y], 90, (120, 32, 32, 3)).clip(0, 255)
    np.savez(tmp_path / 'spots.npz', x=pixels.astype(np.uint8), y=y)
    stage = {'train': 'head', 'epochs': 1, 'per_class': 4, 'loss': {'name': 'ProxyAnchorLoss'}}
    comparison = script.Comparison(
        output=str(tmp_path / 'out'), data_dir=str(tmp_path / 'spots.npz'), seeds=[0, 1], size=4,
        whiten=[0.5, 1.0], search={'stages.search.lr': [0.5, 0.25]},
        train={**TINY, 'cache_dir': str(tmp_path / 'cache'), 'stages': {'search': stage}},
    )  # fmt: skip
    launched = []

    def launch(options, folder, log):
        rate = options['stages']['search']['lr']
        launched.append((options['projection'], options['seed'], rate))
        return {
            'best': {'val_recall_at_1': 1 - rate},
            'test': {'recall_at_1': rate, 'map_at_r': options['seed'] / 2},
            'commit': 'abc',
        }

    monkeypatch.setattr(script, 'launch', launch)
    kept = {}
    measure = script.embeddings.head_vectors

    def head_vectors(model, part):
        kept[len(kept)] = measure(model, part)
        return kept[len(kept) - 1]

    monkeypatch.setattr(script.embeddings, 'head_vectors', head_vectors)
    monkeypatch.setattr(script, 'timed', lambda function: (0.6, function()))  # seconds
    script.main(comparison)
    folder = tmp_path / 'out/spots'
    classes = {split: sorted(p.name for p in (folder / split).iterdir()) for split in SPLITS}
    assert classes == {'train': ['0', '1', '2', '3'], 'val': ['4', '5'], 'test': ['6', '7']}
    assert len(list(folder.rglob('*.png'))) == 120
    assert launched == [(4, 0, 0.5), (4, 0, 0.25), (4, 1, 0.25)]

    lines = read_rows(tmp_path / 'out/measurements.jsonl', Measurement)
    assert {line.table for line in lines} == {'retrieval_spots'}
    shares = {(line.row, line.seed): line.shares for line in lines}
    lines = {(line.row, line.seed): line for line in lines}
    vectors = dict(zip(SPLITS, kept.values(), strict=False))  # and again, timed
    labels = torch.arange(30) // 15
    pca = PCA(4, svd_solver='full').fit(vectors['train'])
    width = vectors['test'].shape[1]
    expected = {'avg, full': vectors['test']}
    expected['avg, PCA'] = normalize(pca.transform(vectors['test']))
    for row, x in expected.items():
        found = evaluate_retrieval(torch.from_numpy(x), labels, ks=(1,))
        assert shares[row, 0]['MAP@R'] == pytest.approx(found['map_at_r'], abs=1e-6)
        assert shares[row, 0]['recall@1'] == pytest.approx(found['recall_at_1'], abs=1e-6)
    sizes = {row: line.costs['dimensions'] for (row, _), line in lines.items()}
    assert sizes == {'avg, full': width, 'avg, PCA': 4, 'avg, whitened': 4, 'avg, trained': 4}
    assert lines['avg, full', 0].costs['ms'] == pytest.approx(600 / 30)  # test images
    trained = lines['avg, trained', 1]
    assert trained.shares == {'recall@1': 0.25, 'MAP@R': 0.5}
    assert (trained.settings, trained.commit) == ({'lr': 0.25}, 'abc')
    strength = lines['avg, whitened', 0].settings['power']
    of_validation = {}
    for w in (0.5, 1.0):
        x = pca.transform(vectors['val']) / pca.explained_variance_ ** (w / 2)
        found = evaluate_retrieval(torch.from_numpy(normalize(x)), labels, ks=(1,))
        of_validation[w] = found['map_at_r']
    assert of_validation[strength] == max(of_validation.values())
    # Reported on test images, whatever these would have chosen.
    x = pca.transform(vectors['test']) / pca.explained_variance_ ** (strength / 2)
    found = evaluate_retrieval(torch.from_numpy(normalize(x)), labels, ks=(1,))
    assert shares['avg, whitened', 0]['MAP@R'] == pytest.approx(found['map_at_r'], abs=1e-6)
    assert abs(found['map_at_r'] - of_validation[strength]) > 1e-3
    table = (tmp_path / 'out/table.md').read_text()
    cost = f'{4 * 4 / 1024:#.3g}'
    assert f'| avg, trained | 25.0 ± 0.0 | 25.0 ± 35.4 | 4.00 | {cost} |  | lr 0.25 |' in table

    kept.clear()
    script.main(comparison)
    assert not kept
    comparison.heads['avg'] = {'head': 'gem'}
    with pytest.raises(ValueError, match=r"out/avg' holds results of other settings"):
        script.main(comparison)
    assert (tmp_path / 'out/table.md').read_text() == table


@pytest.fixture
def measure_whitened(script, monkeypatch):
    """The row of vectors that are whitened, from the vectors of each split and their labels."""

    def measure(vectors, labels, **options):
        splits = {split: Split(None, np.arange(len(labels)), labels) for split in SPLITS}
        monkeypatch.setattr(script, 'load_splits', lambda config: (splits, list('abcd')))
        for name in ('create_embedder', 'fit_once'):
            monkeypatch.setattr(script.embeddings, name, lambda *arguments: None)
        monkeypatch.setattr(script.embeddings, 'cache_splits', lambda *arguments: vectors)
        monkeypatch.setattr(script.embeddings, 'head_vectors', lambda model, part: part)
        comparison = script.Comparison(train={'data_dir': 'x'}, **options)
        *_, row = script.measure_frozen('avg', comparison.train, comparison)
        return row

    return measure


def test_strength_is_chosen_on_validation_images(measure_whitened):
    """Where they want little whitening, and test images, whose classes lie along small components,
    want all of it."""
    random = np.random.default_rng(0)
    labels = np.arange(80) % 4
    spread = np.array([0.0, 0.4, 0.2, 0.1, 0.05, 0.01])

    def draw(*axes):
        x = random.normal(size=(80, 6))
        for bit, axis in enumerate(axes):
            x[:, axis] = 2 * (labels >> bit & 1) - 1 + random.normal(0, 0.3, 80)
        return normalize(x * spread + np.eye(6)[0])

    vectors = {'train': draw(), 'val': draw(1, 2), 'test': draw(3, 4)}
    row = measure_whitened(vectors, labels, size=4, whiten=[0.25, 1.0])

    def found(split, strength):
        pca = PCA(4, svd_solver='full').fit(vectors['train'])
        x = normalize(pca.transform(vectors[split]) / pca.explained_variance_ ** (strength / 2))
        return evaluate_retrieval(torch.from_numpy(x), labels.tolist(), ks=(1,))['map_at_r']

    assert found('val', 0.25) > found('val', 1.0) + 0.05
    assert found('test', 1.0) > found('test', 0.25) + 0.05
    assert row.settings == {'power': 0.25}
    assert row.shares['MAP@R'] == pytest.approx(found('test', 0.25), abs=1e-6)


def test_whitening_is_that_of_a_models_projection(measure_whitened):
    """Also of more components than the training vectors have: rounding errors stay small."""
    random = np.random.default_rng(0)
    labels = np.arange(120) % 4
    centres, axes = random.normal(size=(4, 10)), random.normal(size=(10, 48))
    vectors = {
        split: normalize((centres[labels] + random.normal(0, 0.6, (120, 10))) @ axes)
        for split in SPLITS
    }
    row = measure_whitened(vectors, labels, size=32, whiten=[1.0])
    projection = Projection(48, 32)
    projection.fit(torch.from_numpy(vectors['train']).float(), 1.0)
    with torch.no_grad():
        x = F.normalize(projection(torch.from_numpy(vectors['test']).float()))
    found = evaluate_retrieval(x, labels.tolist(), ks=(1,))
    assert row.shares['MAP@R'] == pytest.approx(found['map_at_r'], abs=0.01)
    assert row.shares['MAP@R'] > 0.4


def test_arrays_are_those_of_the_other_recipes(script, tmp_path):
    """Binary images are not black, and floating-point ones are read."""
    x = np.arange(4 * 8 * 8).reshape(4, 8, 8) % 2
    for name, values in (('binary', x.astype(np.uint8)), ('float', x.astype(np.float32))):
        np.savez(tmp_path / f'{name}.npz', x=values, y=range(4))
        script.write_by_classes(tmp_path / f'{name}.npz', tmp_path / name)
        with Image.open(tmp_path / name / 'train/1/00001.png') as image:
            np.testing.assert_array_equal(np.asarray(image), 255 * x[1])
    np.savez(tmp_path / 'split.npz', x_train=x, y_train=range(4))
    with pytest.raises(ValueError, match=r"must hold x and y; it has \['x_train', 'y_train'\]"):
        script.write_by_classes(tmp_path / 'split.npz', tmp_path / 'split')


def test_stage_that_trains_a_classifier_is_refused(script, tmp_path):
    """Its epochs would be compared by something else than what is chosen by."""
    train = {'data_dir': 'x', 'stages': {'a': {'train': 'classifier'}}}
    comparison = script.Comparison(output=str(tmp_path / 'out'), train=train)
    with pytest.raises(ValueError, match="A stage of 'avg' trains a classifier"):
        script.main(comparison)
    assert not (tmp_path / 'out').exists()


def test_no_path_is_made_of_a_class(script, tmp_path):
    """Its name may be anything in the file of somebody."""
    names = np.array(['/tmp/outside', '../../outside', 'a', 'b'])
    np.savez(tmp_path / 'x.npz', x=np.zeros((4, 8, 8, 3), np.uint8), y=names)
    script.write_by_classes(tmp_path / 'x.npz', tmp_path / 'in/images')
    made = sorted(path.relative_to(tmp_path / 'in/images') for path in tmp_path.rglob('*.png'))
    assert list(map(str, made)) == [
        'test/3/00003.png', 'train/0/00001.png', 'train/1/00000.png', 'val/2/00002.png'
    ]  # fmt: skip


SPLITS = ('train', 'val', 'test')
