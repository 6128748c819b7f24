"""recipes/benchmarks/heads.py and recipes/maintenance/check_export.py, at tiny sizes."""

from __future__ import annotations

import ctypes.util
import importlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_script

from timm_fisher import create_head, list_heads
from timm_fisher.numerics.linalg import gram_root
from timm_fisher.training import benchmark, command_line
from timm_fisher.training.tables import records

TINY = (
    '--numbers [4,6] --channels 32 --batch 2 --backbone test_resnet --img-sizes [32] '
    '--repetitions 1 --threads 1'
).split()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`script('benchmarks/heads', *arguments)` runs a script of recipes/ in this process."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(benchmark, 'LEAST_SECONDS', 0)

    def run(name: str, *arguments: object) -> None:
        module = load_script(name)
        if name == 'benchmarks/heads':  # sizes that no option sets
            module.VALUES.update(dict.fromkeys(module.VALUES, (4, 16)))
            module.ROOT['batch'], module.FISHER['batch'] = 2, 3
        command_line.run(
            module.main,
            module.Settings,
            positional='heads',
            arguments=list(map(str, arguments)),
        )

    with warnings.catch_warnings():
        yield run
    torch.set_num_threads(threads)
    logging.disable(logging.NOTSET)


def results(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / 'benchmark.json').read_text())['results']


def check_costs(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert min(row['forward ms'], row['step ms']) > 0
        assert row['forward MiB'] > 0 or row['head'] == 'cls'  # which computes nothing
        assert row['step MiB'] > row['forward MiB']


def test_cost_of_every_head(script, tmp_path, capsys):
    script('benchmarks/heads', *TINY, '--parts=[descriptors,sizes]', '--output', tmp_path)
    rows = results(tmp_path)
    check_costs(rows)
    for part, letter, values in (
        ('descriptors', 'N', [4, 6]),
        ('sizes', 'd', [4, 16]),
        ('sizes', 'K', [4, 16]),
    ):
        measured = [row for row in rows if row['part'] == part and letter in row]
        names = {row['head'] for row in measured}
        if part == 'descriptors':
            enough = [name for name in list_heads() if create_head(name, 32).least_descriptors < 4]
            assert names == set(enough)
        else:
            assert 'gmm_fisher' in names
        for name in names:
            grown = [row[letter] for row in measured if row['head'] == name]
            # More clusters than descriptors are left out.
            assert grown == values or (letter == 'K' and grown == values[:1])
    text = (tmp_path / 'benchmark.md').read_text()
    assert text.count('| `sparse_fisher` |') == 4
    assert text.strip() in capsys.readouterr().out
    assert (tmp_path / 'benchmark.png').stat().st_size > 10_000


@pytest.mark.parametrize('precision', ['float32', 'amp', 'bfloat16'])
def test_cost_inside_a_model(script, tmp_path, precision):
    options = ['--parts=[model]', '--precision', precision, '--output', tmp_path]
    script('benchmarks/heads', 'isqrt_cov', *TINY, *options)
    rows = results(tmp_path)
    check_costs(rows)
    assert [(row['head'], row['image']) for row in rows] == [('avg', 32), ('isqrt_cov', 32)]


def test_newton_schulz_is_the_same_on_the_smaller_side(script, tmp_path):
    script('benchmarks/heads', *TINY, '--parts=[newton_schulz]', '--output', tmp_path)
    rows = results(tmp_path)
    assert [(row['head'], row['pass']) for row in rows] == [
        ('isqrt_cov', 'forward'), ('isqrt_cov', 'step'), ('3g', 'forward'), ('3g', 'step'),
    ]  # fmt: skip
    for row in rows:
        assert row['relative difference'] < 1e-5
        assert row['N x N MiB'] < row['d x d MiB']


@pytest.mark.parametrize('installed', [False, True])
def test_fisher_vectors_are_those_of_vlfeat(script, tmp_path, monkeypatch, installed):
    if not installed:
        monkeypatch.setattr(ctypes.util, 'find_library', lambda _: None)
    library = ctypes.util.find_library('vl')
    script('benchmarks/heads', *TINY, '--parts=[fisher]', '--output', tmp_path)
    rows = results(tmp_path)
    assert len(rows) == 3 if library else 2
    if library:
        assert rows[-1]['relative difference'] < 1e-3
    else:
        assert 'apt-get install libvlfeat-dev' in (tmp_path / 'benchmark.md').read_text()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['sparse_fischer'], "Did you mean 'sparse_fisher'?"),
        (['--parts', '[modle]'], 'Got value: modle'),
        (['--batch', '0'], '--batch is 0; give 1 or more'),
        (['--numbers', '[4,0]'], '--numbers is [4, 0]; give 1 or more'),
        (['--device', 'gpu'], 'gpu'),
    ],
)
def test_benchmark_refuses_what_it_cannot_do(script, capsys, arguments, message):
    with pytest.raises(SystemExit):
        script('benchmarks/heads', *arguments)
    assert message in capsys.readouterr().err


def test_table_of_records():
    rows = [{'name': 'a', 'ms': 1.5, 'n': 7}, {'name': 'b', 'n': 1234}]
    ruler = '| --- | ---: | ---: |'
    assert records(rows).splitlines() == [
        '| name | ms | n |', ruler, '| a | 1.50 | 7 |', '| b |  | 1234 |'
    ]  # fmt: skip
    assert records(rows, {'n': 'number'}).splitlines()[::2] == ['| number |', '| 7 |']


def test_peak_memory_is_exact():
    def run() -> None:
        a = torch.zeros(2**18)  # 1 MiB
        b = a + 1
        del a
        c = torch.zeros(2**17)
        b + c[:1]

    assert [benchmark.peak_memory(run, 'cpu') for _ in range(3)] == [2.5 * 2**20] * 3


def test_times_are_medians_of_runs_in_turn(monkeypatch):
    monkeypatch.setattr(benchmark, 'LEAST_SECONDS', 0)
    clock, calls = [0.0], []
    monkeypatch.setattr(benchmark.time, 'perf_counter', lambda: clock[0])

    def run(name: str, seconds: list[float]) -> None:
        calls.append(name)
        clock[0] += seconds.pop(0)

    first = [100.0, 1.0, 5.0, 2.0]  # the first one is the warm-up
    second = [100.0, 9.0, 7.0, 8.0]
    medians = benchmark.median_times(
        lambda: run('a', first), lambda: run('b', second), device='cpu', repetitions=3
    )
    assert medians == [2.0, 8.0]
    assert calls == ['a', 'b'] * 4


def test_export(script, capsys):
    script('maintenance/check_export', 'avg', '--ways', '[export]')
    plain, normalized = capsys.readouterr().out.splitlines()[2:]
    assert plain.startswith('| `avg` | ok, ')
    assert normalized.startswith('| `avg`, `normalize=True` | ok, ')


@pytest.mark.slow
def test_root_on_the_smaller_side_exports():
    """torch.onnx does not take every way of adding to a diagonal."""

    class Root(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return gram_root(x, 2, 1e-3)

    check_export = load_script('maintenance/check_export')
    works, cell = check_export.check('onnx', Root().eval(), torch.rand(3, 2, 4), 1e-5)
    assert works, cell


@pytest.mark.slow
def test_every_head_compiles_and_exports(script, capsys):
    script('maintenance/check_export')
    lines = capsys.readouterr().out.splitlines()
    without_onnx = load_script('maintenance/check_export').WITHOUT_ONNX
    for name in list_heads():
        (line,) = [line for line in lines if line.startswith(f'| `{name}` |')]
        assert line.count('ok, ') == (2 if name in without_onnx else 3)


def test_export_says_why_it_fails(monkeypatch):
    check_export = load_script('maintenance/check_export')
    model, images = torch.nn.Identity(), torch.ones(2, 3)

    def check(way: Callable[..., torch.Tensor]) -> tuple[bool, str]:
        monkeypatch.setitem(check_export.WAYS, 'way', way)
        return check_export.check('way', model, images, 1e-3)

    def chained(*_: object) -> torch.Tensor:
        try:
            raise KeyError('no | such operator. And more.\nAnd more.')
        except KeyError as error:
            raise RuntimeError('Failed.') from error

    def missing(*_: object) -> torch.Tensor:
        return importlib.import_module('nowhere_to_be_found')

    assert check(lambda model, images: images) == (True, 'ok, 0e+00')
    assert check(lambda model, images: images + 0.1) == (False, 'differs by 1e-01')
    assert check(lambda model, images: images * torch.nan) == (False, 'differs by nan')
    works, reason = check(chained)
    assert not works
    assert reason.startswith("KeyError: 'no / such operator")
    assert 'more' not in reason
    works, reason = check(missing)
    assert not works
    assert 'nowhere_to_be_found is not installed' in reason
