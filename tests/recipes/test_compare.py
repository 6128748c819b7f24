"""recipes/compare.py: settings chosen on validation data, and what its table holds."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec

import pytest
import yaml
from conftest import ROOT, TINY, load_script

from timm_fisher.training.config import Config, Stage
from timm_fisher.training.results import Result
from timm_fisher.training.run import create_model


@pytest.fixture
def compare():
    return load_script('compare')


def metrics(val, test, **more):
    result = {'accuracy': test, 'balanced_accuracy': test - 0.1}
    return {
        'best': {'val_accuracy': val}, 'test': result, 'backbone': 'resnet18', 'head': 'gem',
        'head_kwargs': {}, 'backbone_stage': -1, 'out_features': 7, 'head_parameters': 70,
        'steps': 10, 'peak_memory_mb': 5, 'seconds': {'fit': 1.0, 'train': 2.0}, 'device': 'cpu',
        'commit': 'abc', 'versions': {}, **more,
    }  # fmt: skip


@pytest.fixture
def launched(compare, monkeypatch):
    """Runs that were launched, (settings, seed), in place of real ones."""
    calls = []

    def launch(options, output, log):
        rate = options['stages']['a']['lr']
        calls.append((rate, options['seed']))
        val = {0.1: 0.6, 0.2: 0.8, 0.3: 0.8, 0.4: 0.7}[rate]
        val = val if options['seed'] == 5 else 1 - val
        said = compare.command(Config(**{**options, 'stages': {'a': Stage(lr=rate)}}), 'no', 1)
        return metrics(val, 1 - rate + options['seed'] / 100, seed=options['seed'], command=said)

    monkeypatch.setattr(compare, 'launch', launch)
    return calls


def comparison_of(compare, tmp_path, **more):
    return compare.Comparison(
        output=str(tmp_path / 'out'), data_dir=str(tmp_path), seeds=[5, 6],
        train={'stages': {'a': {'lr': 1.0}}}, search={'stages.a.lr': [0.1, 0.2, 0.3, 0.4]},
        only=['x'], variants={'x': {'head': 'gem'}}, **more,
    )  # fmt: skip


def test_settings_are_chosen_on_validation_data_of_the_first_seed(compare, tmp_path, launched):
    """A better test accuracy, or another seed, must not count."""
    comparison = comparison_of(compare, tmp_path)
    rows = list(compare.compare_variants(['x'], comparison, []))
    assert launched == [(0.1, 5), (0.2, 5), (0.3, 5), (0.4, 5), (0.2, 6)]
    assert [row.settings for row in rows] == [{'stages.a.lr': rate} for rate, _ in launched]
    assert [row.accuracy for row in rows] == pytest.approx([0.95, 0.85, 0.75, 0.65, 0.86])
    assert [row.val_accuracy for row in rows] == pytest.approx([0.6, 0.8, 0.8, 0.7, 0.2])
    assert {(row.name, row.data, row.train_seconds) for row in rows} == {('x', tmp_path.name, 2.0)}


@pytest.mark.slow
def test_known_runs_are_not_repeated(compare, tmp_path, launched):
    """Those of a file of results; a run with other options is another run."""
    compare.main(comparison_of(compare, tmp_path))
    rows = compare.read_rows(tmp_path / 'out/results.jsonl', Result)
    assert len(rows) == len(launched) == 15
    kept = rows[:-1]
    compare.write_rows(kept, tmp_path / 'known.jsonl')
    launched.clear()
    compare.main(comparison_of(compare, tmp_path, known=str(tmp_path / 'known.jsonl')))
    assert launched == [(0.2, 6)]
    assert compare.read_rows(tmp_path / 'out/results.jsonl', Result) == rows
    launched.clear()
    other = comparison_of(compare, tmp_path, known=str(tmp_path / 'known.jsonl'))
    other.train['batch_size'] = 7
    compare.main(other)
    assert len(launched) == 15


def test_options_of_a_run(compare, tmp_path, monkeypatch):
    """Those of all, then what is tried; the folder is named after it."""
    monkeypatch.setattr(compare, 'launch', lambda options, output, log: (options, output, log))
    options = {'batch_size': 8, 'stages': {'a': {'lr': 1.0, 'epochs': 3}}}
    comparison = compare.Comparison(train=options, variants={'b + c': {}})
    settings = {'stages.a.lr': 0.5, 'head_kwargs.dim': 7, 'class_token': 'keep'}
    run = compare.Run('b + c', settings)
    (made,) = compare.launch_each([run], [run.config(comparison, 3)], tmp_path)
    changed, output, log = made
    config = Config(batch_size=8, seed=3, head_kwargs={'dim': 7}, class_token='keep')
    config.stages = {'a': Stage(lr=0.5, epochs=3)}
    assert changed == asdict(config)
    name = 'b+c/lr0.5-dim7-class_tokenkeep-s3'
    assert (output, log) == (tmp_path / name, tmp_path / f'{name}.log')
    assert options['stages']['a']['lr'] == 1.0


def test_grid(compare):
    """All combinations, the last option varying fastest."""
    comparison = compare.Comparison(search={'a': [1, 2], 'b.c': [3, 4]}, variants={'x': {}})
    tried = compare.settings_of('x', comparison)
    assert [(row['a'], row['b.c']) for row in tried] == [(1, 3), (1, 4), (2, 3), (2, 4)]


def test_variants(compare):
    """The baselines are always there; `only` chooses among the others."""
    variants = {'x': {'head': 'gem'}, 'y': {'head': 'gem'}}
    assert [*compare.Comparison(variants=variants, only=['y']).variants] == [
        *compare.BASELINES,
        'y',
    ]
    assert [*compare.Comparison(variants=variants).variants] == [*compare.BASELINES, 'x', 'y']
    for seeds in ([], [1, 1]):
        with pytest.raises(ValueError, match='seeds is'):
            compare.Comparison(seeds=seeds)


@pytest.mark.parametrize(
    'name', ['compare_finetune', 'probe', 'release_search', 'sparse_fisher_steps']
)
def test_configuration_is_one_of_train(compare, name):
    """Each variant of a configuration that is shipped is a model that can be built."""
    config = yaml.safe_load((ROOT / f'recipes/configs/{name}.yaml').read_text())
    for variant in {**compare.BASELINES, **config['variants']}.values():
        options = {**config['train'], **variant}
        options |= {'backbone': 'test_resnet', 'pretrained': False}
        left_out = {'stages', 'search'} | (set() if find_spec('peft') else {'lora'})
        settings = {key: options[key] for key in options if key not in left_out}
        create_model(Config(**settings), 3)


def test_one_pass(compare, images, tmp_path, monkeypatch, capsys):
    """All heads and settings of a seed side by side; what is there is not trained again."""
    comparison = compare.Comparison(
        output=str(tmp_path / 'out'), data_dir=str(images), seeds=[0, 1], one_pass=True,
        search={'stages.only.lr': [0.001, 0.01]},
        train={
            **TINY, 'cache_dir': str(tmp_path / 'cache'), 'pre_norm': True,
            'stages': {'only': {'train': 'classifier', 'epochs': 2}},
        },
        variants={
            'gem, trained': {'head': 'gem', 'stages': {'only': {'train': 'head', 'epochs': 2}}},
            'both': {'head': 'avg + gem@-3', 'backbone_stage': -1},
        },
    )  # fmt: skip
    calls = []
    train_probes = compare.train_probes
    monkeypatch.setattr(
        compare, 'train_probes', lambda configs: calls.append(len(configs)) or train_probes(configs)
    )
    compare.main(comparison)
    assert calls == [8, 4]
    table = (tmp_path / 'out/table.md').read_text()
    assert table in capsys.readouterr().out
    header, _, *lines = [line.split(' | ') for line in table.splitlines() if line.startswith('|')]
    assert [line[0] for line in lines] == ['| avg', '| avg + power_l2', '| gem, trained', '| both']
    assert [bool(line[header.index('k-NN')]) for line in lines] == [True, True, False, True]
    assert {line[header.index('chosen')] for line in lines} <= {'lr 0.001', 'lr 0.01'}
    compare.main(comparison)
    assert calls == [8, 4]
    comparison.known, comparison.output = str(tmp_path / 'out/results.jsonl'), str(tmp_path / 'b')
    compare.main(comparison)
    assert calls == [8, 4]
    rows = compare.read_rows(tmp_path / 'out/results.jsonl', Result)
    assert [row.seed for row in rows] == [0] * 8 + [1] * 4
    assert {row.data for row in rows} == {images.name}


COMMAND = [sys.executable, 'recipes/compare.py']


@pytest.mark.slow
def test_the_command(images, tmp_path):
    """Through real runs; interrupted, it goes on where it was."""
    config = {
        'seeds': [0, 1],
        'data_dir': str(images),
        'search': {'stages.only.lr': [0.001, 0.1]},
        'train': {
            'backbone': 'test_resnet', 'backbone_stage': -2, 'img_size': 32, 'workers': 0,
            'cache_dir': str(tmp_path / 'cache'),
            'stages': {'only': {'train': 'classifier', 'epochs': 2}},
        },
        'variants': {
            'two': {'head': [{'name': 'avg'}, {'name': 'gem', 'stage': -3}]},
            'fisher': {'head': 'sparse_fisher', 'head_kwargs': {'code_dim': 4}},
        },
    }  # fmt: skip
    file = tmp_path / 'compare.yaml'
    file.write_text(yaml.safe_dump(config))
    command = [*COMMAND, '--config', str(file), '--output', str(tmp_path / 'out')]
    first = subprocess.run(
        [*command, '--only', '["two"]'], cwd=ROOT, capture_output=True, text=True
    )
    assert first.returncode == 0, first.stderr
    assert [line.split(' | ')[0] for line in first.stdout.splitlines()[2:5]] == [
        '| avg', '| avg + power_l2', '| two',
    ]  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob('out/**/metrics.json')}
    assert len(before) == 9
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert '| fisher |' in second.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # Rows are recognised by their command, from wherever they come.
    known = ['--known', str(tmp_path / 'out/results.jsonl'), '--output', str(tmp_path / 'new')]
    third = subprocess.run([*command, *known], cwd=ROOT, capture_output=True, text=True)
    assert third.returncode == 0, third.stderr
    assert third.stdout.endswith(second.stdout)
    assert not [*tmp_path.glob('new/**/metrics.json')]


def test_unsupervised_stages_are_refused(compare, tmp_path):
    """Of any variant, before anything is run."""
    stages = {'only': {'unsupervised': True, 'train': 'head'}}
    variants = {'x': {'head': 'gsnmf', 'stages': stages, 'search': {'stages.only.lr': [0.1]}}}
    comparison = compare.Comparison(output=str(tmp_path / 'out'), variants=variants)
    with pytest.raises(ValueError, match="No stage of 'x' trains a classifier"):
        compare.main(comparison)
    assert not (tmp_path / 'out').exists()


def test_mistyped_stage_of_a_search_is_refused(compare, tmp_path, capsys):
    """It would be a stage of its own, with default settings."""
    stages = {'only': {'train': 'classifier'}}
    search = {'stages.onyl.lr': [0.1]}
    comparison = compare.Comparison(
        output=str(tmp_path / 'out'), train={'stages': stages}, search=search
    )
    with pytest.raises(SystemExit):
        compare.main(comparison)
    assert "stages has no 'onyl', only ['only']" in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_equal_values_of_a_search_are_refused(compare):
    with pytest.raises(ValueError, match=r'a.lr is \[1, 1\]; give one or more'):
        compare.Comparison(variants={'x': {'search': {'a.lr': [1, 1]}}})


def test_wrong_variant_is_named(compare):
    with pytest.raises(ValueError, match=r"--only names \['agv'\]; the variants are \['avg'"):
        compare.Comparison(only=['agv'])
