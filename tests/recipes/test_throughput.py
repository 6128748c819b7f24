"""recipes/benchmarks/throughput.py: the same images and model for our code and timm's scripts."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, load_script, write_images

import timm_fisher

# What timm's scripts do, as far as they are timed: the same arguments, steps of an optimizer.
SCRIPT = """
import argparse, timm, torch
parser = argparse.ArgumentParser()
for name in ('model', 'data-dir', 'device', 'split', 'train-split', 'val-split', 'opt', 'output',
             'experiment'):
    parser.add_argument(f'--{name}')
for name in ('num-classes', 'img-size', 'epochs', 'warmup-epochs', 'b', 'j'):
    parser.add_argument(f'--{name}' if len(name) > 1 else f'-{name}', type=int)
parser.add_argument('--lr', type=float)
parser.add_argument('--channels-last', action='store_true')
args = parser.parse_args()
assert timm.data.create_dataset('', args.data_dir, split=args.split or args.train_split)
model = timm.create_model(args.model, num_classes=args.num_classes)
if args.train_split:
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    for _ in range(2):
        optimizer.step()
"""


@pytest.fixture(scope='module')
def throughput():
    return load_script('benchmarks/throughput')


def test_links(throughput, tmp_path):
    """As many images of each class, rounded up, and others for validation."""
    images = write_images(tmp_path / 'images', train=4)
    settings = throughput.Settings(images, images=8, batch_size=4)
    assert throughput.link_images(settings, tmp_path / 'links') == 3
    train, val = (list((tmp_path / 'links').glob(f'{split}/*/*')) for split in ('train', 'val'))
    assert (len(train), len(val)) == (9, 3)
    assert len({link.resolve() for link in train + val}) == 12
    settings.images = 12
    with pytest.raises(ValueError, match='has 4 images; 5 are needed'):
        throughput.link_images(settings, tmp_path / 'more')
    with pytest.raises(ValueError, match='holds no train/CLASS/IMAGE'):
        throughput.link_images(throughput.Settings(tmp_path / 'none'), tmp_path / 'more')


@pytest.mark.parametrize(
    ('options', 'error'),
    [
        ({'images': 63}, '--images is 63; give two batches or more'),
        ({'repetitions': 0}, 'of 1 or more'),
    ],
)
def test_refuses(throughput, options, error):
    with pytest.raises(ValueError, match=error):
        throughput.Settings(ROOT, **options)


def test_script_that_is_missing(throughput, tmp_path):
    settings = throughput.Settings(tmp_path, validate=tmp_path / 'none.py')
    with pytest.raises(ValueError, match=r"--validate is '.*none\.py', which is not a file"):
        throughput.main(settings)


@pytest.mark.parametrize('what', ['validate.py', 'train.py --channels-last'])
def test_scripts(throughput, tmp_path, what):
    """Their arguments, and which of their steps are timed."""
    script, output = tmp_path / 'script.py', tmp_path / '0'
    script.write_text(SCRIPT)
    images = write_images(tmp_path / 'source', train=3)
    settings = throughput.Settings(
        images, validate=script, train=script, backbone='test_resnet', img_size=32, images=6,
        batch_size=3,
    )  # fmt: skip
    throughput.link_images(settings, tmp_path / 'images')
    config = throughput.create_config(settings, tmp_path / 'images', tmp_path)
    model = throughput.create_model(config, 3)
    timm_fisher.save_model(model, tmp_path / 'model')
    seconds = throughput.seconds_per_image(what, settings, output, 3, 'fork')
    assert 0 < seconds[0] < 60
    assert (seconds[0] > 1e-3) == (what == 'validate.py')  # two empty steps take no time


def test_script_that_refuses_its_arguments(throughput, tmp_path):
    script = tmp_path / 'validate.py'
    script.write_text('import argparse\nargparse.ArgumentParser().parse_args()')
    settings = throughput.Settings(tmp_path, validate=script)
    with pytest.raises(RuntimeError, match='unrecognized arguments: --data-dir'):
        throughput.seconds_per_image('validate.py', settings, tmp_path / '0', 3, 'fork')


@pytest.mark.slow  # imports all libraries six times
def test_median_of_all(throughput, tmp_path):
    """Through the real command, with a stand-in for train.py and none for validate.py."""
    images, script = write_images(tmp_path / 'images', train=5), tmp_path / 'train.py'
    script.write_text(SCRIPT)
    command = [sys.executable, 'recipes/benchmarks/throughput.py', '--data_dir', images]
    command += ['--train', script, '--output', tmp_path / 'results', '--backbone', TINY['backbone']]
    command += '--img_size 32 --images 12 --batch_size 6 --repetitions 1 --threads 1'.split()
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    results = json.loads((tmp_path / 'results' / 'throughput.json').read_text())['results']
    scripts = ['train.py', 'train.py --channels-last']
    assert [row['what'] for row in results] == [*throughput.OURS, *scripts]
    assert all(row['images/s'] > 0 for row in results)
    assert "Without timm's validate.py, of which no path was given." in text
