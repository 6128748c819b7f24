"""The index of a folder: what is embedded again, interruptions, and what is refused."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hostile_files import make_black_nan
from PIL import Image
from safetensors.torch import save_file

import timm_fisher
from timm_fisher.backbone import digest
from timm_fisher.errors import LoadError
from timm_fisher.retrieval import index as module
from timm_fisher.retrieval.index import (
    FORMAT,
    Index,
    embed_files,
    fingerprint,
    list_images,
    load_index,
    save_index,
    update_index,
)

# A process that makes an index, and takes at least this long for a batch.
PROCESS = """
import sys, time
from pathlib import Path
import timm_fisher
from timm_fisher.retrieval import index
embed = index.embed
def slow(*args, **options):
    time.sleep({seconds})
    return embed(*args, **options)
index.embed = slow
model = timm_fisher.from_pretrained('model')
index.update_index(
    Path('index'), Path('gallery'), model, batch_size={batch_size}, workers={workers},
    save_every={save_every},
)
"""


@pytest.fixture(scope='module')
def model():
    return create()


@pytest.fixture
def gallery(tmp_path):
    return write_gallery(tmp_path / 'gallery', 22)


def create(seed=0, **options):
    """Its bits depend on which images share a batch."""
    torch.manual_seed(seed)
    options = {'head': 'gem', 'num_classes': 0, 'img_size': 64, **options}
    return timm_fisher.create_model('test_resnet', **options).eval()


def write_gallery(folder, number, side=20):
    generator = np.random.default_rng(0)
    for i in range(number):
        path = folder / f'{i % 3}/{i:05d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(256, size=(side, side, 3), dtype=np.uint8)).save(path)
    return folder


def update(folder, gallery, model, **options):
    options = {'batch_size': 4, 'workers': 0, 'save_every': 0.0, **options}
    return update_index(folder, gallery, model, **options)


def assert_equal(index, expected):
    assert list(index.files.items()) == list(expected.files.items())
    assert torch.equal(index.vectors, expected.vectors)
    assert index.model == expected.model


def count(monkeypatch):
    """Numbers of images of each batch that is embedded from now on."""
    numbers, embed = [], module.embed

    def counted(model, x, **options):
        numbers.append(len(x))
        return embed(model, x, **options)

    monkeypatch.setattr(module, 'embed', counted)
    return numbers


def test_folders_given_as_texts(model, gallery, tmp_path):
    index, _ = update_index(str(tmp_path / 'i'), str(gallery), model, workers=0)
    assert load_index(str(tmp_path / 'i'), model).vectors.equal(index.vectors)


def test_vectors_are_those_of_embed(model, gallery, tmp_path):
    index, problems = update(tmp_path / 'index', gallery, model, workers=1)
    assert problems == []
    assert list(index.files) == sorted(
        p.relative_to(gallery).as_posix() for p in gallery.rglob('*.png')
    )
    expected = timm_fisher.embed(model, [gallery / path for path in index.files], workers=0)
    assert torch.allclose(index.vectors, expected, atol=1e-6)
    assert_equal(load_index(tmp_path / 'index', model), index)
    mode = (tmp_path / 'index/index.safetensors').stat().st_mode
    (tmp_path / 'plain').touch()
    assert mode == (tmp_path / 'plain').stat().st_mode


def test_only_new_and_changed_images(model, gallery, tmp_path, monkeypatch):
    folder = tmp_path / 'index'
    first, _ = update(folder, gallery, model)
    written = (folder / 'index.safetensors').stat().st_ino
    numbers = count(monkeypatch)
    assert_equal(update(folder, gallery, model)[0], first)
    assert numbers == []
    assert (folder / 'index.safetensors').stat().st_ino == written

    Image.new('RGB', (20, 20), 'red').save(gallery / '0/new.png')
    Image.new('RGB', (20, 20), 'blue').save(gallery / '1/00001.png')
    os.utime(gallery / '1/00004.png', ns=(0, 10**18))  # of the same size
    (gallery / '2/00002.png').unlink()
    second, _ = update(folder, gallery, model)
    assert sum(numbers) == 3
    assert list(second.files) == list(list_images(gallery))
    assert_equal(load_index(folder, model), second)
    fresh, _ = update(tmp_path / 'fresh', gallery, model)
    assert torch.allclose(second.vectors, fresh.vectors, atol=1e-6)
    assert second.files == fresh.files

    numbers.clear()
    (gallery / '0/new.png').unlink()
    third, _ = update(folder, gallery, model)
    assert numbers == []
    assert '0/new.png' not in load_index(folder, model).files
    assert len(third.vectors) == 21


def test_continued_after_any_batch(model, gallery, tmp_path, monkeypatch):
    """To the bit, though the first batch has an image that cannot be read."""
    (gallery / '0/00003.png').write_text('no image')
    expected, problems = update(tmp_path / 'expected', gallery, model, batch_size=2)
    assert problems == [
        f"'{gallery}/0/00003.png' cannot be read as an image: " + problems[0].split(': ')[1]
    ]
    shifted = timm_fisher.embed(
        model, [gallery / path for path in expected.files], batch_size=1, workers=0
    )
    assert not torch.equal(shifted, expected.vectors)  # this test could fail
    embed = module.embed
    for stop in range(1, 6):
        calls = []

        def interrupted(*args, calls=calls, stop=stop, **options):
            calls.append(1)
            if len(calls) > stop:
                raise KeyboardInterrupt
            return embed(*args, **options)

        folder = tmp_path / f'index{stop}'
        monkeypatch.setattr(module, 'embed', interrupted)
        with pytest.raises(KeyboardInterrupt):
            update(folder, gallery, model, batch_size=2, save_every=1e9)
        assert len(load_index(folder, model).files) == 2 * stop - 1  # it is saved at once
        monkeypatch.setattr(module, 'embed', embed)
        index, problems = update(folder, gallery, model, batch_size=2)
        assert len(problems) == 1
        assert_equal(index, expected)
        assert_equal(load_index(folder, model), expected)


def kill(folder, *, after, **options):
    """Start to make an index, and kill the process so many seconds after the first save."""
    options = {'seconds': 0, 'batch_size': 4, 'workers': 0, 'save_every': 0.0, **options}
    process = subprocess.Popen(
        [sys.executable, '-c', PROCESS.format(**options)], cwd=folder,
        # Sums of as many parts as here.
        env={
            **os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': str(torch.get_num_threads())
        },
        start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (folder / 'index/index.safetensors').exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(after)
        assert process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_killed(model, gallery, tmp_path):
    timm_fisher.save_model(model, tmp_path / 'model')
    kill(tmp_path, seconds=0.3, after=random.uniform(0, 1))
    done = len(load_index(tmp_path / 'index', model).files)
    assert 4 <= done < 22
    index, _ = update(tmp_path / 'index', gallery, model)
    assert_equal(index, update(tmp_path / 'expected', gallery, model)[0])
    assert_equal(load_index(tmp_path / 'index', model), index)


@pytest.mark.slow
def test_killed_while_20_000_images_are_indexed(model, tmp_path):
    gallery = write_gallery(tmp_path / 'gallery', 20_000)
    torch.manual_seed(0)
    model = timm_fisher.create_model('resnet10t', head='gem', img_size=32, num_classes=0)
    timm_fisher.save_model(model, tmp_path / 'model')
    options = {'batch_size': 32, 'workers': 1, 'save_every': 1.0}
    numbers = []
    for _ in range(3):
        kill(tmp_path, after=random.uniform(2, 6), **options)
        numbers.append(len(load_index(tmp_path / 'index', model).files))
    assert 0 < numbers[0] <= numbers[1] <= numbers[2] < 20_000
    index, problems = update(tmp_path / 'index', gallery, model, **options)
    assert problems == []
    expected, _ = update(tmp_path / 'expected', gallery, model, **options)
    assert len(expected.files) == 20_000
    assert_equal(index, expected)


def test_images_that_are_skipped(gallery, tmp_path, monkeypatch):
    """Named, also where the rest of their batch is fine."""
    make_black_nan(monkeypatch)
    (gallery / '0/00000.png').write_text('no image')
    Image.new('RGB', (20, 20)).save(gallery / '0/00003.png')
    (gallery / '0/link.png').symlink_to('nowhere')
    (gallery / '0/folder.png').mkdir()
    index, problems = update(tmp_path / 'index', gallery, create())
    assert len(index.files) == 20
    sources = [
        "'{}' cannot be read",
        "'{}' cannot be read",
        "output is zero, NaN or infinite for '{}'",
    ]
    for source, name, problem in zip(
        sources, ('00000', 'link', '00003'), sorted(problems), strict=True
    ):
        assert source.format(f'{gallery}/0/{name}.png') in problem


def test_zero_vector(tmp_path):
    """Of a black image as it is, which has no direction; by a model without a weight."""
    model = timm_fisher.create_model('pixels', head='avg', num_classes=0, img_size=8)
    model.pretrained_cfg |= {'mean': (0.0,), 'std': (1.0,)}
    paths = [tmp_path / f'{colour}.png' for colour in ('black', 'white')]
    for path in paths:
        Image.new('RGB', (8, 8), path.stem).save(path)
    ((vectors, problems),) = embed_files(model, [paths])
    assert list(vectors) == [paths[1]]
    assert problems == [f"the model's output is zero, NaN or infinite for '{paths[0]}'."]


def test_fingerprint(model, tmp_path):
    """Of what the vectors depend on: the same of a saved model, another of other weights, head,
    size or normalisation."""
    own = fingerprint(model)
    timm_fisher.save_model(model, tmp_path / 'model')
    assert fingerprint(timm_fisher.from_pretrained(tmp_path / 'model')) == own
    assert fingerprint(create(num_classes=7, pre_norm=True)) == own
    normalised = create()
    normalised.pretrained_cfg['mean'] = (0.0, 0.0, 0.0)
    others = [create(1), create(head='avg'), create(img_size=32), normalised]
    assert own not in map(fingerprint, others)
    plain, of_unit_length = create(head='avg'), create(head='avg', head_kwargs={'normalize': True})
    assert fingerprint(plain) != fingerprint(of_unit_length)


# What is refused


def test_other_model_or_images(model, gallery, tmp_path):
    update(tmp_path / 'index', gallery, model)
    before = (tmp_path / 'index/index.safetensors').read_bytes()
    with pytest.raises(
        LoadError, match=r'is of another model, .* Delete .* or give another folder'
    ):
        update(tmp_path / 'index', gallery, create(1))
    with pytest.raises(ValueError, match='none of its 22 is in'):
        update(tmp_path / 'index', write_gallery(tmp_path / 'x' / 'y', 4).parent, model)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='holds no image'):
        update(tmp_path / 'index', tmp_path / 'empty', model)
    (tmp_path / 'empty/a.png').write_text('no image')
    with pytest.raises(ValueError, match=r'No image of .* can be embedded: .*a\.png'):
        update(tmp_path / 'other', tmp_path / 'empty', model)
    assert not (tmp_path / 'other/index.safetensors').exists()
    assert (tmp_path / 'index/index.safetensors').read_bytes() == before


def test_two_processes(model, gallery, tmp_path):
    (tmp_path / 'index').mkdir()
    with (
        module.FileLock(tmp_path / 'index/.lock'),
        pytest.raises(ValueError, match='Another process is writing the index'),
    ):
        update(tmp_path / 'index', gallery, model)


def test_damaged(model, gallery, tmp_path):
    """Any byte that is changed, and any that is missing at the end."""
    update(tmp_path / 'index', gallery, model)
    path = tmp_path / 'index/index.safetensors'
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], 'little')
    places = [*range(header), *np.random.default_rng(0).integers(header, len(whole), 100)]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(LoadError):
            load_index(path.parent, model)
    for length in (0, 7, header - 1, header, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(LoadError, match='cannot be read'):
            load_index(path.parent, model)
    path.write_bytes(whole)
    assert load_index(path.parent, model) is not None


def forge(folder, of, entries, vectors=None, **changes):
    """An index as a stranger could write it, its digest included."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    if vectors is None:
        vectors = torch.eye(of.head_hidden_size)[: len(entries)]
    tensors = {'vectors': vectors, 'files': torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    about = {'format': FORMAT, 'model': fingerprint(of), 'sha256': digest(tensors), **changes}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / 'index.safetensors', about)


def test_forged(model, tmp_path):
    good = ['a.png', 1, 1]
    forge(tmp_path, model, [good])
    assert load_index(tmp_path, model).files == {'a.png': (1, 1)}
    for path in (
        '../a.png',
        '/a.png',
        'a/../../b.png',
        './a.png',
        'a//b.png',
        '.',
        '',
        '..',
        'a\0.png',
        7,
    ):
        forge(tmp_path, model, [[path, 1, 1]])
        with pytest.raises(LoadError, match='is no path in a folder'):
            load_index(tmp_path, model)
    for entry in (
        ['a.png', 1],
        ['a.png', 1, 2**63],
        ['a.png', 1, 1.0],
        ['a.png', True, 1],
        {},
        None,
    ):
        forge(tmp_path, model, [entry])
        with pytest.raises(LoadError, match='is no path in a folder with two numbers'):
            load_index(tmp_path, model)
    eye = torch.eye(model.head_hidden_size)
    for entries, options, message in (
        ([good], {'vectors': 2 * eye[:1]}, 'length of vector 0 is 2'),
        ([good], {'vectors': eye[:1] * torch.nan}, 'length of vector 0 is nan'),
        ([good], {'vectors': eye[:1].double()}, 'other tensors'),
        ([good], {'vectors': eye[0]}, 'other tensors'),
        ([good], {'vectors': eye[:1, :3]}, 'another model'),
        ([good], {'model': 'x'}, 'another model'),
        ([good], {'format': 'x\x1b[2J'}, r"its format is 'x\\x1b\[2J', not"),
        ([good], {'sha256': 'x'}, 'not what was written'),
        ([good], {'vectors': eye[:2]}, 'does not list 2 images'),
        ([['b', 1, 1], ['a', 1, 1]], {}, 'not in order'),
        ([good, good], {}, 'not in order'),
        (b'[' * 10_000, {'vectors': eye[:1]}, 'cannot be read'),
        (b' ' * 40_000, {'vectors': eye[:1]}, 'too long'),
        (b'\xff\xff', {'vectors': eye[:1]}, 'cannot be read'),
    ):
        forge(tmp_path, model, entries, **options)
        with pytest.raises(LoadError, match=message):
            load_index(tmp_path, model)


def test_names_of_any_bytes(model, tmp_path):
    names = [os.fsdecode(b'b\xe9.png'), 'ü\n=1.png']
    index = Index(
        fingerprint(model),
        dict.fromkeys(sorted(names), (1, -1)),
        torch.eye(model.head_hidden_size)[:2],
    )
    save_index(index, tmp_path / 'index')
    assert_equal(load_index(tmp_path / 'index', model), index)
    assert load_index(Path(tmp_path), model) is None
