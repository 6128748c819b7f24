"""Images per second of evaluation, caching and training on a CPU, beside timm's own scripts.

    python recipes/benchmarks/throughput.py --data-dir PATH --validate validate.py --train train.py

validate.py and train.py are those of timm's repository; without them there is nothing beside our
rows. All run the same untrained model on the same photographs of PATH/train/CLASS, with two loader
workers and the same batch size. Every measurement is a process of its own; they take turns, and the
medians are reported. Evaluation and caching are timed from the creation of the model to the end,
training from the first step to the last full one. The processor's time, without that of the loader
workers, depends less on what else the machine does; memory is cleared in system mode. Leaves in
OUTPUT throughput.md and throughput.json.
"""

from __future__ import annotations

import io
import os
import resource
import runpy
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context, get_start_method, set_start_method
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm import tqdm

import timm_fisher
from timm_fisher.training.benchmark import Row, Sections, report
from timm_fisher.training.command_line import run
from timm_fisher.training.config import Config, Stage
from timm_fisher.training.data import create_datasets, load_folder, preprocessing
from timm_fisher.training.evaluate import evaluate
from timm_fisher.training.features import cache_features
from timm_fisher.training.run import create_model, train
from timm_fisher.training.tables import records

WORKERS = 2
OURS = ('evaluate', 'cache_features', 'train')
THEIRS = ('validate.py', 'validate.py --channels-last', 'train.py', 'train.py --channels-last')


@dataclass
class Settings:
    """Images per second of evaluation, caching and training, beside timm's own scripts.

    Args:
        data_dir: folder with train/CLASS/IMAGE.
        validate: timm's validate.py.
        train: timm's train.py.
        output: folder of results.
        backbone: any timm architecture.
        head: of the model.
        img_size: side of the images.
        images: how many of them, in all classes.
        batch_size: images per step.
        threads: of PyTorch; null for as many as it chooses.
        repetitions: of every measurement.
    """

    data_dir: Path
    validate: Path | None = None
    train: Path | None = None
    output: Path = Path('runs/throughput')
    backbone: str = 'tf_efficientnet_lite0'
    head: str = 'avg'
    img_size: int = 224
    images: int = 192
    batch_size: int = 32
    threads: int | None = None
    repetitions: int = 3

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.repetitions < 1:
            raise ValueError('Give --batch_size and --repetitions of 1 or more.')
        if self.images < 2 * self.batch_size:
            raise ValueError(f'--images is {self.images}; give two batches or more.')


def main(settings: Settings) -> None:
    for name in ('validate', 'train'):
        script = getattr(settings, name)
        if script is not None and not script.is_file():
            raise ValueError(f"--{name} is '{script}', which is not a file.")
    os.environ['ACCELERATE_USE_CPU'] = 'true'
    options = {**asdict(settings), 'device': 'cpu'}
    report({'cpu': partial(measure, settings)}, settings.output / 'throughput', options)


def measure(settings: Settings) -> Sections:
    """Everything in turn, as often as the settings say; a row of medians for each."""
    scripts = {'validate.py': settings.validate, 'train.py': settings.train}
    measured = [*OURS, *(what for what in THEIRS if scripts[what.split()[0]])]
    taken: dict[str, list[list[float]]] = {what: [] for what in measured}
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, 'images')
        classes = link_images(settings, images)
        # validate.py takes no model without weights.
        model = create_model(create_config(settings, images, Path(folder)), classes)
        timm_fisher.save_model(model, Path(folder, 'model'))
        turns = tqdm(measured * settings.repetitions, disable=None)
        for i, what in enumerate(turns):
            turns.set_description(what)
            output = Path(folder, str(i))
            output.mkdir()
            # What our code tells the C library must not help timm's scripts.
            with ProcessPoolExecutor(1, get_context('spawn')) as process:
                future = process.submit(
                    seconds_per_image, what, settings, output, classes, get_start_method()
                )
                taken[what].append(future.result())
    rows: list[Row] = []
    for what, repetitions in taken.items():
        wall, user, system = map(statistics.median, zip(*repetitions, strict=True))
        rows.append({'what': what, 'images/s': 1 / wall})
        rows[-1] |= {'user, ms per image': 1e3 * user, 'system, ms per image': 1e3 * system}
    missing = ' and '.join(name for name, path in scripts.items() if path is None)
    note = f"\n\nWithout timm's {missing}, of which no path was given." if missing else ''
    size = f'{settings.img_size} x {settings.img_size}, {settings.batch_size} a step'
    yield f'{settings.backbone}, {settings.head}: images of {size}', records(rows) + note, rows


def link_images(settings: Settings, folder: Path) -> int:
    """Links to the same number of images of each class in train/ and to one of each in val/; the
    number of classes."""
    classes = sorted(path for path in (settings.data_dir / 'train').glob('*') if path.is_dir())
    if not classes:
        raise ValueError(f"'{settings.data_dir}' holds no train/CLASS/IMAGE.")
    count = -(-settings.images // len(classes))
    for path in classes:
        images = sorted(path.iterdir())
        if len(images) <= count:
            raise ValueError(f"'{path}' has {len(images)} images; {count + 1} are needed.")
        for i, image in enumerate(images[: count + 1]):
            link = folder / ('train' if i else 'val') / path.name / image.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(image.resolve())
    return len(classes)


def seconds_per_image(
    what: str, settings: Settings, output: Path, classes: int, start_method: str
) -> list[float]:
    """Seconds that an image takes, and those of the processor in user and system mode."""
    # Of loader workers: what Python does by default, not the slow one that this process began by.
    set_start_method(start_method, force=True)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    images = output.parent / 'images'
    steps: list[list[float]] = []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(clock()))
    text = io.StringIO()
    start = clock()
    try:
        with redirect_stdout(text), redirect_stderr(text):
            if what in OURS:
                run_ours(what, settings, images, output, classes)
            else:
                run_script(what, settings, images, output, classes)
    except SystemExit as error:  # of a script's command line
        raise RuntimeError(f'{what} ended: {text.getvalue()[-1000:]}') from error
    finally:
        hook.remove()
    end, number = clock(), len(list(images.glob('train/*/*')))
    if steps:
        full = settings.images // settings.batch_size
        start, end, number = steps[0], steps[full - 1], (full - 1) * settings.batch_size
    return [(b - a) / number for a, b in zip(start, end, strict=True)]


def clock() -> list[float]:
    """The time, and that of the processor in user and system mode, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return [time.perf_counter(), usage.ru_utime, usage.ru_stime]


def create_config(settings: Settings, images: Path, output: Path) -> Config:
    """Of a run that trains everything for an epoch."""
    return Config(
        output=f'{output}/run', data_dir=str(images), test_split=None, backbone=settings.backbone,
        head=settings.head, img_size=settings.img_size, batch_size=settings.batch_size, augment={},
        stages={'all': Stage(epochs=1, lr=1e-4)}, workers=WORKERS, cache_dir=f'{output}/cache',
    )  # fmt: skip


def run_ours(what: str, settings: Settings, images: Path, output: Path, classes: int) -> None:
    config = create_config(settings, images, output)
    if what == 'train':
        train(config)
        return
    model = create_model(config, classes)
    if what == 'evaluate':
        evaluate(model, str(images), 'train', batch_size=settings.batch_size, workers=WORKERS)
        return
    splits = {'train': load_folder(str(images), 'train')}
    datasets = create_datasets(config, splits, preprocessing(model, config))
    cache_features(model, datasets['train'], config, Accelerator())


def run_script(what: str, settings: Settings, images: Path, output: Path, classes: int) -> None:
    name, *options = what.split()
    options += ['--data-dir', str(images), '--model', f'local-dir:{images.parent}/model']
    options += f'--num-classes {classes} --img-size {settings.img_size} --device cpu'.split()
    options += f'-b {settings.batch_size} -j {WORKERS}'.split()
    if name == 'validate.py':
        options += ['--split', 'train']
    else:
        options += '--train-split train --val-split val --epochs 1 --opt adamw --lr 1e-4'.split()
        options += ['--warmup-epochs', '0', '--output', str(output), '--experiment', 'throughput']
    script = settings.validate if name == 'validate.py' else settings.train
    sys.argv = [str(script), *options]
    runpy.run_path(str(script), run_name='__main__')


if __name__ == '__main__':
    run(main, Settings)
