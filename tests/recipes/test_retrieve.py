"""recipes/retrieve.py: nearest images as by hand, metrics, and what is refused."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import COLOURS, ROOT, load_script, write_images
from PIL import Image

import timm_fisher
from timm_fisher.retrieval.metrics import evaluate_retrieval
from timm_fisher.training import command_line


@pytest.fixture(scope='module')
def retrieve():
    return load_script('retrieve')


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A model, and the folder that it was saved in."""
    folder = tmp_path_factory.mktemp('model')
    torch.manual_seed(0)
    model = timm_fisher.create_model('test_resnet', head='gem', num_classes=0, img_size=32).eval()
    timm_fisher.save_model(model, folder)
    return model, folder


@pytest.fixture
def command(retrieve, saved, tmp_path, monkeypatch, capsys):
    """`command(OPTION, ...)` in `tmp_path` -> exit status, stdout, stderr; with images
    gallery/COLOUR/00I.png and others/COLOUR/000.png."""
    write_images(tmp_path, gallery=4)
    write_images(tmp_path, others=1, seed=1)
    monkeypatch.chdir(tmp_path)

    def run(*arguments, model=saved[1]):
        options = ['--gallery=gallery', '--index=index', '--output=out', '--workers=0']
        words = [f'--model={model}', *options, *arguments]
        status = 0
        try:
            command_line.run(retrieve.main, retrieve.Settings, arguments=words)
        except SystemExit as stopped:
            status = stopped.code
        return status, *capsys.readouterr()

    return run


def rows_of(folder):
    return list(csv.DictReader((folder / 'out/results.csv').open()))


def embed(model, folder):
    paths = sorted(folder.rglob('*.png'))
    return [str(path) for path in paths], timm_fisher.embed(model, paths, workers=0)


@pytest.mark.slow
def test_command_line(saved, tmp_path):
    write_images(tmp_path, gallery=3)
    run = subprocess.run(
        [
            sys.executable, ROOT / 'recipes/retrieve.py', '--model', saved[1], '--gallery',
            'gallery', '--index', 'index', '--queries', '[gallery/red/001.png]', '--topk', '2',
            '--workers', '1',
        ],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    first, query, nearest, _, last = run.stdout.splitlines()
    assert first == '9 images of gallery in index'
    assert (query, last) == ('gallery/red/001.png', '-> runs/retrieve')
    assert nearest == '  1.0000  gallery/red/001.png'


def test_nearest_images(command, saved, tmp_path):
    status, stdout, _ = command('--queries=[others/red/000.png, others/blue/000.png]', '--topk=3')
    assert status == 0
    paths, gallery = embed(saved[0], tmp_path / 'gallery')
    rows = rows_of(tmp_path)
    assert len(rows) == 6
    for query, part in (('red', rows[:3]), ('blue', rows[3:])):
        vector = timm_fisher.embed(saved[0], [f'others/{query}/000.png'], workers=0)
        values, places = (gallery @ vector[0]).topk(3)
        assert [row['query'] for row in part] == [f'others/{query}/000.png'] * 3
        assert [row['rank'] for row in part] == ['1', '2', '3']
        assert [str(tmp_path / row['image']) for row in part] == [paths[i] for i in places]
        similarities = [float(row['similarity']) for row in part]
        assert similarities == pytest.approx(values.tolist(), abs=1e-5)
        assert f'  {similarities[0]:.4f}  {part[0]["image"]}\n' in stdout
    with Image.open(tmp_path / 'out/contact.png') as sheet:
        assert sheet.format == 'PNG'
        assert sheet.width > sheet.height  # 2 rows of 4


def test_contact_sheet_is_bounded(command, retrieve, tmp_path, monkeypatch):
    shapes = []
    monkeypatch.setattr(retrieve, 'save_png', lambda figure, _: shapes.append(len(figure.axes)))
    monkeypatch.setattr(retrieve, 'MOST_ROWS', 2)
    monkeypatch.setattr(retrieve, 'MOST_COLUMNS', 3)
    queries = ', '.join(f'others/{colour}/000.png' for colour in COLOURS)
    assert command(f'--queries=[{queries}]', '--topk=100')[0] == 0
    assert shapes == [2 * 4]
    assert len(rows_of(tmp_path)) == 3 * 12


def test_evaluate(command, saved, tmp_path):
    status, stdout, _ = command('--evaluate=true')
    assert status == 0
    paths, vectors = embed(saved[0], tmp_path / 'gallery')
    labels = [path.split('/')[-2] for path in paths]
    metrics = json.loads((tmp_path / 'out/metrics.json').read_text())
    assert metrics == pytest.approx(evaluate_retrieval(vectors, labels))
    assert metrics['queries'] == 12
    assert re.search(rf'\| map \| {metrics["map"]:#.3g} \|', stdout)
    assert not (tmp_path / 'out/results.csv').exists()

    (tmp_path / 'others/red').rename(tmp_path / 'others/violet')
    status, *_ = command('--evaluate=true', '--queries_dir=others')
    paths, queries = embed(saved[0], tmp_path / 'others')
    of_queries = [path.split('/')[-2] for path in paths]
    metrics = json.loads((tmp_path / 'out/metrics.json').read_text())
    assert metrics == pytest.approx(evaluate_retrieval(queries, of_queries, vectors, labels))
    assert (metrics['queries'], metrics['queries_without_match']) == (2, 1)

    # Other queries, and another model, with the same output.
    shutil.copytree(tmp_path / 'gallery', tmp_path / 'copy')
    assert command('--evaluate=true', '--queries_dir=copy')[0] == 0
    assert json.loads((tmp_path / 'out/metrics.json').read_text())['recall_at_1'] == 1
    other = timm_fisher.create_model('test_resnet', head='avg', num_classes=0, img_size=32)
    timm_fisher.save_model(other, tmp_path / 'other')
    options = ['--evaluate=true', '--queries_dir=others', '--index=index2']
    assert command(*options, model='other')[0] == 0
    for path in (tmp_path / 'others').rglob('*.png'):
        path.write_text('no image')
    status, _, stderr = command(*options, model='other')
    assert status == 2
    assert "No image of 'others' can be embedded" in stderr


def test_images_that_are_skipped(command, tmp_path):
    (tmp_path / 'gallery/red/002.png').write_text('no image')
    (tmp_path / 'b\x1b.png').write_text('no image')
    status, stdout, stderr = command('--queries=["b\\e.png", others/red/000.png]')
    assert status == 1
    assert "Skipped: 'gallery/red/002.png' cannot be read as an image" in stderr
    assert r"Skipped: 'b\x1b.png' cannot be read as an image" in stderr
    assert '\x1b' not in stdout + stderr
    assert len(rows_of(tmp_path)) == 8
    assert stdout.startswith('11 images of gallery in index\n')


def test_names_that_a_spreadsheet_would_compute(command, tmp_path):
    random = np.random.default_rng(0)
    pixels = random.integers(256, size=(32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / '=1+1.png')
    command('--queries=["=1+1.png"]', '--topk=1')
    assert [row['query'] for row in rows_of(tmp_path)] == ["'=1+1.png"]


@pytest.mark.parametrize(
    ('arguments', 'error'),
    [
        (['--topk=0'], '--topk is 0; give 1 or more'),
        (['--queries=[typo.png]'], "There is no file 'typo.png'"),
        (['--gallery=typo'], "'typo' is no folder, or holds no image"),
        (['--evaluate=true', '--queries_dir=gallery/red'], 'each query would find itself'),
        (['--queries_dir=others'], '--queries_dir is for --evaluate true'),
        (['--output=gallery/out'], "--output 'gallery/out' is in 'gallery'"),
        (['--gallery=gallery/red', '--evaluate=true'], "'000.png' of 'gallery/red' is in no subf"),
        (['--model=typo'], "'typo' is no released model, no folder"),
    ],
)
def test_refused(command, tmp_path, arguments, error):
    status, _, stderr = command(*arguments)
    assert status == 2
    assert error in stderr
    assert not (tmp_path / 'out/metrics.json').exists()


def test_index_of_another_model(command, tmp_path):
    assert command()[0] == 0
    other = timm_fisher.create_model('test_resnet', head='avg', num_classes=0, img_size=32)
    timm_fisher.save_model(other, tmp_path / 'other')
    status, _, stderr = command(model='other')
    assert status == 2
    assert 'is of another model' in stderr
