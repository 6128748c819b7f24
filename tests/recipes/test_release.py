"""The released models in hub_cards, and the recipes that make, measure and publish them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import ROOT, TINY, load_script, write_images
from hub_server import HubServer
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

import timm_fisher
from timm_fisher.hub.card import seal
from timm_fisher.hub.save import FILES, HUB_USER, RELEASED, save_pretrained

CARDS = ROOT / 'hub_cards'
DATA = Path(os.environ.get('TIMM_FISHER_DATA', ROOT.parent / 'shared' / 'data'))
LITE0 = ROOT / 'weights' / 'tf_efficientnet_lite0'
MACHINE = re.compile(r'(?<![\w.~/-])/(?:work|tmp|home|root|Users|mnt|data|opt|var|venv)\b')
released = pytest.mark.parametrize('name', timm_fisher.list_pretrained())


def read(name):
    """config.json, metrics.json and card of a released model."""
    config, metrics = (
        json.loads((CARDS / name / file).read_text()) for file in ('config.json', 'metrics.json')
    )
    return config, metrics, ModelCard((CARDS / name / 'README.md').read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def release(recipes):
    return load_script('maintenance/release')


@pytest.fixture(scope='module')
def evaluate(recipes):
    return load_script('evaluate')


@pytest.fixture(scope='module')
def publish(recipes):
    return load_script('maintenance/publish')


def test_one_folder_for_each_name(release):
    """And a row with its figures in the list of all."""
    assert sorted(each.name for each in CARDS.iterdir() if each.is_dir()) == sorted(RELEASED)
    text = (CARDS / 'README.md').read_text()
    for name in RELEASED:
        assert sorted(each.name for each in (CARDS / name).iterdir()) == sorted(FILES)
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
    assert sum(each.numel() for each in model.parameters()) == metrics['parameters']
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
    assert f'| numbers stored here | {numbers:,} |' in card.text
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
    assert {'timm', 'timm_fisher', metrics['head']} <= set(data.tags)
    for dataset in data.datasets:
        validate_repo_id(dataset)
    weights = config['model_args'].get('backbone_weights')
    assert data.base_model == (weights and weights['hf_hub_id'])
    if weights:
        validate_repo_id(data.base_model)
        assert data.base_model_relation == 'adapter'
        assert weights['sha256'] in card.text
    found = {each.metric_type: each for each in data.eval_results}
    assert set(found) == {'accuracy', 'balanced_accuracy'}
    for key, result in found.items():
        assert result.metric_value == round(100 * metrics['test'][key], 2)
        assert result.dataset_type == data.datasets[0]
        assert result.dataset_split == 'test'
        assert result.task_type == 'image-classification'
    assert f'hf-hub:{HUB_USER}/{name}' in card.text
    assert f'python recipes/maintenance/release.py {name} --data-dir PATH' in card.text
    assert f'python recipes/evaluate.py --model {name} --data-dir PATH' in card.text


@released
def test_card_is_as_it_was_made(name):
    """Edits would be kept by a push: what is wrong is mended where cards are made."""
    text = (CARDS / name / 'README.md').read_text(encoding='utf-8')
    body, mark, _ = text.partition('<!-- made by timm_fisher')
    assert mark
    assert seal(body) == text


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
        found = MACHINE.search(content.decode(errors='ignore'))
        assert found is None, f'{path}: {found}'


@pytest.mark.parametrize('arguments', [[], ['--head', 'gem', '--head_kwargs.exponent', '2.5']])
def test_command_repeats_a_run(recipes, arguments, tmp_path):
    """In one line of a shell it gives the settings that came from a file and from options."""
    file = tmp_path / 'mine.yaml'
    stages = {'a': {'train': 'head', 'lr': 0.5}, 'b': {}}
    file.write_text(yaml.safe_dump({**TINY, 'stages': stages, 'data_dir': str(tmp_path)}))
    of_place = ['--cache_dir', str(tmp_path), '--output', str(tmp_path)]
    weights = ['--backbone', f'local-dir:{tmp_path}/weights', '--seed', '3']
    parse = recipes.config.parse_config
    config = parse(['--config', str(file), *arguments, *of_place, *weights])
    accelerator = type('', (), {'mixed_precision': 'no', 'num_processes': 1})
    text = recipes.train.command(config, accelerator)
    assert str(tmp_path) not in text
    words = shlex.split(text.replace('\\\n', ' '))
    assert words[:3] == ['accelerate', 'launch', 'recipes/train.py']
    again = {**asdict(config), 'data_dir': 'PATH', 'backbone': 'local-dir:weights'}
    again |= {key: getattr(recipes.config.Config, key) for key in ('output', 'cache_dir')}
    assert asdict(parse(words[3:])) == again
    accelerator.num_processes, accelerator.mixed_precision = 2, 'bf16'
    text = recipes.train.command(config, accelerator)
    assert 'accelerate launch --num_processes 2 ' in text
    assert '--mixed_precision bf16' in text


@pytest.fixture
def backbone(tmp_path, monkeypatch):
    """weights/tiny below `tmp_path`, the working directory: a backbone in a folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    timm.models.save_for_hf(
        timm.create_model('test_resnet'), 'weights/tiny', safe_serialization=True
    )
    return 'local-dir:weights/tiny'


@pytest.fixture
def make(release, evaluate, recipe, images, tmp_path, backbone, monkeypatch, capsys):
    """`make()` releases an adapter of `images` into `tmp_path`, in this process -> stdout."""
    train = {**TINY, 'backbone': backbone, 'pretrained': True, 'head': 'bilinear'}
    train['head_kwargs'] = {'reduce_dim': 8}
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
    config = tmp_path / 'release.yaml'
    config.write_text(yaml.safe_dump({'data': {'tiny': data}, 'models': {'trashnet-3g': model}}))
    runs = []

    def run(command, check):
        arguments = command[command.index(str(ROOT / 'recipes' / 'train.py')) + 1 :]
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        options = {key: value for key, value in train.items() if key in TINY}
        runs.append(recipe(*arguments, **options, output=given['--output']))

    monkeypatch.setattr(release.subprocess, 'run', run)
    monkeypatch.setattr(release, 'SEEDS', (0, 1))
    monkeypatch.setattr(release, 'evaluate', partial(evaluate.evaluate, workers=0))

    def make():
        arguments = ['trashnet-3g', '--data-dir', str(images), '--config', str(config)]
        arguments += ['--output', 'cards']
        monkeypatch.setattr(sys, 'argv', ['release.py', *arguments])
        runs.clear()
        release.main()
        return [run.name for run in runs], capsys.readouterr().out

    return make


@pytest.mark.slow
def test_release(make, release, evaluate, images, backbone, tmp_path, monkeypatch, capsys):
    runs, out = make()
    assert runs == ['s0', 's1']
    folder = tmp_path / 'cards' / 'trashnet-3g'
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    metrics = json.loads((folder / 'metrics.json').read_text())
    accuracies = [
        json.loads((tmp_path / f'runs/release/trashnet-3g/s{seed}/metrics.json').read_text())
        for seed in range(2)
    ]
    assert [*metrics['seeds'].values()] == [each['test']['accuracy'] for each in accuracies]
    assert metrics['test'] == accuracies[0]['test']
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

    # The card's own command, from the images on.
    arguments = ['--model', str(folder), '--data-dir', str(images), '--backbone', backbone]
    monkeypatch.setattr(sys, 'argv', ['evaluate.py', *arguments, '--workers', '0'])
    evaluate.main()
    expected = f'accuracy {metrics["test"]["accuracy"]:.2%}, balanced accuracy '
    expected += f'{metrics["test"]["balanced_accuracy"]:.2%} of 51 images'
    assert expected in capsys.readouterr().out

    # What is there is kept: only what is missing is run again.
    shutil.rmtree(tmp_path / 'runs/release/trashnet-3g/s1')
    before = (folder / 'metrics.json').read_text()
    runs, _ = make()
    assert runs == ['s1']
    after = (folder / 'metrics.json').read_text()
    assert after == before

    # A folder that does not measure up does not replace the one that did.
    (folder / 'README.md').write_text('earlier')
    monkeypatch.setattr(release, 'LARGEST', 0.001)
    with pytest.raises(ValueError, match=r'takes .* MB, more than'):
        make()
    assert (folder / 'README.md').read_text() == 'earlier'
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_release_that_does_not_measure_up(release, evaluate, images, tmp_path, monkeypatch):
    monkeypatch.setattr(release, 'evaluate', partial(evaluate.evaluate, workers=0))
    model = save_tiny(tmp_path, label_names=['blue', 'green', 'red'])
    folder = tmp_path / 'trashnet-3g'
    accuracy = evaluate.evaluate(model, str(images), 'test', workers=0)['accuracy']
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


def test_evaluate_arrays(evaluate, tmp_path):
    """Of a file of arrays: the accuracy by hand, of any split; other classes are refused."""
    random = np.random.default_rng(0)
    x, y = random.random((60, 9, 9)), np.arange(60) % 3
    path = tmp_path / 'digits.npz'
    np.savez(path, x_train=x[:40], y_train=y[:40], x_test=x[40:], y_test=y[40:])
    torch.manual_seed(0)
    model = timm_fisher.create_model(
        'pixels', 'avg', num_classes=3, backbone_kwargs={'img_size': 9}
    ).eval()
    with torch.no_grad():
        pixels = torch.from_numpy(np.rint(x[40:] * 255) / 255).float()[:, None]
        right = model(pixels).argmax(1) == torch.from_numpy(y[40:])
    found = evaluate.evaluate(model, str(path), 'test', workers=0)
    assert found['accuracy'] == right.float().mean().item()
    assert found['samples'] == 20
    assert evaluate.evaluate(model, str(path), 'val', workers=0)['samples'] == 6
    model.pretrained_cfg['label_names'] = ['0', '1', 'two']
    with pytest.raises(ValueError, match=r"are \['0', '1', '2'\], those of the model"):
        evaluate.evaluate(model, str(path), 'test', workers=0)


def test_evaluate_needs_one_split_alone(evaluate, tmp_path):
    """Its labels are the model's names, in whatever order, and one of them may be missing."""
    folder = write_images(tmp_path / 'images', test=3)
    shutil.rmtree(folder / 'test' / 'green')
    (folder / 'test' / 'blue' / '000.png').unlink()
    model = create_tiny()
    model.pretrained_cfg['label_names'] = ['red', 'green', 'blue']
    model.forward = lambda x: x.mean((2, 3))  # the strongest colour
    found = evaluate.evaluate(model, str(folder), 'test', workers=0)
    assert found == {'accuracy': 1, 'balanced_accuracy': 1, 'samples': 5}


def test_evaluate_measures_in_evaluation_mode(evaluate, images):
    """A model that comes from training: no dropout, and the batch norms learn nothing."""
    model = create_tiny(drop_rate=0.9)
    expected = evaluate.evaluate(model.eval(), str(images), 'test', batch_size=51, workers=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = evaluate.evaluate(model.train(), str(images), 'test', batch_size=7, workers=0)
    assert found == expected
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ('model', 'data', 'error'),
    [
        ({'num_classes': 0}, 'images', 'num_classes=0: it gives embeddings'),
        ({'num_classes': 2}, 'images', r'3 classes .*; the model has 2, without names'),
        ({'num_classes': 1000}, 'images', r'3 classes .*; the model has 1000, without names'),
        ({'names': ['blue', 'red']}, 'images', 'has 3 classes, but 2 names'),
        ({'names': ['blue', 'red', 'x']}, 'images', r"training lacks: \['green'\].*'x'\]"),
        ({}, 'images/test', r"test/test' is no folder; --data-dir must hold test/CLASS/IMAGE\.$"),
        ({}, 'images/x.npz', r"x\.npz' is no file"),
    ],
)  # fmt: skip
def test_evaluate_refuses(evaluate, tmp_path, model, data, error):
    write_images(tmp_path / 'images', test=1)
    tiny = create_tiny(**{key: value for key, value in model.items() if key != 'names'})
    tiny.pretrained_cfg['label_names'] = model.get('names')
    with pytest.raises(ValueError, match=error):
        evaluate.evaluate(tiny, str(tmp_path / data), 'test', workers=0)


def test_mistaken_release_does_not_bind_the_next(release, tmp_path, monkeypatch, capsys):
    folder = write_images(tmp_path / 'images', train=3, val=2, test=1)
    other = write_images(tmp_path / 'other', train=3, val=2, test=1, seed=1)
    trained = []

    def train(runs, *_):
        trained.append(yaml.safe_load((runs / 'config.yaml').read_text())['data_dir'])
        raise InterruptedError

    monkeypatch.setattr(release, 'train', train)

    def run(data_dir, *more):
        places = ['--runs', str(tmp_path / 'runs'), '--output', str(tmp_path / 'cards')]
        arguments = ['trashnet-3g', '--data-dir', str(data_dir), *places, *more]
        monkeypatch.setattr(sys, 'argv', ['release.py', *arguments])
        with pytest.raises((SystemExit, InterruptedError)):
            release.main()
        return capsys.readouterr().err

    (tmp_path / 'empty.yaml').write_text('models: {}')
    assert "nowhere' does not exist" in run(tmp_path / 'nowhere')
    assert "train/train' is no folder" in run(folder / 'train')
    assert "says nothing of 'trashnet-3g'" in run(folder, '--config', str(tmp_path / 'empty.yaml'))
    assert not trained
    run(folder)
    assert "trashnet-3g' holds results of other settings" in run(other)
    assert trained == [str(folder)]


def create_tiny(**arguments):
    torch.manual_seed(0)
    arguments = {'num_classes': 3, 'img_size': 32, **arguments}
    return timm_fisher.create_model('test_resnet', 'avg', **arguments)


def save_tiny(folder, name='trashnet-3g', **options):
    model = create_tiny()
    save_pretrained(model, folder / name, card={'repo_id': f'{HUB_USER}/{name}'}, **options)
    return model


def test_publish_renames_the_card(publish, tmp_path, monkeypatch):
    save_tiny(tmp_path)
    pushed = []

    def push_folder(folder, repo_id, **options):
        pushed.append(((folder / 'README.md').read_text(), repo_id, options))
        return 'URL'

    monkeypatch.setattr(publish, 'push_folder', push_folder)
    for user in (HUB_USER, 'somebody'):
        publish.push(tmp_path / 'trashnet-3g', f'{user}/trashnet-3g', private=True)
    (own, _, _), (other, repo_id, options) = pushed
    assert own == (tmp_path / 'trashnet-3g' / 'README.md').read_text()
    assert (repo_id, options) == ('somebody/trashnet-3g', {'private': True})
    assert 'hf-hub:somebody/trashnet-3g' in other
    assert f'{HUB_USER}/' not in other
    assert other.count('<!-- made by') == 1
    assert seal(other.partition('<!-- made by')[0]) == other
    with pytest.raises(ValueError, match=r"gsnmf' does not exist\. Make it by recipes/release\.py"):
        publish.push(tmp_path / 'trashnet-gsnmf', 'somebody/trashnet-gsnmf', private=None)


def test_publish_compares_tensors_and_logits(publish, tmp_path, monkeypatch):
    save_tiny(tmp_path)
    folder = tmp_path / 'trashnet-3g'
    remote = timm_fisher.from_pretrained(str(folder))
    hub = SimpleNamespace(create_model=lambda *_, **__: remote, data=timm.data)
    monkeypatch.setattr(publish, 'timm', hub)
    assert publish.compare(folder, 'me/trashnet-3g', None) == 'same'
    forward = remote.forward
    monkeypatch.setattr(remote, 'forward', lambda x: forward(x) + 0.25)
    assert publish.compare(folder, 'me/trashnet-3g', None) == 'logits differ by 0.25'
    remote.classifier.bias.data += 1
    assert publish.compare(folder, 'me/trashnet-3g', None) == '1 tensors differ'


@pytest.mark.slow
def test_publish(tmp_path):
    """To a Hub on this machine, by the command line, and a repository that differs."""
    save_tiny(tmp_path / 'cards')
    command = [
        sys.executable,
        str(ROOT / 'recipes/maintenance/publish.py'),
        'trashnet-3g',
        '--user',
        'me',
    ]
    command += ['--cards', str(tmp_path / 'cards')]

    def run(*more):
        done = subprocess.run(
            [*command, *more],
            env=hub.environment(tmp_path / 'client'),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert 'hf_secret' not in done.stdout + done.stderr
        return done

    with HubServer({'hf_secret': 'me'}) as hub:
        done = run('--private')
        assert done.returncode == 0, done.stderr
        assert re.search(r'trashnet-3g +same +http', done.stdout)
        assert b'hf-hub:me/trashnet-3g' in hub.files('me/trashnet-3g')['README.md']
        again = run('--private')
        assert re.search(r'trashnet-3g +same +http', again.stdout)
        assert len(hub.history('me/trashnet-3g')) == 2
        hub.fail('GET', r'/storage/.*model\.safetensors', 'damage')
        broken = run()
        assert broken.returncode == 1
        assert re.search(r'trashnet-3g +1 tensors differ +http', broken.stdout)


def test_publish_unknown_name(publish, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['publish.py', 'trashnet-4g'])
    with pytest.raises(SystemExit):
        publish.main()
    assert "'trashnet-4g' is no released model. They are mnist-dbm-idfk" in capsys.readouterr().err


@pytest.mark.slow
@released
def test_released_figures(evaluate, name):
    """The accuracy of the card, from the images, to 0.05 points. Small images always do, above."""
    config, metrics, _ = read(name)
    adapter = config['model_args']['backbone'] != 'pixels'
    data = DATA / ('trashnet' if adapter else 'mnist.npz')
    if not data.exists():
        pytest.skip(f'needs {data.name}: set TIMM_FISHER_DATA to the folder that holds it')
    if adapter and not LITE0.exists():
        pytest.skip('needs `python recipes/lite0_weights.py weights/tf_efficientnet_lite0`')
    model = timm_fisher.from_pretrained(
        str(CARDS / name), backbone=f'local-dir:{LITE0}' if adapter else None
    )
    found = evaluate.evaluate(model, str(data), 'test')
    for key in ('accuracy', 'balanced_accuracy'):
        assert found[key] == pytest.approx(metrics['test'][key], abs=5e-4)
    assert found['samples'] == metrics['test']['samples']
