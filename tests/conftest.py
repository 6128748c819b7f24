"""Runs of the recipes: in this process, where that is enough, and through the real launcher."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

if 'PYTEST_XDIST_WORKER' in os.environ:  # one of several processes: as many threads are enough
    torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get('TIMM_FISHER_DATA', ROOT.parent / 'shared' / 'data'))
COLOURS = {'blue': (70, 70, 200), 'green': (70, 200, 70), 'red': (200, 70, 70)}
TINY = {
    'backbone': 'test_resnet', 'backbone_stage': -2, 'img_size': 32, 'crop_pct': 1.0,
    'batch_size': 16, 'workers': 0,
}  # fmt: skip
# Threads that spin while they wait make a tiny model up to 75 times slower on a busy machine.
# Training overrides OMP_NUM_THREADS=1, which `accelerate launch` sets by itself.
ENVIRONMENT = {'ACCELERATE_USE_CPU': 'true', 'OMP_WAIT_POLICY': 'passive'}


def write_images(folder: Path, *, seed: int = 0, **splits: int) -> Path:
    """`folder/SPLIT/COLOUR/*.png`, noise with a tint; the number of images for each colour."""
    random = np.random.default_rng(seed)
    for split, count in splits.items():
        for name, tint in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.normal(tint, 60, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f'{i:03d}.png')
    return folder


@pytest.fixture(scope='session')
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 training, 33 validation and 51 test images of three classes."""
    return write_images(tmp_path_factory.mktemp('images'), train=40, val=11, test=17)


def load_script(name: str) -> ModuleType:
    """The module of a script, such as 'papers/cluster' of recipes/papers/cluster.py."""
    path = ROOT / 'recipes' / f'{name}.py'
    spec = importlib.util.spec_from_file_location(f'recipes_{name.replace("/", "_")}', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


def command_line(options: dict[str, Any]) -> list[str]:
    """`{'lr': 1.0, 'resume': True}` -> `['--lr=1.0', '--resume=true']`."""
    text = {
        key: str(value) if isinstance(value, str | Path) else json.dumps(value)
        for key, value in options.items()
    }
    return [f'--{key}={value}' for key, value in text.items()]


def forget_launch() -> None:
    """Have accelerate, in this process, look anew at how it was launched."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """`recipe(head='avg', ...)` trains in this process and returns the output folder."""
    from timm_fisher.training import run as training
    from timm_fisher.training.command_line import parse
    from timm_fisher.training.config import Config

    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    # Matplotlib takes longer than all the rest; the launched runs draw the real curve.
    draw = lambda _, path: Image.new('L', (1, 1)).save(path)  # noqa: E731
    monkeypatch.setattr(training, 'draw_curve', draw)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*arguments: str, **options: Any) -> Path:
        options = {'output': tmp_path / 'run', 'cache_dir': tmp_path / 'cache', **TINY, **options}
        config = parse(Config, arguments=[*arguments, *command_line(options)])
        forget_launch()
        training.train(config)
        return Path(options['output'])

    yield run
    forget_launch()
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def launch() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`launch(output=..., ...)` starts a script, or `-m MODULE`, by the real launcher, in a process
    group; `node=(rank, port)` as one of two machines, of one process each."""
    started = []

    def start(
        script: str = 'recipes/train.py',
        *,
        processes: int = 1,
        node: tuple[int, int] | None = None,
        **options: Any,
    ) -> subprocess.Popen[str]:
        launcher = [sys.executable, '-m', 'accelerate.commands.launch']
        launcher += ['--mixed_precision', 'no', '--dynamo_backend', 'no']
        if node is not None:
            rank, port = map(str, node)
            launcher += ['--multi_gpu', '--num_machines', '2', '--num_processes', '2']
            launcher += ['--machine_rank', rank, '--main_process_port', port]
            launcher += ['--main_process_ip', '127.0.0.1']
        else:
            launcher += ['--num_machines', '1', '--num_processes', str(processes)]
            if processes > 1:
                launcher += ['--multi_gpu', '--main_process_port', '0']
        process = subprocess.Popen(
            [*launcher, *script.split(), *command_line(options)],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs a fake distribution with one head: metadata as pip leaves it, and a module."""

    def install_distribution(distribution: str, head: str, value: str, source: str = '') -> None:
        site = tmp_path / distribution
        metadata = site / f'{distribution}-1.0.dist-info'
        metadata.mkdir(parents=True)
        (metadata / 'METADATA').write_text(
            f'Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n'
        )
        (metadata / 'entry_points.txt').write_text(f'[timm_fisher.heads]\n{head} = {value}\n')
        module = value.partition(':')[0]
        (site / f'{module}.py').write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, module, raising=False)

    return install_distribution


# What is tested without training, saving or a launcher: the first of three tiers of tests.
QUICK = (
    *('heads', 'numerics', 'fitting', 'test_backbone.py', 'test_compose.py', 'test_factory.py'),
    *('test_model.py', 'test_pixels.py', 'test_readme.py', 'test_registry.py'),
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests `quick`, unless they are marked `slow`."""
    for item in items:
        place = item.path.relative_to(ROOT / 'tests').parts[0]
        if place in QUICK and not item.get_closest_marker('slow'):
            item.add_marker(pytest.mark.quick)
