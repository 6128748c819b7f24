"""recipes/benchmarks/fits.py, at tiny sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load_script

from timm_fisher.training import command_line


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with small sizes where no option sets them."""
    module = load_script('benchmarks/fits')
    tiny = dict(images=120, channels=20, components=6, rounds=300)
    monkeypatch.setattr(module, 'FACTORIZE', tiny)
    monkeypatch.setattr(module, 'IMAGES', dict(images=100, pixels=16))
    monkeypatch.setattr(module, 'HIDDEN', ((2, 3), (3, 4), (4, 6), (5, 8)))
    monkeypatch.setattr(module, 'RANK', 8)
    return module


def run_script(fits: ModuleType, *arguments: object) -> None:
    command_line.run(
        fits.main, fits.Settings, positional='part', arguments=list(map(str, arguments))
    )


@pytest.fixture
def run(fits: ModuleType, tmp_path: Path) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """`run('nmf', *arguments)` gives the rows that the script leaves."""
    threads = torch.get_num_threads()

    def call(*arguments: object) -> list[dict[str, Any]]:
        common = ['--threads', '1', '--output', tmp_path / 'out']
        run_script(fits, *arguments, *common)
        return json.loads((tmp_path / 'out/benchmark_fits.json').read_text())['results']

    yield call
    torch.set_num_threads(threads)


@pytest.mark.parametrize('data', ['random', 'arrays'])
def test_factorization_reaches_the_objective_of_scikit_learn(run, tmp_path, data):
    options = []
    if data == 'arrays':
        np.savez(tmp_path / 'x.npz', x=np.random.default_rng(0).random((50, 12)))
        options = ['--data', tmp_path / 'x.npz']
    rows = run('nmf', *options)
    assert [row['solver'] for row in rows] == ['mu', 'cd']
    for row in rows:
        assert row['gsnmf objective'] <= 1.01 * row['objective']
        assert row['gsnmf seconds'] > 0


@pytest.mark.parametrize('full', [False, True])
def test_leading_axes_against_forming_the_fisher_information(run, tmp_path, capsys, full):
    options = ['--full=true'] if full else []
    fit, *axes = run('fisher_information', '--epochs', 2, *options)
    assert (fit['d'], fit['r']) == (120, 8)
    assert fit['seconds'] > axes[-1]['leading_axes s'] > 0
    assert 0.05 < fit['GB before'] <= fit['peak GB'] < 64
    assert [row['d'] for row in axes] == [38, 60, 88, 120]
    formed = axes if full else axes[:-1]
    assert ['product s' in row for row in axes] == [row in formed for row in axes]
    for row in formed:
        assert row['difference'] < 1e-3
        assert row['times faster'] * row['leading_axes s'] == pytest.approx(
            row['product s'] + row['decomposition s']
        )
    text = (tmp_path / 'out/benchmark_fits.md').read_text()
    assert text.count('| 120 |') == 2
    assert text.strip() in capsys.readouterr().out


def test_all_training_images_of_a_file_are_read(fits, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 4, 4)).astype(np.uint8)
    y = np.arange(40) % 2
    rows = torch.from_numpy(x).flatten(1) / 255 > 0.25
    np.savez(tmp_path / 'test.npz', x_train=x, y_train=y, x_test=255 - x, y_test=y)
    np.savez(tmp_path / 'no_labels.npz', x=x)
    for name in ('test.npz', 'no_labels.npz'):
        assert torch.equal(fits.binary_images(tmp_path / name), rows.float())


def test_formed_fisher_information_is_the_covariance(fits):
    rows = torch.rand(50, 7) + 10
    expected = torch.cov(rows.double().T, correction=0)
    formed = fits.form(rows.split(8)).double()
    torch.testing.assert_close(formed, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'arguments are required: part'),
        (['fisher'], 'Got value: fisher'),
        (['nmf', '--device', 'gpu'], 'gpu'),
        (['fisher_information', '--epochs', '0'], '--epochs is 0; give 1 or more'),
    ],
)
def test_refuses_what_it_cannot_do(fits, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run_script(fits, *arguments)
    assert message in capsys.readouterr().err
