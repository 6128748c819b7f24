"""recipes/papers/cluster.py: what a run leaves, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import yaml
from conftest import ENVIRONMENT, ROOT, TINY, load_script
from PIL import Image

from timm_fisher.training.command_line import parse
from timm_fisher.training.embeddings import parse_options
from timm_fisher.training.measurements import table_of
from timm_fisher.training.run import train

CONFIGS = sorted(ROOT.glob('recipes/configs/cluster_*.yaml'))


@pytest.fixture(scope='module')
def cluster():
    return load_script('papers/cluster')


def test_table(cluster):
    def result(seed, value):
        row = {'dimensions': 7, **dict.fromkeys(cluster.COLUMNS, value)}
        return {
            'seed': seed, 'data': 'leaves.npz', 'commit': 'abc',
            'clustered': 9, 'splits': ['train', 'test'], 'classes': 3,
            'images': {'train': 5, 'test': 4}, 'rows': {'CNN': row},
        }  # fmt: skip

    paper = {'CNN': {'linear SVM': 46.7}}
    lines = cluster.measurements([result(4, 0.5), result(6, 0.7)], paper)
    assert {line.table for line in lines} == {'cluster_leaves'}
    text = table_of(lines)
    assert f'| CNN |{" 60.0 ± 14.1 |" * 5} 46.7 |' in text
    assert 'over seeds 4, 6.' in text
    text = cluster.describe(result(4, 0.5))
    assert text == '9 images of 3 classes clustered (train + test); 5 train, 4 test images.'


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_configuration_that_is_shipped(cluster, path):
    assert f'recipes/papers/cluster.py --config recipes/configs/{path.name} ' in path.read_text()
    config = parse_options(parse(cluster.Clustering, arguments=['--config', str(path)]).train)
    assert config.unsupervised
    assert (config.head, config.batch_size) == ('gsnmf', 256)
    layers = dict(timm.create_model('tf_efficientnet_lite0').named_modules())
    assert set(config.stages['finetune'].layers) <= set(layers)


def test_supervised_stage_is_refused(cluster, tmp_path):
    clustering = cluster.Clustering(train={'stages': {'a': {'epochs': 1}}})
    with pytest.raises(ValueError, match='must be unsupervised'):
        cluster.measure(clustering, 0, tmp_path)


@pytest.mark.parametrize('seeds', [[], [1, 1]])
def test_seeds_must_differ(cluster, seeds):
    with pytest.raises(ValueError, match=r'seeds is \[.*\]; give one or more, all different'):
        cluster.Clustering(seeds=seeds)


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
        'clustered': 'all',
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
    result = json.loads((output / 'results-s0.json').read_text())
    assert list(result['rows']) == names
    assert result['images'] == {'train': 56, 'test': 23, 'val': 11}
    assert result['clustered'] == 90
    assert [row['dimensions'] for row in result['rows'].values()][1:] == [components] * 4
    assert result['rows']['CNN']['kmeans_accuracy'] > 0.5
    for name, folder in (('NMF-FCN', 's0'), ('GSNMF-FCN-OTS', 's0'), ('GSNMF-FCN-FT', 's0/model')):
        model = timm.create_model(f'local-dir:{output}/{name}/{folder}', pretrained=True)
        assert (model.num_classes, model.head.out_features) == (0, components)
        assert (model.head.l1_penalty == 0) == (name == 'NMF-FCN')


def test_run_leaves_everything(cluster, settings, tmp_path, monkeypatch, capsys):
    """All images are clustered. Finished seeds are not measured
    again; other settings are refused."""

    def train_here(options, folder, log):
        assert log == Path(f'{folder}.log')
        train(parse_options({**options, 'output': str(folder)}))

    def start(*options):
        arguments = ['--config', str(settings), '--seeds=[0]', *options]
        cluster.main(parse(cluster.Clustering, arguments=arguments))

    monkeypatch.setattr(cluster, 'launch', train_here)
    monkeypatch.setattr(cluster, 'plot_tsne', lambda *_: None)  # takes longer than the rest
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
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
    assert 'In %, of seed 0.' in capsys.readouterr().out
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
