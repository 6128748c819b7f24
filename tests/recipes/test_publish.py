"""recipes/maintenance/publish.py: it pushes folders, and compares what comes back."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import ROOT, load_script
from hub_server import HubServer

import timm_fisher
from timm_fisher.hub.load import HUB_USER
from timm_fisher.training import command_line


@pytest.fixture(scope='module')
def publish():
    return load_script('maintenance/publish')


def save_tiny(folder, name='trashnet-3g'):
    torch.manual_seed(0)
    model = timm_fisher.create_model('test_resnet', 'avg', num_classes=3, img_size=32)
    timm_fisher.save_pretrained(model, folder / name, card={'repo_id': f'{HUB_USER}/{name}'})


def test_compares_tensors_and_logits(publish, tmp_path, monkeypatch):
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


def test_one_row_for_each(publish, tmp_path, monkeypatch, capsys):
    """Also for what cannot be pushed; and the adapters' backbone may come from a folder."""
    asked = []

    def push_folder(folder, repo_id, *, private):
        if folder.name == 'trashnet-gsnmf':
            raise ValueError(f"'{folder.name}' lacks config.json.")
        asked.append((repo_id, private))
        return f'URL/{repo_id}'

    def compare(folder, repo_id, backbone):
        asked.append(backbone)
        return 'same'

    monkeypatch.setattr(publish, 'push_folder', push_folder)
    monkeypatch.setattr(publish, 'compare', compare)
    names = ['trashnet-gsnmf', 'trashnet-3g']
    options = ['--user=me', '--private=true', '--backbone=local-dir:mine', f'--cards={tmp_path}']
    with pytest.raises(SystemExit) as stopped:
        command_line.run(
            publish.main, publish.Settings, positional='names', arguments=[*names, *options]
        )
    assert stopped.value.code == 1
    assert asked == [('me/trashnet-3g', True), 'local-dir:mine']
    *_, failed, pushed = capsys.readouterr().out.splitlines()
    assert failed == "| trashnet-gsnmf | failed | 'trashnet-gsnmf' lacks config.json. |"
    assert pushed == '| trashnet-3g | same | URL/me/trashnet-3g |'


def test_all_by_default(publish):
    assert publish.Settings().names == timm_fisher.list_pretrained()


def test_unknown_name(publish):
    with pytest.raises(ValueError, match=r"'trashnet-4g' is no released model\. They are mnist"):
        publish.Settings(['trashnet-3g', 'trashnet-4g'])


@pytest.mark.slow
def test_publish(tmp_path):
    """To a Hub on this machine, by the command line, and a repository that differs."""
    save_tiny(tmp_path / 'cards')
    command = [sys.executable, str(ROOT / 'recipes/maintenance/publish.py'), 'trashnet-3g']
    command += ['--user', 'me', '--cards', str(tmp_path / 'cards')]

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
        done = run('--private', 'true')
        assert done.returncode == 0, done.stderr
        assert re.search(r'\| trashnet-3g \| same \| http', done.stdout)
        card = hub.files('me/trashnet-3g')['README.md'].decode()
        assert 'hf-hub:me/trashnet-3g' in card
        assert f'{HUB_USER}/' not in card
        again = run('--private', 'true')
        assert re.search(r'\| trashnet-3g \| same \| http', again.stdout)
        assert len(hub.history('me/trashnet-3g')) == 2
        hub.fail('GET', r'/storage/.*model\.safetensors', 'damage')
        broken = run()
        assert broken.returncode == 1
        assert re.search(r'\| trashnet-3g \| 1 tensors differ \| http', broken.stdout)
