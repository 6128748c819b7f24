"""Training and fits on images that are read as they come."""

from __future__ import annotations

import io
import json
import re
import tarfile
from statistics import fmean, stdev

import pytest
import torch
from conftest import COLOURS, DATA, TINY, write_images
from run_checks import finish, read_log, read_metrics, read_weights, slow
from streams import write_shards

from timm_fisher.hub.pypi import write_lite0
from timm_fisher.numerics.hashing import numbers_of_contents
from timm_fisher.training.config import Config
from timm_fisher.training.data import create_datasets, load_splits
from timm_fisher.training.features import create_loader
from timm_fisher.training.streams import _expand, _open, create_streams, load_streams

datasets = pytest.importorskip('datasets', reason='needs pip install -e ".[hfds]"')
CLASSES = list(COLOURS)
STAGES = {'only': {'train': 'head', 'epochs': 3, 'lr': 0.01}}
PREPROCESSING = {
    'input_size': (3, 32, 32), 'interpolation': 'bicubic', 'mean': (0.5,) * 3, 'std': (0.25,) * 3,
    'crop_pct': 1.0, 'crop_mode': 'center',
}  # fmt: skip


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images'), train=10, val=4, test=5)


@pytest.fixture(scope='module')
def shards(folder, tmp_path_factory):
    """Of 17, 1 and 12 training images, 12 validation and 15 test images."""
    return write_shards(folder, tmp_path_factory.mktemp('shards'), train=(17, 1, 12))


@pytest.fixture(scope='module')
def parquet(folder, tmp_path_factory):
    return write_parquet(folder, tmp_path_factory.mktemp('parquet'))


def write_parquet(folder, place):
    """The same images in parquet files of 🤗 datasets, under other names of columns."""
    classes = sorted(path.name for path in (folder / 'train').iterdir())
    for split in ('train', 'val', 'test'):
        paths = sorted((folder / split).glob('*/*'))
        rows = {
            'photo': [str(path) for path in paths],
            'colour': [classes.index(path.parent.name) for path in paths],
        }
        features = {'photo': datasets.Image(), 'colour': datasets.ClassLabel(names=classes)}
        data = datasets.Dataset.from_dict(rows, datasets.Features(features))
        for i in range(2):
            data.shard(2, i).to_parquet(place / f'data/{split}-{i:05d}-of-00002.parquet')
    return place


def wds(shards, **options):
    of_shards = {'dataset': 'wds/colours', 'data_dir': shards, 'classes': CLASSES}
    return {**of_shards, 'stages': STAGES, **options}


def load(streams):
    return {role: list(stream) for role, stream in streams.items() if role != 'augmented'}


def test_images_are_those_of_the_folder(folder, shards, parquet):
    """Tensors, labels and, of shards, names, in the same order."""
    on_disk = Config(data_dir=str(folder))
    expected = create_datasets(on_disk, load_splits(on_disk)[0], PREPROCESSING)
    options = {'dataset': f'hfids/{parquet}', 'input_key': 'photo', 'target_key': 'colour'}
    for config in (
        Config(dataset='wds/x', data_dir=str(shards), classes=CLASSES, batch_size=8),
        Config(**options, batch_size=8),
    ):
        streams, classes = load_streams(config)
        assert classes == CLASSES
        found = create_streams(config, streams, PREPROCESSING)
        for role in ('train', 'val', 'test'):
            found[role].named = True
            rows = list(found[role])
            assert len(rows) == len(found[role]) == len(expected[role])
            for i, (x, y, *names) in enumerate(rows):
                assert torch.equal(x, expected[role][i][0])
                assert y == expected[role][i][1]
                assert names in ([expected[role].image_names[i]], [])
    assert not names  # of parquet files


@pytest.mark.parametrize('workers', [0, 2, 3])
def test_an_epoch_of_training(shards, workers):
    """Whole batches, in an order of the epoch, of images of which none comes twice as long as not
    all have come, whatever the shards and the processes that read them."""
    config = Config(
        dataset='wds/x', data_dir=str(shards), classes=CLASSES, batch_size=8, workers=workers
    )
    streams, _ = load_streams(config)
    loader = create_loader(create_streams(config, streams, PREPROCESSING)['augmented'], config)
    orders = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        batches = [x for x, _ in loader]
        assert [len(x) for x in batches] == [8] * len(loader) == [8] * 3
        orders.append(numbers_of_contents(torch.cat(batches)).tolist())
    assert len(set(orders[0])) == 24
    assert orders[0] == orders[2] != orders[1]
    loader.dataset.batches = 7
    again = numbers_of_contents(torch.cat([x for x, _ in loader])).tolist()
    assert len(again) == 56
    assert len(set(again[:30])) == 30


@pytest.mark.parametrize('head', ['sparse_fisher', 'gmm_fisher'])
def test_fit_is_that_of_the_folder(recipe, folder, shards, tmp_path, head):
    """To the bit; and a run ends as one on the folder does, with all images of val and test."""
    options = {'head': head, 'head_kwargs': {'reduce_dim': 8}, 'stages': STAGES}
    fits = {}
    for name, data in {
        'folder': {'data_dir': folder, 'cache': False},
        'shards': wds(shards),
    }.items():
        run = recipe(output=tmp_path / name, **{**options, **data})
        fits[name] = read_weights(run / 'model')
        stages = {'only': {**STAGES['only'], 'lr': 0.0}}
        run = recipe(output=tmp_path / f'{name}-fit', **{**options, **data, 'stages': stages})
        fits[name] = read_weights(run / 'model')
        metrics = read_metrics(tmp_path / name)
        assert metrics['test']['samples'] == 15
        assert metrics['test']['accuracy'] > 0.8
    for key, value in fits['folder'].items():
        if key.startswith('head.'):
            assert torch.equal(fits['shards'][key], value), key


def test_resume(recipe, shards, tmp_path, monkeypatch):
    """At the end of an epoch, exactly."""
    from timm_fisher.training.run import Run

    expected = recipe(output=tmp_path / 'expected', **wds(shards))
    run_epoch = Run._run_epoch

    def stop(self, training, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        run_epoch(self, training, epoch)

    monkeypatch.setattr(Run, '_run_epoch', stop)
    with pytest.raises(KeyboardInterrupt):
        recipe(output=tmp_path / 'run', **wds(shards))
    monkeypatch.setattr(Run, '_run_epoch', run_epoch)
    run = recipe(output=tmp_path / 'run', resume=True, **wds(shards))
    assert read_log(run) == read_log(expected)


@pytest.mark.parametrize('seed', [0, slow(1), slow(3)])
def test_two_ranks(launch, shards, tmp_path, seed):
    """With shards of 17, 1 and 12 images: both end, and each image of val and test counts once."""
    options = {**TINY, **wds(shards), 'workers': 2, 'head': 'sparse_fisher', 'batch_size': 4}
    options['seed'] = seed
    finish(launch(processes=2, output=tmp_path / 'run', **options))
    metrics = read_metrics(tmp_path / 'run')
    assert metrics['test']['samples'] == 15
    assert metrics['processes'] == 2
    assert metrics['steps'] == 3 * (30 // 8)


def test_an_image_that_cannot_be_decoded(recipe, folder, tmp_path):
    shards = write_shards(folder, tmp_path / 'shards')
    with tarfile.open(shards / 'val-1.tar', 'w') as file:
        for name, content in {'a/broken.png': b'text', 'a/broken.cls': b'0'}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    with pytest.raises(ValueError, match=r"Image 'a/broken' cannot be decoded"):
        recipe(**wds(shards))


def test_file_beside_the_shards(shards, tmp_path):
    """timm's, which lists the files of a split and counts their images, so that none is read."""
    splits = {
        role: {'name': role, 'filenames': [f'{name}-0.tar'], 'num_samples': 99}
        for role, name in {'train': 'train', 'val': 'val', 'test': 'val'}.items()
    }
    (tmp_path / '_info.json').write_text(json.dumps({'splits': splits}))
    for path in shards.iterdir():
        (tmp_path / path.name).symlink_to(path)
    streams, _ = load_streams(Config(dataset='wds/x', data_dir=str(tmp_path), classes=CLASSES))
    assert streams['train'].number == 99
    assert len(list(streams['train'].rows)) == 17
    assert len(list(streams['test'].rows)) == 12


def test_pattern():
    assert _expand('a-{08..10}-{0..1}.tar') == [
        'a-08-0.tar', 'a-08-1.tar', 'a-09-0.tar', 'a-09-1.tar', 'a-10-0.tar', 'a-10-1.tar'
    ]  # fmt: skip


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'classes': []}, 'names 0 classes. Give --classes'),
        ({'classes': ['a', 'b']}, r"'cls' is 2; give a number below 2 or one of \['a', 'b'\]"),
        ({'val_split': None}, 'does not allow val_split null; name a split'),
        ({'cache': True}, 'does not allow cache true'),
        ({'train_split': 'trian'}, r'has no trian\*.tar or trian/\*.tar'),
        ({'input_key': 'jpg'}, r"--input_key is jpg; give one of \['png'\]"),
        ({'target_key': 'label'}, '--target_key is label; give one of .*cls'),
        ({'train_split': 'train-{0..5}.tar'}, 'has no train-3.tar or train-4.tar'),
        ({'train_samples': -5}, 'train_samples is -5; give 1 or more'),
        ({'batch_size': 64}, '30 training images do not fill a batch of 64'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else '',
)
def test_mistakes(recipe, shards, options, message, capsys):
    with pytest.raises((ValueError, SystemExit)) as error:
        recipe(**wds(shards, **options))
    assert re.search(message, f'{error.value} {capsys.readouterr().err}')


def test_a_row_does_not_choose_the_file(folder, tmp_path):
    """That is read, unless its data set lies here, too."""
    path = next(iter((folder / 'val').rglob('*.png')))
    with _open({'bytes': None, 'path': str(path)}, is_local=True) as file:
        assert file.read() == path.read_bytes()
    for place in (str(path), f'file://{path}', 'https://example.org/x.png', None):
        with pytest.raises(ValueError, match='it holds no image'):
            _open({'bytes': None, 'path': place}, is_local=False)


@pytest.mark.slow
def test_trashnet_from_shards(recipe, tmp_path):
    """As accurate as from its folder, within what seeds make of it."""
    images = DATA / 'trashnet'
    if not images.exists():
        pytest.skip('needs trashnet: set TIMM_FISHER_DATA to the folder that holds it')
    write_lite0(tmp_path / 'lite0')
    classes = sorted(path.name for path in (images / 'train').iterdir())
    shards = write_shards(images, tmp_path / 'shards', train=[500, 20, 10**6])
    parquet = write_parquet(images, tmp_path / 'parquet')
    keys = {'input_key': 'photo', 'target_key': 'colour'}
    sources = {
        'folder': {'data_dir': images},
        'wds': {'dataset': 'wds/trashnet', 'data_dir': shards, 'classes': classes},
        'hfids': {'dataset': f'hfids/{parquet}', 'data_dir': tmp_path / 'hf', **keys},
    }
    accuracies = {}
    for source, options in sources.items():
        for seed in range(3):
            run = recipe(
                output=tmp_path / f'{source}-{seed}',
                seed=seed,
                **options,
                backbone=f'local-dir:{tmp_path / "lite0"}',
                pretrained=True,
                head='avg + sparse_fisher@-2',
                head_kwargs={'reduce_dim': 32, 'code_dim': 16},
                backbone_stage=-1,
                img_size=96,
                batch_size=64,
                stages={'only': {'train': 'classifier', 'epochs': 5, 'lr': 0.005}},
                cache=False,
            )
            accuracies.setdefault(source, []).append(read_metrics(run)['test']['accuracy'])
    print(accuracies)
    mean, deviation = fmean(accuracies['folder']), stdev(accuracies['folder'])
    for source in ('wds', 'hfids'):
        assert fmean(accuracies[source]) == pytest.approx(mean, abs=2 * deviation + 0.01)
    assert mean > 0.7
