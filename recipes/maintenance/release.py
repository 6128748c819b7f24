"""Train a released model, and write its folder of hub_cards: weights, card and figures.

    python recipes/maintenance/release.py trashnet-fisher --data-dir PATH

recipes/configs/release.yaml says how. Trains once for each seed, of which the first gives the
weights; a run that is finished is kept, one that was interrupted goes on. The folder takes the
place of an earlier one only if, loaded again, it measures on the test split what the run had.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import timm_fisher
from timm_fisher.hub.load import CHECKOUT, HUB_USER
from timm_fisher.specification import argument_names
from timm_fisher.training.command_line import run
from timm_fisher.training.data import load_splits
from timm_fisher.training.embeddings import parse_options
from timm_fisher.training.evaluate import evaluate
from timm_fisher.training.launch import launch

SEEDS = (0, 1, 2)
TOLERANCE = 0.0005  # of the accuracy, between the run and the folder
LARGEST = 10  # MB of a folder


@dataclass
class Settings:
    """Train a released model, and write its folder.

    Args:
        name: of the model.
        data_dir: folder of images, or FILE.npz.
        models: file that says how the models are made.
        runs: folder of the runs.
        output: folder of the models' folders.
    """

    name: str
    data_dir: str
    models: Path = Path(__file__).parent.parent / 'configs/release.yaml'
    runs: Path = Path('runs/release')
    output: Path = CHECKOUT


def main(settings: Settings) -> None:
    runs, folder = settings.runs / settings.name, settings.output / settings.name
    options, published = read_release(settings.models, settings.name)
    options['data_dir'] = settings.data_dir
    # A mistaken folder of images is found before a run binds later calls to these options.
    load_splits(parse_options(options))
    metrics = [train(options, seed, runs / f's{seed}') for seed in SEEDS]
    accuracies = [result['test']['accuracy'] for result in metrics]
    seeds = dict(zip(map(str, SEEDS), accuracies, strict=True))
    print(f'test accuracy of seeds {seeds}')

    model = timm_fisher.from_pretrained(runs / f's{SEEDS[0]}/model')
    settings.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.output, prefix='.checking-') as beside:
        checked = Path(beside, settings.name)
        if Path(folder, 'README.md').exists():  # with what was edited there
            checked.mkdir()
            shutil.copy(folder / 'README.md', checked)
        timm_fisher.save_pretrained(
            model,
            checked,
            metrics={**metrics[0], 'seeds': seeds},
            label_names=model.pretrained_cfg['label_names'],
            **published,
        )
        check(checked, options['backbone'] if published['adapter'] else None, settings.data_dir)
        if folder.exists():
            folder.rename(Path(beside, 'earlier'))
        checked.rename(folder)
    print(f'-> {folder}, in the table of hub_cards/README.md:\n{row(folder)}')


def read_release(path: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of a model's training, and arguments of `timm_fisher.save_pretrained`: what the file
    says of the model and of its data."""
    config = yaml.safe_load(path.read_text())
    if name not in config['models']:
        raise ValueError(f"'{path}' says nothing of '{name}', only of {list(config['models'])}.")
    model = config['models'][name]
    data = config['data'][model['data']]
    commands = [
        '\n'.join(data['prepare']),
        f'# PATH: {data["path"]}.\n'
        '# All seeds, and the folder of this model:\n'
        f'python recipes/maintenance/release.py {name} --data-dir PATH',
        f'# The figures above, by the weights here:\n'
        f'python recipes/evaluate.py --model {name} --data-dir PATH',
    ]
    published = {
        'adapter': 'backbone_id' in data,
        'backbone_id': data.get('backbone_id'),
        'float16': model.get('float16', []),
        'card': {
            **data['card'],
            'repo_id': f'{HUB_USER}/{name}',
            'description': model['description'],
            'limits': [*model.get('limits', []), *data['limits']],
            'commands': commands,
        },
    }
    return {**data['train'], **model['train']}, published


def train(options: dict[str, Any], seed: int, output: Path) -> dict[str, Any]:
    """Metrics of the run of one seed, from before if it has been run."""
    options = {**options, 'seed': seed}
    if 'seed' in argument_names(options['head']):
        options['head_kwargs'] = {**options.get('head_kwargs', {}), 'seed': seed}
    print(f'\n== {output}', flush=True)
    return launch(options, output)


def check(folder: Path, backbone: str | None, data_dir: str) -> None:
    """Measure a folder as a user would, from its files and the images; a ValueError if it is too
    large, or its accuracy is not that of its metrics.json."""
    if size(folder) > LARGEST:
        raise ValueError(
            f"'{folder}' takes {size(folder):.1f} MB, more than {LARGEST}. Name large tensors in "
            'float16, or make the head smaller.'
        )
    model = timm_fisher.from_pretrained(folder, backbone=backbone)
    measured = evaluate(model, data_dir, 'test')['accuracy']
    claimed = json.loads((folder / 'metrics.json').read_text())['test']['accuracy']
    print(f'test accuracy of the folder {measured:.4%}, of the run {claimed:.4%}')
    if abs(measured - claimed) > TOLERANCE:
        raise ValueError(
            f"'{folder}' has a test accuracy of {measured:.2%}, but its run had {claimed:.2%}."
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
    run(main, Settings, positional='name')
