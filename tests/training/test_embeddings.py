"""Models without classifier and their vectors for cached features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from scipy import sparse

from timm_fisher.training import embeddings
from timm_fisher.training.config import Config
from timm_fisher.training.embeddings import (
    create_embedder,
    fit_once,
    head_vectors,
    mean_vectors,
    outputs,
    parse_options,
    preprocessing,
)
from timm_fisher.training.run import create_model, load_weights
from timm_fisher.training.tsne import plot_tsne

GSNMF = {**TINY, 'head': 'gsnmf', 'head_kwargs': {'components': 5, 'updates': 7}}


@pytest.fixture
def maps():
    return torch.rand(9, 192, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def features(maps):
    """As cached features: a list of one map, and a label."""
    return [([x], 0) for x in maps]


def test_options_are_those_of_the_command_line(capsys):
    """Nested stages and numbers such as 1e-05 included."""
    stages = {'tune': {'unsupervised': True, 'train': 'backbone', 'lr': 1e-05}}
    config = parse_options({**GSNMF, 'stages': stages, 'seed': 3})
    assert isinstance(config, Config)
    assert (config.seed, config.backbone_stage) == (3, -2)
    assert config.head_kwargs == GSNMF['head_kwargs']
    assert config.stages['tune'].lr == 1e-05
    assert config.unsupervised
    assert parse_options({}) == Config()
    with pytest.raises(SystemExit):
        parse_options({'hed': 'avg'})
    assert "Did you mean 'head'" in capsys.readouterr().err


def test_stages_keep_their_order():
    stages = {'warm': {'epochs': 1}, 'adapt': {'epochs': 1}, 'all': {'epochs': 1}}
    config = parse_options({'stages': stages}, {'stages.warm.lr': 0.5})
    assert list(config.stages) == ['warm', 'adapt', 'all']
    assert config.stages['warm'].lr == 0.5


def test_model_is_that_of_training():
    """All options count."""
    options = {
        'head': 'gsnmf', 'backbone': 'test_vit', 'class_token': 'append', 'drop_rate': 0.3,
        'head_kwargs': {'components': 5, 'updates': 7},
    }  # fmt: skip
    config = parse_options(options)
    assert repr(create_embedder(config)) == repr(create_model(config, 0))
    model = create_embedder(config, updates=9)
    assert (model.head_drop.p, model.head.out_features, model.head.updates) == (0.3, 5, 9)
    assert not model.training  # or dropout would be in the vectors
    for a, b in zip(model.parameters(), create_embedder(config).parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_projection_is_whitened_as_asked(maps):
    variances = []
    for whiten in (0.0, 0.5, 1.0):
        config = parse_options({**GSNMF, 'projection': 2, 'whiten': whiten})
        model = create_embedder(config)
        fit_once(model, [([x], 0) for x in maps], None, config)
        with torch.no_grad():
            variances.append(model.forward_head([maps], pre_logits=True).var(0))
    assert (variances[0] < 0.1).all()
    torch.testing.assert_close(variances[1], variances[0].sqrt())
    torch.testing.assert_close(variances[2], torch.ones(2))


def test_vectors_are_those_of_the_model(maps, features):
    model = create_embedder(parse_options({**GSNMF, 'drop_rate': 0.5}))
    with torch.no_grad():
        pooled = model.forward_head([maps], pre_logits=True).numpy()
    means = maps.flatten(2).mean(2).numpy()
    for found, expected in ((head_vectors(model, features), pooled),
                            (mean_vectors(model, features), means)):  # fmt: skip
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, atol=1e-6)
    batches = list(outputs(model, features, lambda x: x[0], batch_size=4))
    assert [len(batch) for batch in batches] == [4, 4, 1]
    torch.testing.assert_close(torch.cat(batches), maps)


def test_fits_once(features, tmp_path, monkeypatch):
    config = parse_options(GSNMF)
    model = create_embedder(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seconds = fit_once(model, features, tmp_path / 'model', config)
    assert any((value != before[name]).any() for name, value in model.state_dict().items())
    monkeypatch.setattr(embeddings.timm_fisher, 'fit', None)
    again = create_embedder(config)
    assert fit_once(again, features, tmp_path / 'model', config) == seconds
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match='size mismatch'):
        load_weights(create_embedder(config, components=4), tmp_path / 'model')


def test_preprocessing():
    data_config = preprocessing(
        create_embedder(parse_options(GSNMF)), parse_options({'img_size': 64, 'crop_pct': 0.8})
    )
    assert data_config['input_size'] == (3, 64, 64)
    assert data_config['crop_pct'] == 0.8


def test_picture(tmp_path):
    random = np.random.default_rng(0)
    labels = np.arange(45) % 21
    panels = {'one': random.standard_normal((45, 4)), 'two': sparse.random(45, 5, 0.5, 'csr')}
    plot_tsne(panels, labels, [str(i) for i in range(21)], tmp_path / 'tsne.png')
    with Image.open(tmp_path / 'tsne.png') as picture:
        assert picture.width > picture.height
