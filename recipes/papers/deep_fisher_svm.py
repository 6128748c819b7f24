"""Learn the Fisher kernel of a linear SVM: Algorithm 1 of "Deep Fisher Kernels".

    python recipes/papers/deep_fisher_svm.py --config recipes/configs/deep_fisher_svm.yaml \
        --data-dir PATH --mode multi

The backbone is frozen and the PCA of its descriptors fixed; the Gaussian mixture starts from EM.
Then `timm_fisher.training.deep_fisher_svm` learns it, one for all classes (eq. 6, mode `multi`), or
one for each (eq. 4, mode `single`).

C is chosen on the validation split with the EM mixture, and the mixture for kernel transfer by its
average precision there. Leaves in `--output`: tables.md (tables 2 and 3 of the paper),
measurements.jsonl, metrics.json, log.jsonl, objective.png, config.yaml and the models of table (b),
loadable by `timm.create_model('local-dir:...', pretrained=True)`: base/ and model/, or in mode
`single` one model-CLASS/ with one output for each class.

Paper: Sydorov, Sakurada and Lampert, "Deep Fisher Kernels - End to End Learning of the Fisher
Kernel GMM Parameters", CVPR 2014.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
import yaml
from matplotlib.figure import Figure
from torch import Tensor

import timm_fisher
from timm_fisher import PooledModel
from timm_fisher.files import save_png, write
from timm_fisher.heads.gmm_fisher import GMMFisher, Mixture
from timm_fisher.numerics.linalg import unit_length
from timm_fisher.training import command_line, embeddings, tables
from timm_fisher.training import deep_fisher_svm as algorithm
from timm_fisher.training.config import Config
from timm_fisher.training.data import load_splits, preprocessing
from timm_fisher.training.measurements import Measurement, table_name
from timm_fisher.training.report import data_name
from timm_fisher.training.rows import write_rows


@dataclass
class DeepFisher:
    """Learn the Fisher kernel of a linear SVM, on a frozen timm backbone.

    Args:
        output: folder of the run.
        data_dir: as recipes/train.py takes it; a file FILE.npz with `dataset: npz` in `train`.
        seed: of everything random.
        train: options of training: data, backbone, and `head_kwargs` of gmm_fisher. Nothing is
            trained in stages.
        mode: a mixture for each class (single), or one that all classes share (multi).
        C: of eq. 4; null chooses it on the validation split, in mode single for each class.
        bias: append a constant 1 to the Fisher vectors. The paper's eq. 4 has no bias; what the
            mixture then learns is, for a good part, to supply one.
        iterations: steps of the mixture, at most; the paper takes 100.
        tolerance: stop when an iteration lowers the objective by less than this share.
        descriptor_fraction: share of each image's descriptors that the gradient is computed from;
            the paper takes 0.1. The objective and the line search use all of them.
    """

    output: str = 'runs/deep_fisher_svm'
    data_dir: str = ''
    seed: int = 0
    train: dict[str, Any] = field(default_factory=dict)
    mode: Literal['single', 'multi'] = 'multi'
    C: float | None = None
    bias: bool = False
    iterations: int = 30
    tolerance: float = 1e-4
    descriptor_fraction: float = 0.1

    def __post_init__(self) -> None:
        for name, allowed, wanted in (
            ('iterations', self.iterations >= 1, '1 or more'),
            ('descriptor_fraction', 0 < self.descriptor_fraction <= 1, 'more than 0, at most 1'),
            ('C', self.C is None or self.C > 0, 'more than 0, or null'),
        ):
            if not allowed:
                raise ValueError(f'{name} is {getattr(self, name)}; give {wanted}.')
        if self.data_dir:
            self.train = {**self.train, 'data_dir': self.data_dir}

    @property
    def config(self) -> Config:
        """The configuration of data and model."""
        options = {**self.train, 'head': 'gmm_fisher', 'seed': self.seed}
        return embeddings.parse_options(options)


def main(settings: DeepFisher) -> None:
    output, config = Path(settings.output), settings.config
    if not config.test_split:
        raise ValueError('test_split of train is null; give the name of a split.')
    if (output / 'metrics.json').exists():
        raise ValueError(f"'{output}' holds a finished run already. Give another --output.")
    output.mkdir(parents=True, exist_ok=True)
    write(output / 'config.yaml', yaml.safe_dump(asdict(settings), sort_keys=False))

    # Data, backbone, PCA and EM; C
    model, data = prepare(config)
    data_config = preprocessing(model, config)
    classes = data.classes
    kernel = algorithm.FisherKernel(cast(GMMFisher, model.head), bias=settings.bias)
    em = kernel.get()
    if settings.C is None:
        costs = algorithm.choose_costs(kernel, data, shared=settings.mode == 'multi')
    else:
        costs = [settings.C] * len(classes)
    print('C:', ', '.join(f'{name} {c:g}' for name, c in zip(classes, costs, strict=True)))

    def solve(mixture: Mixture, task: list[int], *splits: str) -> tuple[Tensor, dict[str, Tensor]]:
        """SVMs of a mixture, trained on some splits, and their decision values on all."""
        kernel.set(mixture)
        phi = {split: kernel.phi(y) for split, y in data.y.items()}
        signs = torch.cat([data.signs[split] for split in splits])[:, task]
        training = torch.cat([phi[split] for split in splits])
        svms = algorithm.solve_svms(training, signs, [costs[c] for c in task])
        return svms, {split: x.double() @ svms for split, x in phi.items()}

    def save(mixture: Mixture, svms: Tensor, folder: Path, names: list[str]) -> None:
        algorithm.to_classifier(model, mixture, svms)
        timm_fisher.save_model(model, folder, label_names=names, data_config=data_config)

    # Algorithm 1, and the models of table (b)
    log: list[dict[str, Any]] = []
    columns: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    single = {name: [index] for index, name in enumerate(classes)}
    tasks = single if settings.mode == 'single' else {'all': list(range(len(classes)))}
    keys = ('iterations', 'tolerance', 'descriptor_fraction', 'seed')
    options = {key: getattr(settings, key) for key in keys}
    iterations, best_iteration = {}, {}
    for name, task in tasks.items():
        kernel.set(em)
        steps = []
        for row, mixture in algorithm.learn(kernel, data, task, costs[task[0]], **options):
            steps.append((row, mixture))
            log.append({'task': name, **row})
            write(output / 'log.jsonl', ''.join(json.dumps(entry) + '\n' for entry in log))
            line = '{task} {iteration}: objective {objective:.6g}, val AP {val_ap:.2%}'
            print(line.format(**log[-1]))
        best_row, best = max(steps, key=lambda step: step[0]['val_ap'])  # the first of equals
        iterations[name], best_iteration[name] = row['iteration'], best_row['iteration']
        last = kernel.get()
        plot(log, output / 'objective.png')
        for kind, trained_with, transferred_with in (('base', em, em), ('deep', last, best)):
            _, trained = solve(trained_with, task, 'train')
            svms, transferred = solve(transferred_with, task, 'train', 'val')
            columns['val', kind].append(trained['val'])
            columns['test', kind].append(trained['test'])
            columns['transfer', kind].append(transferred['test'])
            columns['svms', kind].append(svms)
        folder = output / ('model' if settings.mode == 'multi' else f'model-{name}')
        save(best, svms, folder, [classes[c] for c in task])
    save(em, torch.cat(columns['svms', 'base'], 1), output / 'base', classes)

    # Evaluate
    results: dict[str, Any] = {group: {} for group in ('val', 'test', 'transfer')}
    for group, kind in product(results, ('base', 'deep')):
        signs = data.signs['val' if group == 'val' else 'test']
        results[group][kind] = evaluate(torch.cat(columns[group, kind], 1), signs, classes)
    metrics = {
        **results,
        'C': dict(zip(classes, costs, strict=True)),
        'iterations': iterations,
        'best_iteration': best_iteration,
        'images': {name: len(y) for name, y in data.y.items()},
        'out_features': model.head.out_features,
        'seconds': round(sum(row['seconds'] for row in log), 1),
        'versions': {'torch': torch.__version__, 'timm': timm.__version__},
    }
    text = table(results, settings)
    write(output / 'tables.md', text)
    write_rows([measurement(results, settings)], output / 'measurements.jsonl')
    write(output / 'metrics.json', json.dumps(metrics, indent=2) + '\n')
    print(f'\n{text}\n-> {output}')


def prepare(config: Config) -> tuple[PooledModel, algorithm.LabelledDescriptors]:
    """The model with its head fitted, and what the head's reduction gives of all splits."""
    splits, classes = load_splits(config)
    signs = {  # refuses missing classes before anything is computed
        name: algorithm.one_vs_rest(split.labels, classes, name) for name, split in splits.items()
    }
    model = embeddings.create_embedder(config)
    features = embeddings.cache_splits(model, splits, config)
    embeddings.fit_once(model, features['train'], None, config)
    head = cast(GMMFisher, model.head)

    def reduce(x: list[Tensor]) -> Tensor:
        (descriptors,) = model.descriptors(x)
        y: Tensor = head.reduce(unit_length(descriptors) if head.l2_descriptors else descriptors)
        return y

    y = {}
    for name, part in features.items():
        batches = embeddings.outputs(model, part, reduce, batch_size=algorithm.BATCH)
        y[name] = torch.cat(list(batches))
        signs[name] = signs[name].to(y[name].device)
    return model, algorithm.LabelledDescriptors(y, signs, classes)


def evaluate(scores: Tensor, signs: Tensor, classes: list[str]) -> dict[str, Any]:
    precision = algorithm.average_precision(scores, signs)
    return {
        'average_precision': dict(zip(classes, precision.tolist(), strict=True)),
        'mean_average_precision': precision.mean(),
        'accuracy': (scores.argmax(1) == signs.argmax(1)).double().mean().item(),
    }


def measurement(results: dict[str, Any], settings: DeepFisher) -> Measurement:
    """The line of this run: mean average precisions."""
    groups = {'val': '(a) validation', 'test': '(a) test', 'transfer': '(b) test'}
    shares = {
        f'{title}: {kind}': results[group][kind]['mean_average_precision']
        for (group, title), kind in product(groups.items(), ('base', 'deep'))
    }
    table = table_name('deep_fisher_svm', data_name(settings.config))
    return Measurement(table, row_name(settings), settings.seed, shares)


def row_name(settings: DeepFisher) -> str:
    return f'{settings.mode}, {"with" if settings.bias else "without"} bias'


def table(results: dict[str, Any], settings: DeepFisher) -> str:
    """Markdown, as tables 2 and 3 of the paper."""
    header = (
        'class|(a) val: base|deep|diff.|(a) test: base|deep|diff.|(b) test: k_base|k_deep|diff.'
    )
    summary = {'average': 'mean_average_precision', 'accuracy of the highest score': 'accuracy'}
    rows = []
    for name in [*results['val']['base']['average_precision'], *summary]:
        cells = [name]
        for group in results.values():
            base, deep = (
                100 * (part[summary[name]] if name in summary else part['average_precision'][name])
                for part in (group['base'], group['deep'])
            )
            cells += [f'{base:.1f}', f'{deep:.1f}', f'{deep - base:+.1f}']
        rows.append(cells)
    return (
        f'Average precision in %, {row_name(settings)}. (a) Deep training: SVMs of the training '
        'split, with the EM and with the last mixture. '
        '(b) Kernel transfer: SVMs of training and validation split, with the EM mixture and with '
        f'the one of the best validation result.\n\n{tables.table(header.split("|"), rows)}\n'
    )


def plot(log: list[dict[str, Any]], path: Path) -> None:
    """Objective, relative to the first, and average precision on the validation split."""
    figure = Figure(figsize=(11, 4.2), layout='tight')
    left, right = figure.subplots(1, 2)
    for i, task in enumerate(dict.fromkeys(row['task'] for row in log)):
        rows = [row for row in log if row['task'] == task]
        keys, first = ('objective', 'objective_after_step'), rows[0]['objective']
        trace = [row[key] / first for row in rows for key in keys if key in row]
        halves = [step / 2 for step in range(len(trace))]
        left.plot(halves, trace, f'C{i}o-', linewidth=1, markersize=4, label=task)
        left.plot(halves[1::2], trace[1::2], f'C{i}o', markersize=4, markerfacecolor='white')
        right.plot([100 * row['val_ap'] for row in rows], f'C{i}.-')
    left.set(xlabel='iteration', ylabel='objective / first objective')
    left.set_title('full: after the SVM step; hollow: after the mixture step', fontsize=9)
    right.set(xlabel='iteration', ylabel='validation average precision (%)')
    left.legend()
    save_png(figure, path)


if __name__ == '__main__':
    command_line.run(main, DeepFisher)
