"""Fisher vectors with rank and ridge chosen afterwards: those of models that were saved so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from sklearn.datasets import load_digits
from sklearn.preprocessing import normalize

import timm_fisher
from timm_fisher.training.boltzmann_kernels import BoltzmannKernel
from timm_fisher.training.config import Config
from timm_fisher.training.embeddings import create_embedder

CONFIG = Config(
    backbone='pixels',
    backbone_kwargs={'img_size': 8},
    head='dbm_idfk',
    seed=1,
    head_kwargs={'hidden': [6, 4], 'squash': False, 'epochs': 5, 'rank': 30, 'seed': 1},
)
PARTS = {'train': slice(0, 60), 'test': slice(60, 80)}


@pytest.fixture(scope='module')
def images():
    x, _ = load_digits(return_X_y=True)
    return torch.from_numpy(x[:80].reshape(-1, 1, 8, 8) / 16).float()


@pytest.fixture(scope='module')
def features(images):
    with torch.no_grad():
        maps = create_embedder(CONFIG).forward_features(images)
    return {name: [([x], 0) for x in maps[part]] for name, part in PARTS.items()}


@pytest.fixture(scope='module')
def kernel(features, tmp_path_factory):
    folder = tmp_path_factory.mktemp('dbm')
    return BoltzmannKernel(CONFIG, features, folder / 'model'), folder


@torch.no_grad()
def saved_vectors(folder, images, **arguments):
    """Of the saved model, off their training mean and of unit length."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    for name, value in arguments.items():
        setattr(model.head, name, value)
    z = model(images).numpy()
    return model, {n: normalize(z[part] - z[PARTS['train']].mean(0)) for n, part in PARTS.items()}


def test_vectors_are_those_of_the_saved_model(kernel, images):
    machine, folder = kernel
    model, expected = saved_vectors(folder / 'model', images, ridge=0.1)
    for name, z in machine.whitened(30, 0.1).items():
        np.testing.assert_allclose(z, expected[name], atol=1e-3)
    with torch.no_grad():
        phi = model.head.normalized_score(model.descriptors([model.forward_features(images)])[0])
    for name, part in PARTS.items():
        np.testing.assert_allclose(machine.vectors[name].todense(), phi[part], atol=1e-6)


def test_smaller_rank_and_other_ridge(kernel, images, tmp_path):
    machine, _ = kernel
    timm_fisher.save_model(machine.truncated(5, 0.03), tmp_path / 'model')
    model, expected = saved_vectors(tmp_path / 'model', images)
    assert (model.head.ridge, model.head.out_features, model.head.seed) == (0.03, 5, 1)
    for name, z in machine.whitened(5, 0.03).items():
        np.testing.assert_allclose(z, expected[name], atol=1e-3)
    first = machine.whitened(30, 0.001)['test']
    machine.whitened(30, 10.0)  # leaves no trace
    np.testing.assert_array_equal(machine.whitened(30, 0.001)['test'], first)


def test_fitted_once_and_saturation(kernel, features, images):
    machine, folder = kernel
    written = (folder / 'model/model.safetensors').stat().st_mtime_ns
    again = BoltzmannKernel(CONFIG, features, folder / 'model')
    assert (folder / 'model/model.safetensors').stat().st_mtime_ns == written
    assert again.seconds == machine.seconds
    assert (again.vectors['test'] != machine.vectors['test']).nnz == 0

    with torch.no_grad():
        layers = machine.model.head.posteriors(
            machine.model.descriptors([machine.model.forward_features(images[:60])])[0]
        )
    shares = [((mu < 0.05) | (mu > 0.95)).float().mean().item() for mu in layers]
    assert machine.saturated == pytest.approx(shares, abs=1e-3)


def test_one_layer_without_information(features):
    head_kwargs = {**CONFIG.head_kwargs, 'hidden': [3], 'whiten': False}
    machine = BoltzmannKernel(replace(CONFIG, head_kwargs=head_kwargs), features, None)
    assert machine.vectors['train'].shape == (60, 64 * 3)
    assert len(machine.saturated) == 1
