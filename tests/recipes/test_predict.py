"""recipes/predict.py: classes as by hand, where the overlays go, and what is refused."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, load_script
from hostile_files import NO_IMAGES, make_black_nan, write_nan
from limits import within
from PIL import Image
from torch import nn

import timm_fisher
from timm_fisher.training import command_line

NAMES = ['ash', 'beech', 'elm', 'fir', 'oak']


@pytest.fixture(scope='module')
def predict():
    return load_script('predict')


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A model, and the folder that it was saved in."""
    folder = tmp_path_factory.mktemp('model')
    return save(folder, head='gem'), folder


@pytest.fixture
def command(predict, saved, tmp_path, monkeypatch, capsys):
    """`command(IMAGE, ...)` in `tmp_path` -> exit status, predictions.csv, stdout, stderr."""

    def run(*arguments, model=saved[1]):
        arguments = ['--model', model, '--output', 'out', *arguments]
        monkeypatch.chdir(tmp_path)
        status = 0
        try:
            command_line.run(
                predict.main,
                predict.Settings,
                positional='images',
                arguments=list(map(str, arguments)),
            )
        except SystemExit as stopped:
            status = stopped.code
        table = tmp_path / 'out' / 'predictions.csv'
        rows = list(csv.DictReader(table.open())) if table.exists() else None
        return status, rows, *capsys.readouterr()

    return run


def save(folder, *, backbone='test_resnet', head='avg', label_names=NAMES, **arguments):
    torch.manual_seed(0)
    arguments = {'num_classes': 5, 'img_size': 64, **arguments}
    model = timm_fisher.create_model(backbone, head=head, **arguments).eval()
    nn.init.normal_(model.classifier.weight)  # classes that differ
    nn.init.normal_(model.classifier.bias)
    timm_fisher.save_pretrained(model, folder, label_names=label_names)
    return model


def photo(path, *, seed=0, size=(90, 70), mode='RGB', **options):
    shape = (size[1], size[0], 3)[: 3 if mode == 'RGB' else 2]
    pixels = np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def by_hand(model, image):
    """Names and probabilities, best first."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        probabilities = model(transform(image)[None]).softmax(1)[0].sort(descending=True)
    return [NAMES[i] for i in probabilities.indices], probabilities.values.tolist()


# The command


def test_command_line(saved, tmp_path):
    model, folder = saved
    path = photo(tmp_path / 'photo.png')
    run = subprocess.run(
        [sys.executable, ROOT / 'recipes/predict.py', path, '--model', folder],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    names, probabilities = by_hand(model, Image.open(path))
    first, *lines, last = run.stdout.splitlines()
    assert (first, last) == (str(path), '-> runs/predict')
    expected = [f'  {p:7.2%}  {name}' for p, name in zip(probabilities, names, strict=True)]
    assert lines == expected[:3]
    with Image.open(tmp_path / 'runs/predict/overlays/photo.png.png') as overlay:
        assert overlay.format == 'PNG'


def test_probabilities_are_those_of_timms_transform(command, saved, tmp_path):
    """More images than a batch, in a folder of folders."""
    for i in range(10):
        photo(tmp_path / f'photos/{i % 2}/{i}.{"PNG" if i else "jpg"}', seed=i)
    (tmp_path / 'photos/notes.txt').write_text('no image')
    status, rows, *_ = command('photos', '--topk=9', '--overlay=false')
    assert status == 0
    paths = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.glob('photos/*/*'))
    assert [row['image'] for row in rows[::5]] == paths
    for start, path in enumerate(paths):
        names, probabilities = by_hand(saved[0], Image.open(tmp_path / path))
        shown = rows[5 * start : 5 * start + 5]
        assert [row['image'] for row in shown] == [path] * 5
        assert [row['rank'] for row in shown] == list('12345')
        assert [row['class'] for row in shown] == names
        assert [float(row['probability']) for row in shown] == pytest.approx(
            probabilities, abs=1e-5
        )
    assert not (tmp_path / 'out/overlays').exists()


def test_grey_model_on_a_colour_backbone(command, tmp_path):
    """Of colour images too; mean and deviation are the averages over the colours, as in timm."""
    model = save(tmp_path / 'model', in_chans=1)
    path = photo(tmp_path / 'photo.png')
    data = timm.data.resolve_model_data_config(model) | {'mean': (0.5,), 'std': (0.5,)}
    image = timm.data.create_transform(**data)(Image.open(path).convert('L'))
    expected = model(image[None]).softmax(1).max().item()
    status, rows, *_ = command('photo.png', '--topk=1', model='model')
    assert (status, len(rows)) == (0, 1)
    assert float(rows[0]['probability']) == pytest.approx(expected, abs=1e-5)
    assert (tmp_path / 'out/overlays/photo.png.png').exists()


def test_pixels_have_no_parts(command, tmp_path):
    save(tmp_path / 'model', backbone='pixels', img_size=8)
    photo(tmp_path / 'digit.png', size=(8, 8), mode='L')
    status, rows, stdout, _ = command('digit.png', model='model')
    assert (status, len(rows)) == (0, 3)
    assert 'No overlays: this model pools one descriptor of the whole image.' in stdout
    assert not (tmp_path / 'out/overlays').exists()


def test_images_of_one_name(command, tmp_path):
    for i, folder in enumerate('ab'):
        photo(tmp_path / f'photos/{folder}/x.png', seed=i)
    _, rows, *_ = command('photos/a/x.png', 'photos')  # the first is in the folder, too
    assert [row['image'] for row in rows] == ['photos/a/x.png'] * 3 + ['photos/b/x.png'] * 3
    first, second = ((tmp_path / f'out/overlays/{f}/x.png.png').read_bytes() for f in 'ab')
    assert first != second


@pytest.mark.parametrize('output', ['photos', 'photos/out'])
def test_overlays_of_an_earlier_call_are_no_photographs(command, tmp_path, output):
    photo(tmp_path / 'photos/folder.png/x.png')
    for _ in range(2):
        status, *_ = command('photos', '--output', tmp_path / output)
        assert status == 0
    assert (tmp_path / output / 'overlays/x.png.png').exists()
    rows = list(csv.DictReader((tmp_path / output / 'predictions.csv').open()))
    assert [row['image'] for row in rows] == ['photos/folder.png/x.png'] * 3


def test_name_that_is_no_utf8(command, tmp_path):
    path = os.fsdecode(b'b\xe9.png')
    try:
        photo(tmp_path / path)
    except OSError:
        pytest.skip('this file system takes names in UTF-8 only')
    status, rows, stdout, _ = command(path)
    assert status == 0
    assert [row['image'] for row in rows] == ['b\\xe9.png'] * 3
    assert stdout.startswith('b\\xe9.png\n')
    assert (tmp_path / f'out/overlays/{path}.png').exists()


def test_name_that_a_terminal_would_obey(command, tmp_path):
    path = 'b\x1b[31m\n.png'
    photo(tmp_path / path)
    (tmp_path / 'c\x1b[31m.png').write_text('no image')
    status, rows, stdout, stderr = command(path, 'c\x1b[31m.png')
    assert status == 1
    assert [row['image'] for row in rows] == ['b\\x1b[31m\\n.png'] * 3
    assert stdout.startswith('b\\x1b[31m\\n.png\n')
    assert r"'c\x1b[31m.png' cannot be read" in stderr
    assert '\x1b' not in stdout + stderr


def test_names_that_a_spreadsheet_would_compute(command, tmp_path):
    save(tmp_path / 'model', label_names=['=1+1', '+a', '-b', '@c', 'd'])
    photo(tmp_path / '=2+2.png')
    _, rows, stdout, _ = command('=2+2.png', '--topk=5', model='model')
    assert {row['image'] for row in rows} == {"'=2+2.png"}
    assert {row['class'] for row in rows} == {"'=1+1", "'+a", "'-b", "'@c", 'd'}
    assert '=2+2.png\n' in stdout
    assert '%  =1+1\n' in stdout


def test_classes_without_names(command, tmp_path):
    model = save(tmp_path / 'model', label_names=None)
    path = photo(tmp_path / 'photo.png')
    _, rows, *_ = command('photo.png', '--overlay=false', model='model')
    expected = by_hand(model, Image.open(path))[0][:3]
    assert [row['class'] for row in rows] == [str(NAMES.index(name)) for name in expected]


# What is refused


def test_unreadable_images(command, tmp_path):
    """They are named and skipped, within a batch or all of one; the others count."""
    whole = photo(tmp_path / 'photos/b.png').read_bytes()
    for i in range(9):
        (tmp_path / f'photos/c{i}.png').write_bytes(whole[:2000] if i % 2 else b'text')
    status, rows, _, stderr = command('photos', '--overlay=false')
    assert status == 1
    assert [row['image'] for row in rows] == ['photos/b.png'] * 3
    for i in range(9):
        assert f"Skipped: 'photos/c{i}.png' cannot be read as an image: " in stderr


@pytest.mark.parametrize('kind', NO_IMAGES)
def test_files_that_hang_or_burst(command, tmp_path, kind):
    photo(tmp_path / 'photos/a.png')
    write, reason = NO_IMAGES[kind]
    write(tmp_path / 'photos/b.png')
    with within(20):
        status, rows, _, stderr = command('photos', '--overlay=false')
    assert (status, len(rows)) == (1, 3)
    assert re.search(f"Skipped: 'photos/b.png' cannot be read as an image: .*{reason}", stderr)


@pytest.mark.parametrize('overlay', ['true', 'false'])
def test_output_that_is_nan(command, tmp_path, monkeypatch, overlay):
    """That image is skipped, with its name; so is one with pixels that are NaN."""
    make_black_nan(monkeypatch)
    photo(tmp_path / 'photos/c.png')
    Image.new('RGB', (50, 50)).save(tmp_path / 'photos/b.png')
    write_nan(tmp_path / 'photos/a.png')
    status, rows, _, stderr = command('photos', f'--overlay={overlay}')
    assert status == 1
    assert [row['image'] for row in rows] == ['photos/c.png'] * 3
    assert "Skipped: the model's output is NaN or infinite for 'photos/b.png'." in stderr
    assert "Skipped: 'photos/a.png' cannot be read as an image: it has NaN or infinite" in stderr
    overlays = [path.name for path in (tmp_path / 'out').rglob('*.png')]
    assert overlays == ['c.png.png'] * (overlay == 'true')


@pytest.mark.parametrize(
    ('arguments', 'error'),
    [
        (['empty'], r"'empty' holds no image \(.png .jpg .jpeg .webp\)"),
        (['typo.png'], "'typo.png' is neither a file nor a folder"),
        (['photo.png', '--topk=0'], '--topk is 0; give 1 or more'),
        (['photo.png', '--model=typo'], "'typo' is no released model, no folder"),
    ],
)
def test_refused(command, tmp_path, arguments, error):
    photo(tmp_path / 'photo.png')
    (tmp_path / 'empty').mkdir()
    status, rows, _, stderr = command(*arguments)
    assert (status, rows) == (2, None)
    assert re.search(error, stderr)
