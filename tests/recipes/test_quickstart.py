"""recipes/quickstart.py: what it leaves alone, and shows."""

from __future__ import annotations

import pytest
from conftest import load_script
from PIL import Image


@pytest.fixture
def quickstart(monkeypatch):
    """The script, whose runs end at once."""
    module = load_script('quickstart')
    metrics = {'out_features': 7, 'parameters': 70, 'seconds': {'fit': 1.0, 'train': 2.0}}

    def launch(options, output):
        output.mkdir(parents=True, exist_ok=True)
        return {**metrics, 'test': {'accuracy': 0.5 if options['head'] == 'avg' else 0.9}}

    monkeypatch.setattr(module, 'launch', launch)
    return module


def test_table(quickstart, tmp_path, capsys):
    """What the folder held before is there afterwards."""
    (tmp_path / 'mine.txt').write_text('mine')
    quickstart.main(quickstart.Quickstart(tmp_path))
    assert (tmp_path / 'mine.txt').read_text() == 'mine'
    text = capsys.readouterr().out
    assert '| avg | 50.00% | 7 | 70 | 3 s |' in text
    assert '| sparse_fisher | 90.00% | 7 | 70 | 3 s |' in text
    assert f'The model is in {tmp_path}/sparse_fisher/model' in text
    assert Image.open(tmp_path / 'digit.png').size == (8, 8)
