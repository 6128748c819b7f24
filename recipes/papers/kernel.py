"""Improved deep Fisher kernel (IDFK) against the kernels without Fisher information: DFK, FK.

    python recipes/papers/kernel.py --config recipes/configs/kernel_usps.yaml --data-dir usps.npz \
        --output runs/kernel_usps

For each seed, and each fold if there are any, `dbm_idfk` is fitted to the training split, as a DBM
and as an RBM. Three kinds of Fisher vectors come from them, each of unit length:

    IDFK  of the DBM, with the leading axes of its Fisher information (eq. 8)
    DFK   of the same DBM, without
    FK    of the RBM, without

They go to a linear SVM and to the nearest neighbour (1-NN), less the mean over the training set
(but for the SVM on DFK and FK, which are sparse). Rank, ridge and C are chosen on validation images
with the first seed, in each fold by itself; then the classifiers are trained on training and
validation images, and measured on the test images, for every seed.

Leaves in `--output`: table.md, measurements.jsonl, results-sSEED-fFOLD.json; of the first fold the
models of each seed, with the largest rank (`timm.create_model('local-dir:...')`), and model/, with
rank and ridge as chosen for the SVM; and figures 2 to 4 of the paper, of the first seed and fold:
tsne.png, features.png (linear SHAP values) and sgd.png. Interrupted, it goes on where it stopped.

Paper: Ahmed, Azim, Early and Ramchurn, "Revisiting Deep Fisher Vectors: Using Fisher Information to
Improve Object Classification".
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.linear_model import SGDClassifier
from sklearn.svm import LinearSVC
from tqdm.auto import tqdm

import timm_fisher
from timm_fisher.files import keep_settings, save_png, write
from timm_fisher.training import command_line, embeddings
from timm_fisher.training.boltzmann_kernels import BoltzmannKernel
from timm_fisher.training.classifiers import nearest_labels, stack
from timm_fisher.training.config import Config
from timm_fisher.training.data import load_splits, preprocessing
from timm_fisher.training.measurements import Measurement, table_name, table_of
from timm_fisher.training.report import COMMIT, data_name
from timm_fisher.training.rows import write_rows
from timm_fisher.training.tsne import plot_tsne

EPOCHS = 30  # of SGD in sgd.png
TOP = 3  # features of each sign and class in features.png
# By the vectors that come from them.
MACHINES = {'IDFK': 'DBM', 'DFK': 'DBM', 'FK': 'RBM'}
CLASSIFIERS = {'svm': 'linear SVM', '1nn': '1-NN'}
Setting = dict[str, Any]  # rank and ridge of IDFK, C of an SVM


@dataclass
class Kernels:
    """Compare Fisher kernels of Boltzmann machines on one data set.

    Args:
        output: folder of all results.
        data_dir: as recipes/train.py takes it; a file FILE.npz with `dataset: npz` in `train`.
        seeds: of the repetitions; the first chooses the settings.
        train: options of training: data, backbone, and `head_kwargs` of the DBM.
        rbm: `head_kwargs` of the RBM in place of those of the DBM.
        ranks: to choose from; the largest is computed.
        ridges: to choose from.
        svm_c: C of the linear SVM, to choose from.
        search_images: at most this many training images are used by the search.
        paper: its figures in per cent, by Fisher vectors and classifier, for the pages.
    """

    output: str = 'runs/kernel'
    data_dir: str = ''
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    train: dict[str, Any] = field(default_factory=dict)
    rbm: dict[str, Any] = field(default_factory=lambda: {'hidden': [10]})
    ranks: list[int] = field(default_factory=lambda: [300, 1000])
    ridges: list[float] = field(default_factory=lambda: [0.0001, 0.001, 0.01])
    svm_c: list[float] = field(default_factory=lambda: [1.0, 10.0, 100.0])
    search_images: int = 10_000
    paper: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lists = ('seeds', 'ranks', 'ridges', 'svm_c')
        command_line.check_lists({name: getattr(self, name) for name in lists})
        self.train = {**self.train, 'head': 'dbm_idfk'}
        if self.data_dir:
            self.train['data_dir'] = self.data_dir

    def config(self, seed: int, fold: int, **head_kwargs: Any) -> Config:
        """The configuration of the DBM with the largest rank, or with other arguments."""
        common = {**self.train.get('head_kwargs', {}), 'rank': max(self.ranks), 'seed': seed}
        options = {'head_kwargs': {**common, **head_kwargs}, 'seed': seed, 'fold': fold}
        return embeddings.parse_options({**self.train, **options})


def main(kernels: Kernels) -> None:
    output = Path(kernels.output)
    settings = {k: v for k, v in asdict(kernels).items() if k not in ('output', 'seeds', 'paper')}
    settings['first_seed'] = kernels.seeds[0]  # which chooses
    keep_settings(output, settings)

    folds = range(max(1, kernels.config(kernels.seeds[0], 0).folds))
    results = []
    for seed, fold in (progress := tqdm(list(product(kernels.seeds, folds)), disable=None)):
        progress.set_description(f'seed {seed}, fold {fold}')
        path = output / f'results-s{seed}-f{fold}.json'
        if not path.exists():
            vectors = Vectors(kernels, seed, fold, output)
            choice = output / f'chosen-f{fold}.json'
            if not choice.exists():
                write(choice, json.dumps(search(kernels, vectors), indent=2) + '\n')
            chosen = json.loads(choice.read_text())
            if (seed, fold) == (kernels.seeds[0], 0):
                setting = chosen['IDFK']['svm']
                model = vectors.machines['DBM'].truncated(setting['rank'], setting['ridge'])
                data_config = preprocessing(model, vectors.config)
                timm_fisher.save_model(model, output / 'model', data_config=data_config)
                figures(vectors, chosen, output)
            write(path, json.dumps(measure(vectors, chosen), indent=2) + '\n')
        results.append(json.loads(path.read_text()))
        measured = measurements(results, kernels.paper)
        write(output / 'table.md', f'{table_of(measured)} {describe(results)}\n')
        write_rows(measured, output / 'measurements.jsonl')
    print((output / 'table.md').read_text())


class Vectors:
    """Fisher vectors of the splits of one seed and fold."""

    def __init__(self, kernels: Kernels, seed: int, fold: int, output: Path) -> None:
        self.config = config = kernels.config(seed, fold, whiten=True)
        rbm = kernels.config(seed, fold, **{**kernels.rbm, 'whiten': False})
        splits, self.classes = load_splits(config)
        if 'test' not in splits:
            raise ValueError(f"'{config.data_dir or config.dataset}' must have a test split.")
        self.labels = {name: split.labels for name, split in splits.items()}
        features = embeddings.cache_splits(embeddings.create_embedder(config), splits, config)
        # The models of all folds would fill a disk.
        folders = [output / name / f's{seed}' if fold == 0 else None for name in ('dbm', 'rbm')]
        self.machines = {
            'DBM': BoltzmannKernel(config, features, folders[0]),
            'RBM': BoltzmannKernel(rbm, features, folders[1]),
        }

    def get(self, method: str, setting: Setting) -> dict[str, Any]:
        """Vectors of unit length `[n, d]` of each split; dense for IDFK."""
        machine = self.machines[MACHINES[method]]
        if method == 'IDFK':
            return machine.whitened(setting['rank'], setting['ridge'])
        return machine.vectors

    def accuracy(
        self, method: str, setting: Setting, trained: list[str], split: str, images: int | None
    ) -> float:
        """Of a linear SVM if the setting has its C, or else of the nearest neighbour, on a split,
        trained on at most this many images of others."""
        z, seed = self.get(method, setting), self.config.seed
        train = stack(*(z[name] for name in trained))
        y = np.concatenate([self.labels[name] for name in trained])
        if images is not None:
            some = np.random.default_rng(seed).permutation(len(y))[:images]
            train, y = train[some], y[some]
        if 'C' in setting:
            return float(svm(setting['C'], seed).fit(train, y).score(z[split], self.labels[split]))
        return float((nearest_labels(train, y, z[split]) == self.labels[split]).mean())


def svm(c: float, seed: int) -> LinearSVC:
    return LinearSVC(C=c, tol=1e-3, random_state=seed)


def search(kernels: Kernels, vectors: Vectors) -> dict[str, Any]:
    """The settings of each method and classifier with the best accuracy on validation images."""
    whitenings = product(kernels.ranks, kernels.ridges)
    grids: dict[str, list[Setting]] = {method: [{}] for method in MACHINES}
    grids['IDFK'] = [{'rank': rank, 'ridge': ridge} for rank, ridge in whitenings]
    chosen: dict[str, Any] = {}
    for method, grid in grids.items():
        chosen[method] = {'tried': {}}
        with_c = [{**setting, 'C': c} for setting, c in product(grid, kernels.svm_c)]
        for classifier, settings in (('svm', with_c), ('1nn', grid)):
            options = ['train'], 'val', kernels.search_images
            tried = [(vectors.accuracy(method, s, *options), s) for s in settings]
            chosen[method]['tried'][classifier] = tried
            share, best = max(tried, key=lambda pair: pair[0])  # the first of equals
            chosen[method] |= {classifier: best, f'{classifier}_validation': share}
            print(f'{method}, {classifier}: validation {share:.2%} with {best}', flush=True)
    return chosen


def measure(vectors: Vectors, chosen: dict[str, Any]) -> dict[str, Any]:
    """Test accuracy of each method and classifier."""
    seed, rows = vectors.config.seed, dict[str, Any]()
    for method in MACHINES:
        rows[method] = {}
        for classifier in CLASSIFIERS:
            setting = chosen[method][classifier]
            share = vectors.accuracy(method, setting, ['train', 'val'], 'test', None)
            dimensions = vectors.get(method, setting)['test'].shape[1]
            rows[method][classifier] = {'accuracy': share, 'dimensions': dimensions, **setting}
        print(f'seed {seed}, {method}: {rows[method]}', flush=True)
    return {
        'data': data_name(vectors.config),
        'commit': COMMIT,
        'fold': vectors.config.fold,
        'seed': seed,
        'images': {name: len(part) for name, part in vectors.labels.items()},
        'classes': len(vectors.classes),
        'seconds': {name: machine.seconds for name, machine in vectors.machines.items()},
        'saturated': {name: machine.saturated for name, machine in vectors.machines.items()},
        'layers': {name: machine.head.hidden for name, machine in vectors.machines.items()},
        'rows': rows,
    }


def measurements(
    results: list[dict[str, Any]], paper: dict[str, dict[str, float]]
) -> list[Measurement]:
    """Lines of all methods and seeds, means over folds; with what was chosen, if there is one."""
    measured = []
    for seed, method in product(sorted({result['seed'] for result in results}), MACHINES):
        folds = [result for result in results if result['seed'] == seed]
        rows = {
            title: [each['rows'][method][key] for each in folds]
            for key, title in CLASSIFIERS.items()
        }
        texts = {
            title: ', '.join(f'{k} {first[k]:g}' for k in ('rank', 'ridge', 'C') if k in first)
            for title, (first, *_) in rows.items()
        }
        layers = ' x '.join(map(str, folds[0]['layers'][MACHINES[method]]))
        costs = {
            'dimensions (linear SVM)': max(row['dimensions'] for row in rows['linear SVM']),
            'fit (s)': statistics.median(each['seconds'][MACHINES[method]] for each in folds),
        }
        measured.append(
            Measurement(
                table=table_name('kernel', folds[0]['data']),
                row=f'{method} ({layers})',
                seed=seed,
                shares={
                    title: statistics.mean(row['accuracy'] for row in of_folds)
                    for title, of_folds in rows.items()
                },
                paper=paper.get(method, {}),
                costs=costs,
                settings={k: v for k, v in texts.items() if v} if len(folds) == 1 else {},
                commit=folds[0]['commit'],
            )
        )
    return measured


def describe(results: list[dict[str, Any]]) -> str:
    """What the table is of."""
    images = ', '.join(f'{count} {name}' for name, count in results[0]['images'].items())
    saturated = []
    for machine in results[0]['saturated']:
        layers = np.mean([result['saturated'][machine] for result in results], 0)
        saturated.append(f'{machine} {", ".join(f"{100 * share:.0f} %" for share in layers)}')
    return (
        f'Folds: {len({result["fold"] for result in results})}. Images: {images}; those for '
        'validation join the training once settings are chosen. Saturated posteriors: '
        f'{"; ".join(saturated)}.'
    )


def figures(vectors: Vectors, chosen: dict[str, Any], output: Path) -> None:
    setting, dfk = chosen['IDFK'], vectors.get('DFK', {})
    # t-SNE looks at neighbours. Where there are few test images, it shows training images, too.
    names = ['test', 'train'] if len(vectors.labels['test']) < 500 else ['test']
    near = {'IDFK': vectors.get('IDFK', setting['1nn']), 'DFK': dfk}
    panels = {method: stack(*(z[name] for name in names)) for method, z in near.items()}
    labels = np.concatenate([vectors.labels[name] for name in names])
    plot_tsne(panels, labels, vectors.classes, output / 'tsne.png')
    linear = {'IDFK': vectors.get('IDFK', setting['svm']), 'DFK': dfk}
    plot_features(linear['IDFK'], vectors, setting['svm']['C'], output / 'features.png')
    plot_sgd(linear, vectors, chosen, output / 'sgd.png')


def plot_features(z: dict[str, np.ndarray], vectors: Vectors, c: float, path: Path) -> None:
    """For each class the features that support it most in its test images, and those that refute
    it most in the others. The SHAP value of a feature of a linear model is its weight times the
    feature's distance from its mean over the training set."""
    some = np.random.default_rng(0).permutation(len(z['train']))[:10_000]
    machine = svm(c, 0).fit(z['train'][some], vectors.labels['train'][some])
    centred, y = z['test'] - z['train'].mean(0), vectors.labels['test']
    weights = machine.coef_
    if len(weights) == 1:  # two classes share one
        weights = np.concatenate([-weights, weights])
    of_class = {k: w for k, w in zip(machine.classes_, weights, strict=True) if (y == k).any()}
    rows = math.ceil(len(of_class) / 5)
    figure = Figure(figsize=(14, 2.3 * rows), layout='tight')
    axes = figure.subplots(rows, 5, squeeze=False).flat
    for ax, (k, weight) in zip(axes, of_class.items(), strict=False):
        for_it = weight * centred[y == k].mean(0)
        against = weight * centred[y != k].mean(0)
        refuting, supporting = against.argsort()[:TOP], for_it.argsort()[-TOP:]
        ax.barh([str(f) for f in refuting], against[refuting], color='tab:red')
        ax.barh([f'{f} ' for f in supporting], for_it[supporting], color='tab:green')
        ax.set_title(f'class {vectors.classes[k]}', fontsize=9)
        ax.tick_params(labelsize=7)
    for ax in axes[len(of_class) :]:
        ax.set_axis_off()
    figure.supxlabel('mean SHAP value of axis number ...', fontsize=9)
    save_png(figure, path)


def plot_sgd(
    pair: dict[str, dict[str, Any]], vectors: Vectors, chosen: dict[str, Any], path: Path
) -> None:
    """Accuracy of a linear SVM trained by SGD, by epoch, with and without Fisher information."""
    figure = Figure(figsize=(10, 4), layout='tight')
    axes = figure.subplots(1, 2, sharex=True)
    some = np.random.default_rng(0).permutation(len(vectors.labels['train']))[:10_000]
    y = vectors.labels['train'][some]
    for method, z in pair.items():
        train = z['train'][some]
        alpha = 1 / (chosen[method]['svm']['C'] * len(y))
        machine = SGDClassifier(alpha=alpha, random_state=0)
        curves = []
        for _ in tqdm(range(EPOCHS), f'SGD on {method}', leave=False, disable=None):
            machine.partial_fit(train, y, classes=np.arange(len(vectors.classes)))
            test = machine.score(z['test'], vectors.labels['test'])
            curves.append((machine.score(train, y), test))
        for ax, curve in zip(axes, 100 * np.array(curves).T, strict=True):
            ax.plot(range(1, EPOCHS + 1), curve, label=method)
    for ax, title in zip(axes, ('training', 'test'), strict=True):
        ax.set(xlabel='epoch', ylabel=f'{title} accuracy (%)')
        ax.grid(alpha=0.3)
        ax.legend()
    save_png(figure, path)


if __name__ == '__main__':
    command_line.run(main, Kernels)
