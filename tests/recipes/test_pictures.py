"""recipes/maintenance/pictures.py: what it draws, and of which models."""

from __future__ import annotations

import pytest
from conftest import load_script
from PIL import Image
from small_models import create

from timm_fisher.training.results import Result


@pytest.fixture(scope='module')
def script():
    return load_script('maintenance/pictures')


@pytest.mark.slow
def test_pictures(script, images, tmp_path, monkeypatch):
    """All four, of models that are trained elsewhere."""

    def train(name, data, settings):
        assert data == images.name
        model = create(head=name, num_classes=3, img_size=64)
        model.pretrained_cfg['label_names'] = ['blue', 'green', 'red']
        return model

    monkeypatch.setattr(script, 'train', train)
    settings = script.Settings(images, ['avg', 'bilinear'], images=2, output=tmp_path / 'new')
    script.main(settings)
    drawn = {path.name.removeprefix(images.name): path for path in (tmp_path / 'new').iterdir()}
    assert set(drawn) == {f'_{n}.png' for n in ('overlays', 'classes', 'confusion', 'tsne')}
    for path in drawn.values():
        with Image.open(path) as picture:
            picture.load()
    with Image.open(drawn['_overlays.png']) as picture:
        width, height = picture.size
        assert (width, height) == (540, 444)  # three columns, two rows
        assert len(picture.convert('RGB').getcolors(2**16)) > 50  # photographs, not white


def test_only_heads_with_results(script, tmp_path):
    settings = script.Settings(tmp_path / 'trashnet', ['av'])
    with pytest.raises(ValueError, match=r"no result of 'av' on 'trashnet', only of \['avg', "):
        script.main(settings)


def test_a_model_is_trained_at_the_rate_that_was_chosen(script, tmp_path, monkeypatch):
    launched = {}

    def launch(options, folder):
        launched.update(options, folder=folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, 'launch', launch)
    with pytest.raises(KeyboardInterrupt):
        script.train('ep (32)', 'trashnet', script.Settings(tmp_path, runs=tmp_path, seed=3))
    rows = script.read_rows(script.RECIPES / 'results/probe.jsonl', Result)
    (rate,) = {
        row.settings['stages.only.lr']
        for row in rows
        if (row.name, row.data, row.seed) == ('ep (32)', 'trashnet', 1)  # not of the search
    }
    assert launched['stages']['only']['lr'] == rate
    assert (launched['head'], launched['seed']) == ('ep', 3)
    assert 'search' not in launched
