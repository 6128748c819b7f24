"""Train a released model, and write its folder of hub_cards: weights, card and figures.

    python recipes/release.py trashnet-sparse-fisher --data-dir PATH

recipes/configs/release.yaml says how. Runs recipes/train.py by `accelerate launch` for each seed; a
run that is finished is kept, one that was interrupted goes on. The weights are those of the first
seed. At last the folder is loaded again, and measured on the images of the test split: only if that
is what the run had measured, it takes the place of an earlier one.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from evaluate import evaluate

import timm_fisher
from timm_fisher.files import keep_settings
from timm_fisher.training.config import Config
from timm_fisher.training.data import load_splits

RECIPES = Path(__file__).parent
SEEDS = (0, 1, 2)
TOLERANCE = 0.0005  # of the accuracy, between the run and the folder
LARGEST = 10  # MB of a folder


@dataclass
class Release:
    """How a released model is made.

    Attributes:
        train: options of train.py.
        card: fields of the card, as `timm_fisher.save_pretrained` takes them.
        backbone_id: the Hub's repository of the backbone's weights, where there are any.
        float16: tensors that are stored in half precision.
    """

    train: dict[str, Any]
    card: dict[str, Any]
    backbone_id: str | None = None
    float16: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description='Train a released model, and write its folder.')
    parser.add_argument('name', choices=timm_fisher.list_pretrained())
    parser.add_argument('--data-dir', required=True, help='folder of images, or FILE.npz')
    parser.add_argument('--config', type=Path, default=RECIPES / 'configs/release.yaml')
    parser.add_argument('--runs', type=Path, default=Path('runs/release'), help='folder of runs')
    parser.add_argument('--output', type=Path, default=RECIPES.parent / 'hub_cards')
    args = parser.parse_args()

    if not Path(args.data_dir).exists():
        parser.error(f"--data-dir '{args.data_dir}' does not exist.")
    runs, folder = args.runs / args.name, args.output / args.name
    try:
        release = read_release(args.config, args.name)
        settings = {**release.train, 'data_dir': args.data_dir}
        # Before the settings are kept: they bind all later calls.
        load_splits(Config(**{key: settings[key] for key in settings if key != 'stages'}))
        keep_settings(runs, settings)
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(str(error))
    metrics = [train(runs, release.train['head'], seed) for seed in SEEDS]
    seeds = {str(seed): each['test']['accuracy'] for seed, each in zip(SEEDS, metrics, strict=True)}
    print(f'test accuracy of seeds {seeds}')

    backbone = release.train['backbone'] if release.backbone_id else None
    model = timm_fisher.from_pretrained(str(runs / f's{SEEDS[0]}/model'))
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output, prefix='.checking-') as beside:
        checked = Path(beside, args.name)
        if Path(folder, 'README.md').exists():  # with what was edited there
            checked.mkdir()
            shutil.copy(folder / 'README.md', checked)
        timm_fisher.save_pretrained(
            model,
            checked,
            metrics={**metrics[0], 'seeds': seeds},
            label_names=model.pretrained_cfg['label_names'],
            adapter=release.backbone_id is not None,
            backbone_id=release.backbone_id,
            float16=release.float16,
            card={'repo_id': f'{timm_fisher.hub.HUB_USER}/{args.name}', **release.card},
        )
        check(checked, backbone, args.data_dir)
        if folder.exists():
            folder.rename(Path(beside, 'earlier'))
        checked.rename(folder)
    print(f'-> {folder}, in the table of hub_cards/README.md:\n{row(folder)}')


def read_release(path: Path, name: str) -> Release:
    """The entry of a model, together with that of its data."""
    config = yaml.safe_load(path.read_text())
    if name not in config['models']:
        raise ValueError(f"'{path}' says nothing of '{name}', only of {list(config['models'])}.")
    own = config['models'][name]
    shared = config['data'][own['data']]
    card = {
        **shared['card'],
        'description': own['description'],
        'limits': [*own.get('limits', []), *shared['limits']],
        'commands': [
            '\n'.join(shared['prepare']),
            f'# PATH: {shared["path"]}.\n'
            '# All seeds, and the folder of this model:\n'
            f'python recipes/release.py {name} --data-dir PATH',
            f'# The figures above, by the weights here:\n'
            f'python recipes/evaluate.py --model {name} --data-dir PATH',
        ],
    }
    return Release(
        {**shared['train'], **own['train']},
        card,
        shared.get('backbone_id'),
        own.get('float16', []),
    )


def train(runs: Path, head: str, seed: int) -> dict[str, Any]:
    """Metrics of the run of one seed, from before if it has been run."""
    output = runs / f's{seed}'
    metrics = output / 'metrics.json'
    if not metrics.exists():
        print(f'\n== {output}', flush=True)
        resume = str((output / 'config.yaml').exists()).lower()
        # A head may have a seed of its own.
        seeded = 'seed' in inspect.signature(timm_fisher.get_head(head)).parameters
        subprocess.run(
            [
                *(sys.executable, '-m', 'accelerate.commands.launch'),
                # What `accelerate launch` would otherwise say that it assumes.
                *('--num_processes', '1', '--num_machines', '1'),
                *('--mixed_precision', 'no', '--dynamo_backend', 'no'),
                *('--num_cpu_threads_per_process', str(os.cpu_count())),
                *(str(RECIPES / 'train.py'), '--config', str(runs / 'config.yaml')),
                *('--seed', str(seed), '--output', str(output), '--resume', resume),
                *(('--head_kwargs.seed', str(seed)) if seeded else ()),
            ],
            check=True,
        )
    found: dict[str, Any] = json.loads(metrics.read_text())
    return found


def check(folder: Path, backbone: str | None, data_dir: str) -> None:
    """Measure a folder as a user would, from its files and the images.

    Raises:
        ValueError: it is too large, or its accuracy is not that of its metrics.json.
    """
    if size(folder) > LARGEST:
        raise ValueError(
            f"'{folder}' takes {size(folder):.1f} MB, more than {LARGEST}. Name large tensors in "
            'float16, or make the head smaller.'
        )
    model = timm_fisher.from_pretrained(str(folder), backbone=backbone)
    found = evaluate(model, data_dir, 'test')['accuracy']
    claimed = json.loads((folder / 'metrics.json').read_text())['test']['accuracy']
    print(f'test accuracy of the folder {found:.4%}, of the run {claimed:.4%}')
    if abs(found - claimed) > TOLERANCE:
        raise ValueError(
            f"'{folder}' has a test accuracy of {found:.2%}, but its run had {claimed:.2%}."
        )


def size(folder: Path) -> float:
    """Of all files in a folder, in MB."""
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6


def row(folder: Path) -> str:
    """Name, test accuracy of each seed and size of a model, as a row of a Markdown table."""
    metrics = json.loads((folder / 'metrics.json').read_text())
    seeds = ', '.join(f'{100 * accuracy:.2f}' for accuracy in metrics['seeds'].values())
    return f'| [{folder.name}]({folder.name}) | {seeds} | {size(folder):.1f} MB |'


if __name__ == '__main__':
    main()
