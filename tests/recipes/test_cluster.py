"""recipes/papers/cluster.py: its measures against slow ones, what chooses a setting, and the command."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import timm
import yaml
from conftest import ROOT, TINY, load_script
from PIL import Image

CONFIGS = sorted(ROOT.glob('recipes/configs/cluster_*.yaml'))


@pytest.fixture(scope='module')
def cluster(recipes):
    return load_script('papers/cluster')


def random_clusters(classes, clusters):
    random = np.random.default_rng(classes + 10 * clusters)
    truth = random.integers(classes, size=60)
    noisy = (truth + random.integers(2, size=60)) % clusters
    return truth, noisy + 7  # the clusters' numbers mean nothing


@pytest.mark.parametrize(('classes', 'clusters'), [(4, 4), (3, 5), (5, 3)])
def test_accuracy_by_the_best_matching(cluster, classes, clusters):
    """Of all one-to-one matchings, tried one by one."""
    truth, found = random_clusters(classes, clusters)
    numbers = [*range(7, 7 + clusters), *[None] * classes]  # a class may go without a cluster
    best = max(
        sum(matching[y] == c for y, c in zip(truth, found, strict=True))
        for matching in set(itertools.permutations(numbers, classes))
    )
    assert cluster.matched_accuracy(truth, found) == best / 60
    assert cluster.matched_accuracy(truth, (truth + 1) % classes) == 1


def test_information_by_the_larger_entropy(cluster):
    truth, found = random_clusters(5, 3)

    def entropy(values):
        return -sum(n / 60 * math.log(n / 60) for n in Counter(values).values())

    pairs = list(zip(truth, found, strict=True))
    information = entropy(truth) + entropy(found) - entropy(pairs)
    assert entropy(truth) > 1.1 * entropy(found)
    expected = information / max(entropy(truth), entropy(found))
    assert cluster.nmi(truth, found) == pytest.approx(expected)


def blobs(count, *, seed):
    """Unit vectors around three axes, and their labels."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    points = np.eye(3)[labels] + 0.05 * random.standard_normal((count, 3))
    return points / np.linalg.norm(points, axis=1, keepdims=True), labels


def test_clusters_that_are_plain(cluster):
    points, labels = blobs(60, seed=0)
    found = cluster.cluster(points, 3, neighbours=25, seed=0)
    assert list(found) == ['kmeans', 'spectral']
    for clusters in found.values():
        assert cluster.matched_accuracy(labels, clusters) == 1
        assert cluster.nmi(labels, clusters) == pytest.approx(1)


def test_test_labels_do_not_choose_C(cluster):
    parts = {name: blobs(30, seed=i) for i, name in enumerate(('train', 'val', 'test'))}
    z, labels = ({name: part[i] for name, part in parts.items()} for i in (0, 1))
    found = cluster.classify(z, labels, 0)
    assert found == {'svm_accuracy': 1.0, 'svm_C': cluster.C_GRID[0]}  # the smallest of equals
    wrong = cluster.classify(z, {**labels, 'test': (labels['test'] + 1) % 3}, 0)
    assert wrong == {'svm_accuracy': 0.0, 'svm_C': cluster.C_GRID[0]}


def test_table(cluster):
    def result(value):
        row = {'dimensions': 7, **dict.fromkeys(cluster.COLUMNS, value)}
        return {
            'clustered': 9, 'splits': ['train', 'test'], 'classes': 3,
            'images': {'train': 5, 'test': 4}, 'rows': {'CNN': row},
        }  # fmt: skip

    text = cluster.table([result(0.5), result(0.7)], [4, 6])
    assert f'| CNN | 7 |{" 60.0 ± 14.1 |" * 5}' in text
    assert '9 images of 3 classes clustered (train + test); 5 train, 4 test images.' in text
    assert 'over seeds 4, 6.' in text


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_configuration_that_is_shipped(cluster, tmp_path, path):
    config = yaml.safe_load(path.read_text())
    assert f'--config recipes/configs/{path.name} ' in path.read_text()
    parsed = cluster.parse(config['train'], 3, tmp_path)
    assert parsed.unsupervised
    assert (parsed.seed, parsed.batch_size) == (3, 256)
    layers = dict(timm.create_model('tf_efficientnet_lite0').named_modules())
    assert set(parsed.stages['finetune'].layers) <= set(layers)


def test_supervised_stage_is_refused(cluster, tmp_path):
    clustering = cluster.Clustering(train={'stages': {'a': {'epochs': 1}}})
    with pytest.raises(ValueError, match='must be unsupervised'):
        cluster.measure(clustering, 0, tmp_path)


def test_model_is_that_of_train(cluster, recipes, tmp_path):
    """All options count."""
    options = {
        'head': 'gsnmf', 'backbone': 'test_vit', 'class_token': 'append', 'drop_rate': 0.3,
        'head_kwargs': {'components': 5, 'updates': 7},
    }  # fmt: skip
    config = cluster.parse(options, 0, tmp_path)
    assert repr(cluster.create(config)) == repr(recipes.train.create_model(config, 0))
    model = cluster.create(config, updates=9)
    assert (model.head_drop.p, model.head.out_features, model.head.updates) == (0.3, 5, 9)


@pytest.fixture
def settings(tmp_path):
    """A YAML file for images of three classes that have no test split."""
    random = np.random.default_rng(0)
    labels = np.arange(90) % 3
    tints = np.array([[70, 70, 200], [70, 200, 70], [200, 70, 70]])[labels]
    pixels = random.normal(tints[:, None, None], 40, (90, 32, 32, 3)).clip(0, 255)
    np.savez(tmp_path / 'images.npz', x=pixels.astype(np.uint8), y=labels)
    stage = {'train': 'backbone', 'unsupervised': True, 'layers': ['layer3'], 'epochs': 1}
    config = {
        'data_dir': str(tmp_path / 'images.npz'),
        'output': str(tmp_path / 'out'),
        'train': {
            **TINY, 'dataset': 'npz', 'cache_dir': str(tmp_path / 'cache'),
            'stages': {'tune': {**stage, 'freeze_bn': True}},
        },
    }  # fmt: skip
    file = tmp_path / 'cluster.yaml'
    file.write_text(yaml.safe_dump(config))
    return file


def check_results(output, components):
    names = ['CNN', 'PCA-CNN', 'NMF-FCN', 'GSNMF-FCN-OTS', 'GSNMF-FCN-FT']
    found = json.loads((output / 'results.json').read_text())['results'][0]
    assert list(found['rows']) == names
    assert found['images'] == {'train': 56, 'test': 23, 'val': 11}
    assert found['clustered'] == 90
    assert [row['dimensions'] for row in found['rows'].values()][1:] == [components] * 4
    assert found['rows']['CNN']['kmeans_accuracy'] > 0.5
    for name, folder in (('NMF-FCN', 's0'), ('GSNMF-FCN-OTS', 's0'), ('GSNMF-FCN-FT', 's0/model')):
        model = timm.create_model(f'local-dir:{output}/{name}/{folder}', pretrained=True)
        assert (model.num_classes, model.head.out_features) == (0, components)
        assert (model.head.l1_penalty == 0) == (name == 'NMF-FCN')


def test_run_leaves_everything(cluster, recipe, settings, tmp_path, monkeypatch, capsys):
    """A data set without a test split is clustered as a whole. Finished seeds are not measured
    again; other settings are refused."""

    def train(options, chosen, seed, folder):
        recipe(**{**options, 'seed': seed, 'output': folder / f's{seed}'})

    monkeypatch.setattr(cluster, 'run', train)
    monkeypatch.setattr(cluster, 'plot', lambda *_: None)  # matplotlib takes longer than the rest

    def start(*options):
        arguments = ['--config', str(settings), '--seeds=[0]']
        monkeypatch.setattr('sys.argv', ['cluster.py', *arguments, *options])
        cluster.main()

    config = yaml.safe_load(settings.read_text())
    config['train']['head_kwargs'] = {'components': 4}
    settings.write_text(yaml.safe_dump(config))
    start()
    check_results(tmp_path / 'out', components=4)
    # The features of the frozen backbone are kept, those of the fine-tuned one are not.
    assert len(list((tmp_path / 'cache').iterdir())) == 3
    monkeypatch.setattr(cluster, 'measure', None)
    capsys.readouterr()
    start()
    assert 'over seeds 0.' in capsys.readouterr().out
    with pytest.raises(ValueError, match='holds results of other settings'):
        start('--neighbours=5')


@pytest.mark.slow
def test_the_command(settings, tmp_path):
    """No more components than training images; another seed goes on where the first one stopped."""
    command = [sys.executable, 'recipes/papers/cluster.py', '--config', str(settings), '--seeds']
    output, kept = tmp_path / 'out', []
    for seeds in ('[0]', '[0, 1]'):
        process = subprocess.run([*command, seeds], cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        check_results(output, components=56)
        kept.append((output / 'results-s0.json').stat().st_mtime_ns)
    assert 'over seeds 0, 1.' in process.stdout
    assert kept[0] == kept[1]
    with Image.open(output / 'tsne.png') as picture:
        picture.verify()
