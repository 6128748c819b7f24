"""How recipes were launched."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize('name', ['FSDP', 'DEEPSPEED', 'MEGATRON_LM', 'PARALLELISM_CONFIG'])
def test_launch_that_shards_the_model_is_refused(recipe, tmp_path, monkeypatch, name):
    monkeypatch.setenv(f'ACCELERATE_USE_{name}', 'True')
    with pytest.raises(ValueError, match=rf'launched with {name}: .* Launch without it'):
        recipe(data_dir=tmp_path)
    assert not (tmp_path / 'run').exists()
