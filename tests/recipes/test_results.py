"""recipes/maintenance/results.py, and the tables of the pages."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT, load_script

from timm_fisher.training.benchmark import report
from timm_fisher.training.measurements import Measurement
from timm_fisher.training.results import Result, result_of
from timm_fisher.training.rows import read_rows, write_rows


@pytest.fixture
def results():
    return load_script('maintenance/results')


PAGES = [
    page
    for page in [*sorted(ROOT.glob('recipes/**/*.md')), ROOT / 'hub_cards/README.md']
    if '<!-- results:' in page.read_text()
]


def row_of(seed):
    metrics = {
        'best': {'val_accuracy': 0.5}, 'test': {'accuracy': 0.4, 'balanced_accuracy': 0.3},
        'backbone': 'resnet18', 'head': 'gem', 'head_kwargs': {}, 'backbone_stage': -1,
        'seed': seed, 'out_features': 7, 'head_parameters': 70, 'steps': 10, 'peak_memory_mb': 5,
        'seconds': {'fit': 1.0, 'train': 2.0}, 'device': 'cpu', 'commit': 'abc', 'versions': {},
        'command': f'train --seed {seed}',
    }  # fmt: skip
    return result_of(metrics, protocol='made_up', data='leaves', name='a | b', settings={})


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_pages_show_the_rows(results, page):
    """No figure of a table is typed by hand."""
    text = page.read_text()
    assert text.count('<!-- results:') == len(results.BLOCK.findall(text))
    assert results.rebuild(text, ROOT / 'recipes/results') == text


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_figures_of_the_text_are_in_the_table(results, page):
    """Of the section that a table is in."""
    for section in re.split(r'^#+ ', page.read_text(), flags=re.M):
        tables = ' '.join(match[0] for match in results.BLOCK.finditer(section))
        figures = (
            set(re.findall(r'\b\d\d\.\d\b', results.BLOCK.sub('', section))) if tables else set()
        )
        assert not {f for f in figures if not re.search(rf'\| {f} [±|]', tables)}


def test_rows_are_added(results, tmp_path, capsys):
    """New ones, and those that replace others; the page around the table stays."""
    protocol, rows = 'made_up', [row_of(seed) for seed in range(3)]
    sent = tmp_path / 'sent.jsonl'
    write_rows(rows, sent)
    folders = {name: tmp_path / name for name in ('results', 'pages', 'pictures')}
    for folder in folders.values():
        folder.mkdir()
    write_rows(rows[:1], folders['results'] / f'{protocol}.jsonl')
    page = folders['pages'] / 'README.md'
    picture = f'![accuracies](pictures/{protocol}.png)'
    page.write_text(
        f'before\n<!-- results: {protocol} -->\nold\n<!-- end of results -->\n{picture}\nafter\n'
    )
    folders['pages'] = [folders['pages']]
    results.main(results.Settings(add=[sent], **folders))
    assert read_rows(folders['results'] / f'{protocol}.jsonl', Result) == rows
    assert f'{protocol}.jsonl: 3 rows, 2 of them new' in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith('before\n')
    assert text.endswith('\nafter\n')
    assert '| a \\| b |' in text
    assert 'old' not in text
    assert [path.name for path in folders['pictures'].iterdir()] == [f'{protocol}.png']


def test_lines_of_experiments_are_added(results, tmp_path):
    """New ones beside those that are kept; the page has the table of all."""
    folders = {name: tmp_path / name for name in ('results', 'pages', 'pictures')}
    for folder in folders.values():
        folder.mkdir()
    page = folders['pages'] / 'cluster.md'
    page.write_text('before\n<!-- results: cluster_leaves -->\n<!-- end of results -->\nafter\n')
    sent = tmp_path / 'measurements.jsonl'
    folders['pages'] = [folders['pages']]
    for seed, share in ((0, 0.5), (1, 0.7)):
        write_rows([Measurement('cluster_leaves', 'CNN', seed, {'k-means': share})], sent)
        results.main(results.Settings(add=[sent], **folders))
    assert '| CNN | 60.0 ± 14.1 |' in page.read_text()
    assert page.read_text().endswith('seeds 0, 1.\n<!-- end of results -->\nafter\n')


def test_benchmark_is_shown_as_it_was_left(results, tmp_path):
    """But for paths of the machine, which are not kept."""
    (tmp_path / 'benchmarks').mkdir()
    path = tmp_path / 'benchmarks/speed'
    settings = {'device': 'cpu', 'threads': None, 'output': path, 'batch': 2}
    report({'part': lambda: iter([('Title', '| a |\n| - |', [{'a': 1}])])}, path, settings)
    assert str(tmp_path) not in path.with_suffix('.json').read_text()
    page = results.rebuild('<!-- results: speed -->\n<!-- end of results -->', tmp_path)
    assert '**Title**\n\n| a |\n| - |\n\nMeasured with torch' in page
    assert path.with_suffix('.md').read_text() in page
