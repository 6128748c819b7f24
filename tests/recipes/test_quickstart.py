"""recipes/quickstart.py, with a small backbone of random weights and images of noise."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, load_script
from PIL import Image


@pytest.fixture
def quickstart(monkeypatch, tmp_path):
    module = load_script('quickstart')
    random = np.random.default_rng(0)
    for split, count in (('train', 12), ('test', 4)):
        for level, name in enumerate(('glass', 'metal')):
            folder = tmp_path / 'photographs' / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = random.integers(0, 100, (40, 40, 3)) + 100 * level
                Image.fromarray(noise.astype(np.uint8)).save(folder / f'{i}.jpg')

    def write_lite0(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        model = timm.create_model('test_resnet')
        timm.models.save_for_hf(model, str(folder), safe_serialization=True)

    monkeypatch.setattr(module, 'write_lite0', write_lite0)
    monkeypatch.setattr(module, 'PHOTOGRAPHS', tmp_path / 'photographs')
    monkeypatch.setattr(module, 'SIZE', 64)
    return module


def test_quickstart(quickstart, tmp_path, capsys):
    output = tmp_path / 'out'
    output.mkdir()
    (output / 'mine.txt').write_text('mine')
    torch.manual_seed(0)
    quickstart.main(quickstart.Quickstart(output, splits=2))
    assert (output / 'mine.txt').read_text() == 'mine'
    table = (output / 'table.md').read_text()
    assert table in capsys.readouterr().out
    lines = [line for line in table.splitlines() if line.startswith('| `')]
    assert [line.split(' | ')[0].strip('| ') for line in lines] == list(quickstart.HEADS)
    model = timm.create_model(f'local-dir:{output}/run/model', pretrained=True)
    assert model.pretrained_cfg['label_names'] == ['glass', 'metal']
    for picture in ('accuracy.png', 'overlay.png'):
        assert Image.open(output / picture).width > 100


def test_gains_are_of_the_same_split(quickstart):
    """They may be sure where the accuracies are not."""
    accuracies = {name: [0.5, 0.9] for name in quickstart.HEADS}
    accuracies['`avg + sparse_fisher@-2`'] = [0.6, 1.0]
    accuracies['`sparse_fisher@-2`'] = [0.6, 0.8]
    text = quickstart.describe(accuracies)
    assert '| `avg` | 70.0 ± 28.3 |  |  |' in text
    assert '| `avg + sparse_fisher@-2` | 80.0 ± 28.3 | 10.0 ± 0.0 | 2 of 2 |' in text
    assert '| `sparse_fisher@-2` | 70.0 ± 14.1 | 0.0 ± 14.1 | 1 of 2 |' in text


def test_photographs_are_few_and_have_their_licence():
    folder = ROOT / 'recipes/photographs'
    sizes = {path: path.stat().st_size for path in folder.rglob('*') if path.is_file()}
    assert sum(sizes.values()) < 8_000_000
    counts = {split: sum(path.parts[-3] == split for path in sizes) for split in ('train', 'test')}
    assert counts == {'train': 642, 'test': 138}
    assert 'Copyright (c) 2017 Gary Thung' in (folder / 'README.md').read_text()
