"""Files of a saved model are replaced all together, or not at all."""

import errno
import filecmp
import itertools
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import timm
import torch

import timm_fisher
from timm_fisher.hub.replace import check_whole, replace_files
from timm_fisher.hub.save import FILES, WEIGHTS


def create(head='avg'):
    """With every weight moved from where it starts, so that loading must restore all."""
    model = timm_fisher.create_model('test_resnet', head, num_classes=5).eval()
    for value in model.state_dict(keep_vars=True).values():
        if value.is_floating_point():
            value.data.mul_(1 + 0.1 * torch.rand_like(value))
    return model


def load(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def write(beside, **texts):
    for name, text in texts.items():
        (beside / name).write_text(text)


# Errors, such as a full disk


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, 'No space left on device')


def half_written(state, path):
    Path(path).write_bytes(b'half')
    no_space()


def fail_at(call, function):
    """`function`, but its call of this number, counted from 1, finds no space."""
    calls = itertools.count(1)
    return lambda *args, **kwargs: (no_space if next(calls) == call else function)(*args, **kwargs)


@pytest.mark.parametrize(
    ('place', 'failing'),
    [
        ('timm_fisher.hub.save.save_file', half_written),
        ('os.fsync', fail_at(1, os.fsync)),
        ('os.replace', fail_at(1, os.replace)),
        ('os.replace', fail_at(2, os.replace)),
    ],
    ids=['write', 'sync', 'first rename', 'second rename'],
)
def test_failed_save_leaves_what_was_there(tmp_path, monkeypatch, place, failing):
    old, x = create(), images()
    timm_fisher.save_model(old, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(place, failing)
        with pytest.raises(OSError, match='No space left'):
            timm_fisher.save_model(create('gem'), tmp_path)
    assert sorted(content_names(tmp_path)) == ['config.json', WEIGHTS]
    assert torch.equal(load(tmp_path)(x), old(x))

    new = create('gem')
    timm_fisher.save_model(new, tmp_path)
    assert torch.equal(load(tmp_path)(x), new(x))


def content_names(folder):
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize('call', [1, 2, 3, 4, 5, 6])
def test_an_error_at_each_move(tmp_path, monkeypatch, call):
    """Also where a file is new, or goes."""
    old = {'a': 'old a', 'b': 'old b', 'gone': 'old'}
    write(tmp_path, **old, own='of the user')
    new = partial(write, a='new a', b='new b', fresh='new')
    with monkeypatch.context() as patch:
        patch.setattr('os.replace', fail_at(call, os.replace))
        with pytest.raises(OSError, match='No space left'):
            replace_files(tmp_path, new, remove=['gone', 'never there'])
    check_whole(tmp_path)
    assert content(tmp_path) == {**old, 'own': 'of the user'}
    replace_files(tmp_path, new, remove=['gone', 'never there'])
    expected = {'a': 'new a', 'b': 'new b', 'fresh': 'new', 'own': 'of the user'}
    assert content(tmp_path) == expected


def test_what_cannot_be_taken_back_is_refused(tmp_path, monkeypatch):
    write(tmp_path, a='old a', b='old b')
    calls = itertools.count(1)
    rename = os.replace
    monkeypatch.setattr('os.replace', lambda *p: no_space() if next(calls) > 2 else rename(*p))
    with pytest.raises(OSError, match='No space left'):
        replace_files(tmp_path, partial(write, a='new a', b='new b'))
    with pytest.raises(timm_fisher.LoadError, match='may hold files of two models'):
        check_whole(tmp_path)
    assert [path.read_text() for path in tmp_path.glob('.replacing-*/b.old')] == ['old b']


def test_an_error_where_nothing_was(tmp_path):
    with pytest.raises(OSError, match='No space'):
        replace_files(tmp_path / 'new', no_space)
    assert content(tmp_path / 'new') == {}


# Killed processes

KILLED = """
import os, sys, timm_fisher, torch
torch.set_num_threads(1)
folder, saved = sys.argv[1:]
model = timm_fisher.from_pretrained(saved)
rename = os.replace
for call in range(1, 9):
    if os.fork():
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 9
        continue
    calls = iter(range(1, 9))
    os.replace = lambda *args: os._exit(9) if next(calls) == call else rename(*args)
    timm_fisher.save_pretrained(model, f'{folder}/{call}', metrics={'val': {'accuracy': 1}})
"""


@pytest.mark.slow
def test_killed_save_leaves_no_mixture(tmp_path):
    """The process ends at each rename, with nothing cleaned up: the folder, complete before, is not
    loaded or pushed, until a model is saved there again."""
    timm_fisher.save_pretrained(create(), tmp_path / 'old')
    new = create()  # of the same shapes: nothing else would tell them apart
    timm_fisher.save_model(new, tmp_path / 'new')
    for call in range(1, 9):
        shutil.copytree(tmp_path / 'old', tmp_path / str(call))
    subprocess.run([sys.executable, '-c', KILLED, tmp_path, tmp_path / 'new'], check=True)
    same = set()
    push = partial(timm_fisher.push_folder, repo_id='user/name')
    for call in range(1, 9):
        folder = tmp_path / str(call)
        names = [path.name for path in folder.iterdir() if path.is_file()]
        assert len(names) == len(FILES) - (call + 1) % 2
        same |= {(call, n) for n in names if filecmp.cmp(folder / n, tmp_path / 'old' / n, False)}
        (beside,) = folder.glob('.replacing-*')
        for wrong in (timm_fisher.from_pretrained, push):
            with pytest.raises(timm_fisher.LoadError, match='may hold files of two models') as e:
                wrong(folder)
            assert str(beside) in str(e.value)
        with pytest.raises((timm_fisher.LoadError, FileNotFoundError)):
            load(folder)
        assert len(list(beside.glob('*.old'))) == call // 2
        timm_fisher.save_pretrained(new, folder)
        assert sorted(content_names(folder)) == sorted(FILES)
        assert torch.equal(load(folder)(images()), new(images()))
    assert (1, WEIGHTS) in same
    assert (3, WEIGHTS) not in same


def test_earlier_files_can_be_taken_back(tmp_path):
    """As the error says."""
    write(tmp_path, a='old')
    subprocess.run(
        [
            sys.executable,
            '-c',
            'import os, sys; from pathlib import Path; from timm_fisher.hub import replace\n'
            'rename = os.replace\n'
            "os.replace = lambda *p: rename(*p) if str(p[1]).endswith('.old') else os._exit(9)\n"
            "replace.replace_files(Path(sys.argv[1]), lambda b: (b / 'a').write_text('new'))",
            tmp_path,
        ]
    )
    with pytest.raises(timm_fisher.LoadError, match='Save the model again; or move the files'):
        check_whole(tmp_path)
    (beside,) = tmp_path.glob('.replacing-*')
    os.replace(beside / 'a.old', tmp_path / 'a')
    shutil.rmtree(beside)
    check_whole(tmp_path)
    assert content(tmp_path) == {'a': 'old'}


def test_what_a_killed_process_was_writing_goes(tmp_path):
    """After an hour; until then it may be alive. It does not keep the folder from being loaded."""
    for name, age in (('old', 4000), ('new', 0)):
        beside = tmp_path / f'.saving-{name}'
        beside.mkdir()
        (beside / WEIGHTS).write_bytes(b'half')
        os.utime(beside, (time.time() - age,) * 2)
    check_whole(tmp_path)
    replace_files(tmp_path, partial(write, a='new'))
    assert sorted(content_names(tmp_path)) == ['.saving-new', 'a']
