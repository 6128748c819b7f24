"""recipes/embed.py: vectors as `timm_fisher.embed` gives them, by one process, several, and Ray."""

from __future__ import annotations

import io
import os
import signal
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLOURS, forget_launch, load_script, write_images
from run_checks import finish
from streams import write_shards

import timm_fisher
from timm_fisher.training import command_line

parquet = pytest.importorskip('pyarrow.parquet', reason='needs pip install -e ".[parquet]"')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """model/, images/COLOUR/*.png and shards/*.tar of 30 images."""
    folder = tmp_path_factory.mktemp('embed')
    torch.manual_seed(0)
    model = timm_fisher.create_model('test_resnet', 'gem', num_classes=0, img_size=32)
    timm_fisher.save_model(model, folder / 'model')
    write_images(folder / 'all', train=10)
    (folder / 'all/train').rename(folder / 'images')
    write_images(folder / 'split', train=10)
    write_shards(folder / 'split', folder / 'shards', train=(17, 1, 12))
    return folder


@pytest.fixture
def command(place, tmp_path, capsys):
    script = load_script('embed')

    def run(*arguments, images='images'):
        options = [f'--model={place / "model"}', f'--images={place / images}']
        options += [f'--output={tmp_path / "out"}', '--workers=0', '--batch_size=4']
        status = 0
        forget_launch()
        try:
            command_line.run(script.main, script.Settings, arguments=[*options, *arguments])
        except SystemExit as stopped:
            status = stopped.code
        return status, *capsys.readouterr()

    yield run
    forget_launch()


def read(folder):
    """Keys, labels and vectors of all files, in their order."""
    tables = [parquet.read_table(path) for path in sorted(folder.glob('*.parquet'))]
    rows = [row for table in tables for row in table.to_pylist()]
    vectors = np.array([row['vector'] for row in rows])
    return [row['key'] for row in rows], [row['label'] for row in rows], vectors


def expected(place):
    model = timm_fisher.from_pretrained(place / 'model')
    paths = sorted((place / 'images').rglob('*.png'))
    keys = [path.relative_to(place / 'images').as_posix() for path in paths]
    return keys, timm_fisher.embed(model, paths, workers=0).numpy()


def test_folder(command, place, tmp_path):
    """Float16 of unit length; a part that is there is not made again unless its images change."""
    status, out, _ = command('--part_size=12')
    assert status == 0
    assert '3 parts, 0 of them done' in out
    assert '30 images in' in out
    keys, labels, vectors = read(tmp_path / 'out')
    names, wanted = expected(place)
    assert keys == names
    assert labels == [name.split('/')[0] for name in names]
    np.testing.assert_allclose(vectors, wanted, atol=1e-3)
    schema = parquet.read_schema(tmp_path / 'out/part-000000.parquet')
    assert (
        str(schema.field('vector').type)
        == f'fixed_size_list<element: halffloat>[{wanted.shape[1]}]'
    )
    assert len(list((tmp_path / 'out').iterdir())) == 3

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / 'out').iterdir()}
    (tmp_path / 'out/part-000001.parquet').unlink()
    os.utime(place / 'images/red/009.png', (1, 1))
    assert '3 parts, 1 of them done' in command('--part_size=12')[1]
    same = [path.name for path, old in times.items() if path.stat().st_mtime_ns == old]
    assert same == ['part-000000.parquet']
    np.testing.assert_array_equal(read(tmp_path / 'out')[2], vectors)


def test_shards(command, place, tmp_path):
    assert command(images='shards')[0] == 0
    keys, labels, vectors = read(tmp_path / 'out')
    names, wanted = expected(place)
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [
        f'train-{i}.parquet' for i in range(3)
    ]
    assert keys == [name.removesuffix('.png') for name in names]
    assert labels == [str(list(COLOURS).index(name.split('/')[0])) for name in names]
    np.testing.assert_allclose(vectors, wanted, atol=1e-3)


def test_keys_of_shards(command, place, tmp_path):
    """As webdataset makes them: up to the first dot, whatever begins the path; in any case."""
    image = (place / 'images/red/000.png').read_bytes()
    (tmp_path / 'shards').mkdir()
    members = {
        './a/1.png': image, './a/1.cls': b'3', 'b.input.PNG': image, 'b.cls': b'4', 'c.png': image,
        'd.png': image, 'd.jpg': image,
    }  # fmt: skip
    with tarfile.open(tmp_path / 'shards/x.tar', 'w') as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    (tmp_path / 'shards/y.tar').write_bytes((tmp_path / 'shards/x.tar').read_bytes()[:1500])
    options = [f'--images={tmp_path / "shards"}']
    status, _, err = command(*options)
    assert status == 1
    assert "'d.jpg' of 'x.tar' is a second image of d" in err
    assert "'y.tar' is damaged" in err
    keys, labels, _ = read(tmp_path / 'out')
    assert dict(zip(keys, labels, strict=True)) == {'a/1': '3', 'b': '4', 'c': None, 'd': None}
    status, out, again = command(*options)
    assert (status, again) == (1, err), 'what was left out is said again'
    assert '2 parts, 2 of them done' in out


def test_precision(command, place, tmp_path, monkeypatch):
    """As `accelerate launch` says, unless an option says otherwise; parts of another are made anew.
    Float16 alone keeps 1e-3 of a number, bfloat16 1e-2."""
    exact = expected(place)[1]
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    for launched, options, largest in [
        (None, [], 1e-3),
        ('bf16', [], 3e-2),
        ('bf16', ['--mixed_precision=no'], 1e-3),
        ('no', ['--mixed_precision=bf16'], 3e-2),
    ]:
        if launched:
            monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', launched)
        status, out, _ = command(*options)
        assert (status, '0 of them done' in out) == (0, True)
        error = np.abs(read(tmp_path / 'out')[2] - exact).max()
        assert largest / 30 < error < largest


def test_other_files_of_vectors(command, place, tmp_path):
    """Of parts of another size would double the images; a damaged one is made anew."""
    assert command('--part_size=4')[0] == 0
    status, _, err = command('--part_size=12')
    assert status == 2
    assert "holds 'part-000003.parquet', which is no part of these" in err
    (tmp_path / 'out/part-000002.parquet').write_bytes(b'')
    assert '8 parts, 7 of them done' in command('--part_size=4')[1]
    assert len(read(tmp_path / 'out')[0]) == 30


def test_images_that_have_no_vector(command, place, tmp_path):
    """Are named and left out."""
    images = write_images(tmp_path / 'more', train=2)
    (images / 'train/red/bad.png').write_text('no image')
    status, out, err = command(f'--images={images / "train"}')
    assert status == 1
    assert '6 images in' in out
    assert 'bad.png' in err
    with tarfile.open(tmp_path / 'more/x.tar', 'w') as file:
        info = tarfile.TarInfo('a/bad.png')
        info.size = 4
        file.addfile(info, io.BytesIO(b'text'))
    status, out, err = command(f'--images={images}', f'--output={tmp_path / "out2"}')
    assert status == 1
    assert '0 images in' in out
    assert "'a/bad.png' of 'x.tar' cannot be read" in err


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--part_size=0'], '--part_size is 0; give 1 or more'),
        (['--images=nowhere'], "'nowhere' is no folder, or holds no image"),
        (['--model=typo'], "'typo' is no released model"),
    ],
)
def test_mistakes(command, arguments, message):
    status, _, err = command(*arguments)
    assert status == 2
    assert message in err


def test_ray_is_not_installed(command, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    status, _, err = command('--engine=ray')
    assert status == 2
    assert 'pip install "timm_fisher[ray]"' in err


@pytest.mark.slow
def test_two_processes(launch, place, command, tmp_path):
    options = {'model': place / 'model', 'images': place / 'images', 'output': tmp_path / 'two'}
    options |= {'part_size': 4, 'workers': 0, 'batch_size': 4}
    text = finish(launch('recipes/embed.py', processes=2, **options))
    assert text.count('images in') == 2
    command('--part_size=4')
    # With fewer threads each, which may round otherwise.
    np.testing.assert_allclose(read(tmp_path / 'two')[2], read(tmp_path / 'out')[2], atol=1e-3)


@pytest.mark.slow
def test_ray(place, command, tmp_path):
    """Two actors, of which one is killed, give the vectors of one process: 10 000 images."""
    ray = pytest.importorskip('ray', reason='needs pip install -e ".[ray]"')
    images = tmp_path / 'many'
    for i in range(10_000):
        path = images / f'{i % 100:02d}/{i:05d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        source = place / f'images/red/{i % 10:03d}.png'
        path.symlink_to(source)
    options = [f'--images={images}', '--part_size=250', '--batch_size=32']
    command(*options)
    alone = read(tmp_path / 'out')

    killed = []

    def kill():
        while not killed:
            time.sleep(0.1)
            if list((tmp_path / 'ray').glob('part-*.parquet')):
                for path in Path('/proc').glob('[0-9]*/cmdline'):
                    try:
                        is_actor = b'MapWorker' in path.read_bytes()
                    except OSError:
                        continue
                    if is_actor and not killed:
                        os.kill(int(path.parent.name), signal.SIGKILL)
                        killed.append(path.parent.name)

    import threading

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    try:
        status, out, err = command(
            *options, '--engine=ray', '--actors=2', f'--output={tmp_path / "ray"}'
        )
    finally:
        ray.shutdown()
    assert status == 0, err
    assert killed
    assert '10000 images in' in out
    by_ray = read(tmp_path / 'ray')
    assert by_ray[:2] == alone[:2]
    np.testing.assert_array_equal(by_ray[2], alone[2])
