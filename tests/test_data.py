"""What the recipe does with bad input: it stops early and says what to do."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from conftest import write_images
from PIL import Image

ONE_EPOCH = {'only': {'train': 'head', 'epochs': 1}}
NO_TEST = {'test_split': None, 'stages': ONE_EPOCH}


@pytest.fixture
def few(tmp_path):
    """A folder that a test may damage: 12 training and 6 validation images."""
    return write_images(tmp_path / 'few', train=4, val=2)


# Images


def test_missing_data_folder(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere/train' is no folder; --data-dir must hold"):
        recipe(data_dir=tmp_path / 'nowhere')


def test_no_data_folder_given(recipe):
    with pytest.raises(ValueError, match='--data-dir must hold'):
        recipe()


def test_missing_split_names_the_option(recipe, few):
    with pytest.raises(ValueError, match=r"few/test' is no folder.*--test_split null"):
        recipe(data_dir=few)


def test_folder_without_images(recipe, tmp_path):
    (tmp_path / 'empty/train/red').mkdir(parents=True)
    with pytest.raises(ValueError, match=r"split 'train' of '.*empty'"):
        recipe(data_dir=tmp_path / 'empty', val_split=None, test_split=None)


@pytest.mark.parametrize('val_split', ['val', None])
def test_one_class_only(recipe, few, val_split):
    for split in ('train', 'val'):
        for colour in ('blue', 'green'):
            for path in (few / split / colour).iterdir():
                path.unlink()
    with pytest.raises(ValueError, match=r"few' are all of one class, \['red'\]"):
        recipe(data_dir=few, val_split=val_split, **NO_TEST)


def test_no_image_is_named_before_training(recipe, few):
    broken = few / 'val/red/broken.png'
    broken.write_text('no image')
    with pytest.raises(ValueError, match=f'1 files cannot be read as images.*\n.*{broken}'):
        recipe(data_dir=few, **NO_TEST)


# Collecting the worker of a failed run takes 10 s.
@pytest.mark.parametrize('workers', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_jpeg_cut_short_is_named_when_decoded(recipe, few, workers):
    cut = few / 'train/red/cut.jpg'
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    with Image.open(cut) as image:  # the header alone is fine
        assert image.size == (64, 64)
    with pytest.raises(ValueError, match=f"Image '{cut}' cannot be decoded") as error:
        recipe(data_dir=few, workers=workers, **NO_TEST)
    assert 'Remove it' in str(error.value)


def test_class_that_training_lacks(recipe, few):
    (few / 'val/red').rename(few / 'val/violet')
    with pytest.raises(ValueError, match=r"split 'val' has classes that training lacks.*violet"):
        recipe(data_dir=few, **NO_TEST)


def test_class_that_validation_lacks_keeps_the_labels(recipes, few):
    """Without 'blue', a split of its own would call 'green' class 0."""
    for path in (few / 'val/blue').iterdir():
        path.unlink()
    config = recipes.config.parse_config([f'--data_dir={few}', '--test_split=null'])
    splits, classes = recipes.data.load_splits(config)
    assert classes == ['blue', 'green', 'red']
    assert Counter(splits['val'].labels.tolist()) == {1: 2, 2: 2}


def test_splits_that_are_the_same(recipe, few):
    with pytest.raises(ValueError, match=r"'train' and 'val' hold the same images.*val_split null"):
        recipe(data_dir=few, val_split='train', test_split=None)


# A validation set carved from the training set


def carve(recipes, folder, **options):
    arguments = [f'--{key}={value}' for key, value in options.items()]
    config = recipes.config.parse_config(
        [f'--data_dir={folder}', '--val_split=null', '--test_split=null', *arguments]
    )
    return recipes.data.load_splits(config)[0]


def test_carved_validation_is_stratified_and_disjoint(recipes, tmp_path):
    folder = write_images(tmp_path / 'uneven', train=20)
    for path in sorted((folder / 'train/red').iterdir())[10:]:
        path.unlink()
    splits = carve(recipes, folder, val_fraction=0.2)
    assert Counter(splits['val'].labels.tolist()) == {0: 4, 1: 4, 2: 2}
    assert Counter(splits['train'].labels.tolist()) == {0: 16, 1: 16, 2: 8}
    both = np.concatenate([splits['train'].indices, splits['val'].indices])
    assert sorted(both) == list(range(50))
    samples = splits['val'].dataset.reader.samples
    labels = [samples[i][1] for i in splits['val'].indices]
    assert labels == splits['val'].labels.tolist()


def test_carved_validation_depends_on_the_seed_alone(recipes, images):
    first, again, other = (carve(recipes, images, seed=seed)['val'] for seed in (0, 0, 1))
    assert np.array_equal(first.indices, again.indices)
    assert not np.array_equal(first.indices, other.indices)


def test_too_few_images_to_carve_from(recipes, few):
    with pytest.raises(ValueError, match='No validation set of 10% can be carved from the 12'):
        carve(recipes, few, val_fraction=0.1)


# Names and types


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'head': 'sparse_fishr'}, "Unknown head 'sparse_fishr'.*'sparse_fisher'"),
        ({'backbone': 'test_resnt'}, "Unknown backbone 'test_resnt'.*'test_resnet'"),
        ({'backbone_stage': -9}, 'stage=-9 does not exist'),
    ],
)
def test_unknown_value(recipe, images, options, message):
    with pytest.raises(ValueError, match=message):
        recipe(data_dir=images, **options)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'head_kwargs': {'code_dimm': 3}}, "no argument 'code_dimm'.*'code_dim'"),
        ({'head_kwargs.code_dimm': 3}, "no argument 'code_dimm'.*'code_dim'"),
        ({'augment': {'scal': 3}}, "no argument 'scal'.*'scale'"),
    ],
)
def test_unknown_argument(recipe, images, options, message):
    with pytest.raises(TypeError, match=message):
        recipe(data_dir=images, head='sparse_fisher', **options)


BAD_SETTINGS = [
    # given, and what the message must name
    ({'hed': 'avg'}, "'head'"),
    ({'stages': {'only': {'epoch': 3}}}, "'epochs'"),
    ({'batch_size': 'many'}, 'batch_size'),
    ({'backbone_stage': 1.5}, 'backbone_stage'),
    ({'class_token': 'kep'}, 'keep'),
    ({'head_kwargs': 3}, 'head_kwargs'),
    ({'stages': {'only': {'train': 'haed'}}}, 'head'),
    ({'stages': {'only': {'sched': 'cosin'}}}, 'cosine'),
    ({'stages': {'only': {'lr': 'fast'}}}, 'lr'),
]


@pytest.mark.parametrize(('settings', 'named'), BAD_SETTINGS, ids=lambda value: str(value))
@pytest.mark.parametrize('source', ['argument', 'file'])
def test_unknown_key_and_wrong_type(recipes, tmp_path, capsys, source, settings, named):
    file = tmp_path / 'config.yaml'
    file.write_text(yaml.safe_dump(settings))
    arguments = [f'--{key}={json.dumps(value)}' for key, value in settings.items()]
    with pytest.raises(SystemExit) as stopped:
        recipes.config.parse_config(arguments if source == 'argument' else [f'--config={file}'])
    assert stopped.value.code not in (0, None)
    assert named in capsys.readouterr().err


@pytest.mark.parametrize('key', ['stages.only.epoch', 'stages.only.head-lr-scal'])
def test_unknown_nested_argument(recipes, tmp_path, capsys, key):
    file = tmp_path / 'config.yaml'
    file.write_text('stages: {only: {epochs: 1}}')
    with pytest.raises(SystemExit) as stopped:
        recipes.config.parse_config([f'--config={file}', f'--{key}=3'])
    assert stopped.value.code not in (0, None)
    assert {'stages.only.epoch': "'epochs'", 'stages.only.head-lr-scal': "'head_lr_scale'"}[
        key
    ] in capsys.readouterr().err


def test_arguments_override_the_file(recipes, tmp_path):
    """The twin of the errors above: what is right is taken."""
    file = tmp_path / 'config.yaml'
    file.write_text('{head: avg, batch_size: 3, stages: {only: {epochs: 1, lr: 0.5}}}')
    config = recipes.config.parse_config(
        [f'--config={file}', '--batch-size=4', '--stages.only.epochs', '2', '--augment={}']
    )
    assert (config.head, config.batch_size, config.augment) == ('avg', 4, {})
    assert config.stages == {'only': recipes.config.Stage(epochs=2, lr=0.5)}
    file.write_text(config.to_yaml())
    assert recipes.config.parse_config([f'--config={file}']) == config


@pytest.mark.slow
def test_launcher_passes_the_failure_on(launch, images, tmp_path):
    process = launch(output=tmp_path / 'run', data_dir=images, head='sparse_fishr')
    text, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Unknown head 'sparse_fishr'. Did you mean 'sparse_fisher'?" in text


# The folder of a run


def test_resume_without_a_run(recipe, images, tmp_path):
    with pytest.raises(ValueError, match=r"run' holds no run"):
        recipe(data_dir=images, resume=True)
    assert not (tmp_path / 'run').exists()


def test_run_is_neither_overwritten_nor_resumed_with_other_settings(recipe, few):
    run = recipe(data_dir=few, **NO_TEST)
    before = {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}
    with pytest.raises(ValueError, match=r"run' holds a run already.*--resume true"):
        recipe(data_dir=few, **NO_TEST)
    with pytest.raises(ValueError, match=r'must keep the settings.*batch_size was 16, is 8'):
        recipe(data_dir=few, resume=True, **{**NO_TEST, 'batch_size': 8})
    assert before == {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}


def test_failure_before_training_leaves_the_output_free(recipe, few):
    """A misspelt name must not make the corrected command fail."""
    with pytest.raises(ValueError, match='Unknown head'):
        recipe(data_dir=few, head='avgg', **NO_TEST)
    assert (recipe(data_dir=few, head='avg', **NO_TEST) / 'metrics.json').exists()


# Failures in the middle of a run


def finite(folder: Path) -> bool:
    weights = safetensors.torch.load_file(folder / 'model.safetensors')
    return all(tensor.isfinite().all() for tensor in weights.values())


def test_loss_that_is_not_finite(recipe, images, tmp_path):
    stages = {
        'warm': {'train': 'head', 'epochs': 2},
        'burn': {'train': 'all', 'epochs': 1, 'opt': 'sgd', 'lr': 1e30, 'sched': 'constant'},
    }
    with pytest.raises(
        FloatingPointError, match=r'The loss is \S+ in stage burn, epoch 1, step [2-8]\.'
    ) as error:
        recipe(data_dir=images, stages=stages)
    checkpoint = tmp_path / 'run/checkpoint-0002'
    assert f'Last good checkpoint: {checkpoint}.' in str(error.value)
    assert finite(checkpoint / 'model')
    assert not (tmp_path / 'run/metrics.json').exists()


@pytest.mark.parametrize('epochs', [1, 2])
def test_weights_that_the_last_step_of_an_epoch_ruins(recipe, few, tmp_path, epochs):
    """One step per epoch: its own loss is fine, what it leaves is not."""
    stages = {
        'burn': {'train': 'all', 'epochs': epochs, 'opt': 'sgd', 'lr': 1e38, 'sched': 'constant'}
    }
    with pytest.raises(FloatingPointError, match='Last good checkpoint: none'):
        recipe(data_dir=few, stages=stages, test_split=None)
    assert not list((tmp_path / 'run').glob('checkpoint-*'))


STAGES = {'warm': {'train': 'head', 'epochs': 3, 'lr': 0.01}}


def test_disk_full_keeps_the_earlier_checkpoint(recipe, recipes, few, tmp_path, monkeypatch):
    """The second checkpoint meets a limit on file sizes that the first one did not."""
    options = {'data_dir': few, 'test_split': None, 'stages': STAGES, 'head': 'sparse_fisher'}
    expected = recipe(output=tmp_path / 'expected', **options)
    train_epoch = recipes.train.Run._train_epoch

    def fill_disk(self, name, epoch, *arguments):
        if epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        return train_epoch(self, name, epoch, *arguments)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(recipes.train.Run, '_train_epoch', fill_disk)
            with pytest.raises(Exception, match='File too large'):
                recipe(**options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    run = tmp_path / 'run'
    assert [path.name for path in run.glob('checkpoint-????')] == ['checkpoint-0001']
    assert finite(run / 'model')
    recipe(resume=True, **options)
    for folder in ('model', 'last'):
        file = f'{folder}/model.safetensors'
        assert (run / file).read_bytes() == (expected / file).read_bytes()
    assert [path.name for path in run.glob('checkpoint-*')] == ['checkpoint-0003']


def test_rename_that_fails_keeps_the_earlier_checkpoint(
    recipe, recipes, few, tmp_path, monkeypatch
):
    replace = os.replace

    def fail(source, target):
        if Path(target).name == 'checkpoint-0002':
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='No space left'):
        recipe(data_dir=few, test_split=None, stages=STAGES)
    checkpoint = tmp_path / 'run/checkpoint-0001'
    assert finite(checkpoint / 'model')
    assert len(json.loads((checkpoint / 'progress.json').read_text())['history']) == 1


def test_cache_that_does_not_fit(recipe, recipes, few, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'posix_fallocate', full)
    with pytest.raises(OSError, match=r'No space left.*--cache false'):
        recipe(data_dir=few, **NO_TEST)
    assert not list((tmp_path / 'cache').iterdir())


# Cached features


def test_two_runs_that_fill_one_cache_at_the_same_time(recipes, recipe, few, tmp_path):
    """The second run starts, and ends, while the first is half through the images."""
    from accelerate import Accelerator

    config = recipes.config.parse_config(
        [f'--data_dir={few}', '--test_split=null', f'--cache_dir={tmp_path}/cache', '--workers=0']
    )
    splits, _ = recipes.data.load_splits(config)
    torch.manual_seed(0)
    model = recipes.train.timm_fisher.create_model('test_resnet', num_classes=3)
    accelerator = Accelerator(cpu=True)
    transform = recipes.train.timm.data.create_transform(32)
    plain = recipes.data.Images(splits['train'], transform, 'RGB')

    class Interrupted(recipes.data.Images):
        done = False

        def __getitem__(self, i):
            if i == 6 and not self.done:
                self.done = True
                recipes.data.cache_features(model, plain, config, accelerator)
            return super().__getitem__(i)

    interrupted = Interrupted(splits['train'], transform, 'RGB')
    cached = recipes.data.cache_features(model, interrupted, config, accelerator)
    expected = torch.stack([plain[i][0] for i in range(len(plain))])
    with torch.no_grad():
        expected = model.eval().forward_features(expected)
    torch.testing.assert_close(torch.from_numpy(np.array(cached.arrays[0])), expected)
