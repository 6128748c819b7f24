"""recipes/maintenance/release.py: it makes a folder from images, and refuses what does not hold."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import timm
import torch
import yaml
from conftest import TINY, load_script, write_images
from huggingface_hub import ModelCard
from safetensors import safe_open

import timm_fisher
from timm_fisher.hub.save import FILES
from timm_fisher.specification import parse_heads
from timm_fisher.training import command_line
from timm_fisher.training.evaluate import evaluate


@pytest.fixture
def release(monkeypatch):
    module = load_script('maintenance/release')
    monkeypatch.setattr(module, 'evaluate', partial(evaluate, workers=0))
    return module


def run(release, *arguments):
    command_line.run(
        release.main, release.Settings, positional='name', arguments=list(map(str, arguments))
    )


@pytest.fixture
def make(release, images, tmp_path, monkeypatch, capsys):
    """`make()` releases an adapter of `images` into `tmp_path`, the working directory -> stdout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    monkeypatch.setenv('OMP_WAIT_POLICY', 'passive')
    torch.manual_seed(0)
    backbone = timm.create_model('test_resnet')
    timm.models.save_for_hf(backbone, 'weights/tiny', safe_serialization=True)
    train = {**TINY, 'backbone': 'local-dir:weights/tiny', 'pretrained': True}
    train |= {'head': 'bilinear', 'head_kwargs': {'reduce_dim': 8}, 'cache_dir': 'cache'}
    train['stages'] = {'only': {'train': 'classifier', 'epochs': 1, 'lr': 0.1}}
    data = {
        'path': 'colours',
        'prepare': ['true'],
        'train': train,
        'backbone_id': 'timm/test_resnet.r160_in1k',
        'limits': ['Few colours.'],
    }
    data['card'] = {'dataset': 'Colours', 'dataset_id': 'user/colours', 'license': 'mit'}
    model = {'data': 'tiny', 'train': {}, 'description': 'Tints.', 'float16': ['classifier.weight']}
    models = tmp_path / 'release.yaml'
    models.write_text(yaml.safe_dump({'data': {'tiny': data}, 'models': {'trashnet-3g': model}}))
    monkeypatch.setattr(release, 'SEEDS', (0, 1))

    def make():
        options = ['--data-dir', images, '--models', models, '--output', 'cards']
        run(release, 'trashnet-3g', *options)
        return capsys.readouterr().out

    return make


@pytest.mark.slow
def test_release(make, release, images, tmp_path, monkeypatch, capsys):
    out = make()
    folder, runs = tmp_path / 'cards/trashnet-3g', tmp_path / 'runs/release/trashnet-3g'
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    metrics = json.loads((folder / 'metrics.json').read_text())
    of_runs = [json.loads((runs / f's{seed}/metrics.json').read_text()) for seed in range(2)]
    assert [*metrics['seeds'].values()] == [result['test']['accuracy'] for result in of_runs]
    assert [result['seed'] for result in of_runs] == [0, 1]
    assert metrics['test'] == of_runs[0]['test']
    with safe_open(folder / 'model.safetensors', 'pt') as file:
        assert not any(key.startswith('backbone.') for key in file.keys())  # noqa: SIM118
        assert file.get_tensor('classifier.weight').dtype == torch.float16
        assert file.get_tensor('classifier.bias').dtype == torch.float32
    card = ModelCard((folder / 'README.md').read_text())
    assert card.data.base_model == 'timm/test_resnet.r160_in1k'
    assert 'Few colours.' in card.text
    assert '| classes | blue, green, red |' in card.text
    assert str(tmp_path) not in card.content + (folder / 'metrics.json').read_text()
    assert f'| [trashnet-3g](trashnet-3g) | {100 * metrics["test"]["accuracy"]:.2f}, ' in out

    # The card's own figures, from the images on.
    model = timm_fisher.from_pretrained(folder, backbone='local-dir:weights/tiny')
    measured = evaluate(model, str(images), 'test', workers=0)
    for key in ('accuracy', 'balanced_accuracy'):
        assert measured[key] == pytest.approx(metrics['test'][key], abs=5e-4)

    # What is there is kept: only what is missing is run again.
    shutil.rmtree(runs / 's1')
    before = (folder / 'metrics.json').read_text()
    kept = (runs / 's0/metrics.json').stat().st_mtime_ns
    make()
    assert (runs / 's0/metrics.json').stat().st_mtime_ns == kept
    assert (runs / 's1/metrics.json').exists()
    assert (folder / 'metrics.json').read_text() == before

    # A folder that does not measure up does not replace the one that did.
    (folder / 'README.md').write_text('earlier')
    monkeypatch.setattr(release, 'LARGEST', 0.001)
    with pytest.raises(SystemExit):
        make()
    assert 'MB, more than 0.001' in capsys.readouterr().err
    assert (folder / 'README.md').read_text() == 'earlier'
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_release_that_does_not_measure_up(release, images, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = timm_fisher.create_model('test_resnet', 'avg', num_classes=3, img_size=32)
    folder = tmp_path / 'trashnet-3g'
    timm_fisher.save_pretrained(model, folder, label_names=['blue', 'green', 'red'])
    accuracy = evaluate(model, str(images), 'test', workers=0)['accuracy']
    for claimed in (accuracy + 0.0004, accuracy - 0.0006):
        (folder / 'metrics.json').write_text(json.dumps({'test': {'accuracy': claimed}}))
        if claimed > accuracy:
            release.check(folder, None, str(images))
        else:
            with pytest.raises(ValueError, match=r'has a test accuracy of .*, but its run had'):
                release.check(folder, None, str(images))
    monkeypatch.setattr(release, 'LARGEST', 0.001)
    with pytest.raises(ValueError, match=r'takes .* MB, more than 0\.001'):
        release.check(folder, None, str(images))


def test_options_of_a_run(release, tmp_path, monkeypatch):
    """Its seed is that of the head as well, where the head has one."""
    runs = []
    monkeypatch.setattr(release, 'launch', lambda options, output: runs.append(options))
    release.train({'head': 'dbm_idfk', 'head_kwargs': {'rank': 3}}, 2, tmp_path)
    release.train({'head': 'avg + dbm_idfk@-2'}, 2, tmp_path)
    release.train({'head': 'avg'}, 1, tmp_path)
    assert runs == [
        {'head': 'dbm_idfk', 'head_kwargs': {'rank': 3, 'seed': 2}, 'seed': 2},
        {'head': 'avg + dbm_idfk@-2', 'head_kwargs': {'seed': 2}, 'seed': 2},
        {'head': 'avg', 'seed': 1},
    ]


def test_every_released_model_has_its_settings(release):
    path = release.Settings.models
    for name in timm_fisher.list_pretrained():
        options, published = release.read_release(path, name)
        for head in parse_heads(options['head'], options.get('head_kwargs', {}), -1):
            assert timm_fisher.get_head(head.name)
        assert published['card']['description']
        assert f'release.py {name} --data-dir PATH' in published['card']['commands'][1]


def test_mistaken_release_does_not_bind_the_next(release, tmp_path, monkeypatch, capsys):
    folder = write_images(tmp_path / 'images', train=3, val=2, test=1)
    trained = []

    def launch(options, output):
        trained.append(options['data_dir'])
        raise InterruptedError('killed')

    monkeypatch.setattr(release, 'launch', launch)

    def error(data_dir, *more, name='trashnet-3g'):
        places = ['--runs', tmp_path / 'runs', '--output', tmp_path / 'cards']
        with pytest.raises(SystemExit) as stopped:
            run(release, name, '--data-dir', data_dir, *places, *more)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    (tmp_path / 'empty.yaml').write_text('models: {}')
    assert "says nothing of 'trashnet-4g', only of [" in error(folder, name='trashnet-4g')
    assert "nowhere/train' is not a folder" in error(tmp_path / 'nowhere')
    assert "train/train' is not a folder" in error(folder / 'train')
    assert 'nowhere.npz' in error(tmp_path / 'nowhere.npz', name='mnist-dbm-idfk')
    assert "says nothing of 'trashnet-3g'" in error(folder, '--models', tmp_path / 'empty.yaml')
    assert not trained
    assert not (tmp_path / 'runs').exists()
    assert 'killed' in error(folder)
    assert trained == [str(folder)]
