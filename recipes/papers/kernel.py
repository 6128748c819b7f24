"""Improved deep Fisher kernel (IDFK) against the kernels without Fisher information: DFK, FK.

    python recipes/kernel.py --config recipes/configs/kernel_usps.yaml --data-dir usps.npz \
        --output runs/kernel_usps

For each seed, and each fold if there are any, `dbm_idfk` is fitted to the training split, as a DBM
and as an RBM, and saved. Three kinds of Fisher vectors come from them:

    IDFK  of the DBM, with the leading axes of its Fisher information (eq. 8)
    DFK   of the same DBM, without
    FK    of the RBM, without

each of unit length, and each goes to a linear SVM and to the nearest neighbour (1-NN). The mean
over the training set is taken off, by the SVM only where the vectors are dense (IDFK): its bias
stands in for it. Rank, ridge and C are chosen by the accuracy on validation images, for each
classifier by itself, with the first seed; of folds in each fold by itself, so that no test image
of any fold has a say. With them it is trained again, on training and validation images, and
measured on the test images, for every seed.

Leaves in `--output`: table.md, results.json; of the first fold the models of each seed, with the
largest rank (`timm.create_model('local-dir:...')`), and model/, with rank and ridge as chosen for
the SVM; and the paper's figures, of the first seed and fold: tsne.png (figure 2), features.png
(figure 3, by linear SHAP values) and sgd.png (figure 4). Interrupted, it goes on where it stopped.

Paper: Ahmed, Azim, Early and Ramchurn, "Revisiting Deep Fisher Vectors: Using Fisher Information to
Improve Object Classification".
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import jsonargparse
import matplotlib
import numpy as np
import timm
import torch
from accelerate import Accelerator
from cluster import create, load, parse
from compare import percent
from scipy import sparse
from sklearn.linear_model import SGDClassifier
from sklearn.manifold import TSNE
from sklearn.preprocessing import normalize
from sklearn.svm import LinearSVC
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import timm_fisher
from timm_fisher import PooledModel
from timm_fisher.files import keep_settings, save_png, write
from timm_fisher.training.config import Config
from timm_fisher.training.data import Cached, cache_features, create_datasets, load_splits

matplotlib.use('Agg')
import matplotlib.pyplot as plt

SHOWN = 2000  # images in tsne.png
EPOCHS = 30  # of SGD in sgd.png
TOP = 3  # features of each sign and class in features.png
CHUNK = 1024  # images at a time
METHODS = ('IDFK', 'DFK', 'FK')


@dataclass
class Kernels:
    """Compare Fisher kernels of Boltzmann machines on one data set.

    Args:
        output: folder of all results.
        data_dir: as train.py takes it; a file FILE.npz with `dataset: npz` in `train`.
        seeds: of the repetitions; the first chooses the settings.
        train: options of train.py: data, backbone, and `head_kwargs` of the DBM.
        rbm: `head_kwargs` of the RBM in place of those of the DBM.
        ranks: to choose from; the largest is computed.
        ridges: to choose from.
        svm_c: C of the linear SVM, to choose from.
        search_images: training images that the search uses at most.
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


def main() -> None:
    parser = jsonargparse.ArgumentParser(description='Compare Fisher kernels on one data set.')
    parser.add_argument('--config', action='config', help='YAML file of these options')
    parser.add_class_arguments(Kernels)
    arguments = [a.replace('--data-dir', '--data_dir') for a in sys.argv[1:]]
    parsed = parser.instantiate(parser.parse_args(arguments))
    kernels = Kernels(**{key: parsed[key] for key in Kernels.__dataclass_fields__})
    for key in ('seeds', 'ranks', 'ridges', 'svm_c'):
        values = getattr(kernels, key)
        if not values or len(set(values)) < len(values):
            parser.error(f'{key} is {values}; give one or more, all different.')
    if kernels.data_dir:
        kernels.train['data_dir'] = kernels.data_dir
    kernels.train['head'] = 'dbm_idfk'
    output = Path(kernels.output)
    settings = {k: v for k, v in asdict(kernels).items() if k not in ('output', 'seeds')}
    settings['first_seed'] = kernels.seeds[0]  # which chooses
    keep_settings(output, settings)

    folds = range(max(1, parse(kernels.train, kernels.seeds[0], output).folds))
    results = []
    for seed, fold in (progress := tqdm(list(product(kernels.seeds, folds)), disable=None)):
        progress.set_description(f'seed {seed}, fold {fold}')
        path = output / f'results-s{seed}-f{fold}.json'
        if not path.exists():
            vectors = Vectors(kernels, seed, fold, output)
            choice = output / f'chosen-f{fold}.json'
            if not choice.exists():
                write(choice, json.dumps(search(kernels, vectors, seed), indent=2) + '\n')
            chosen = json.loads(choice.read_text())
            if (seed, fold) == (kernels.seeds[0], 0):
                vectors.save(chosen['IDFK']['svm'], output / 'model')
                figures(vectors, chosen, output)
            found = measure(vectors, chosen, seed)
            write(path, json.dumps({'fold': fold, **found}, indent=2) + '\n')
        results.append(json.loads(path.read_text()))
        write_results(results, kernels, output)
    print((output / 'table.md').read_text())


class Vectors:
    """Fisher vectors of the images of one seed and fold: of 'train', 'val' and 'test'.

    Attributes:
        labels: `[n]` of each split.
        phi: of the DBM (DFK) and of the RBM (FK): CSR `[n, d]` of each split.
        seconds: of the fits.
        saturated: share of posteriors within 0.05 of 0 or 1, for each layer, DBM and RBM.
    """

    def __init__(self, kernels: Kernels, seed: int, fold: int, output: Path) -> None:
        accelerator = Accelerator()
        options = {**kernels.train, 'fold': fold}
        options['head_kwargs'] = {**options.get('head_kwargs', {}), 'rank': max(kernels.ranks)}
        config = parse(options, seed, output)
        splits, self.classes = load_splits(config)
        if 'test' not in splits:
            raise ValueError(f"'{config.data_dir or config.dataset}' must have a test split.")
        self.labels = {name: split.labels for name, split in splits.items()}
        self.phi: dict[str, dict[str, sparse.csr_matrix]] = {}
        self.seconds: dict[str, float] = {}
        self.saturated: dict[str, list[float]] = {}
        machines = {
            'DFK': {'whiten': True, 'seed': seed},
            'FK': {**kernels.rbm, 'whiten': False, 'seed': seed},
        }
        features: dict[str, Cached] = {}
        for name, of_head in machines.items():
            model = create(config, **of_head)
            if not features:
                shape = {'img_size': config.img_size, 'crop_pct': config.crop_pct}
                data_config = timm.data.resolve_input_data_config(model, shape)
                datasets = create_datasets(config, splits, data_config)
                features = {
                    split: cache_features(model, datasets[split], config, accelerator)
                    for split in splits
                }
            folder = None
            if fold == 0:  # the others would fill a disk
                folder = output / ('rbm' if name == 'FK' else 'dbm') / f's{seed}'
            self.seconds[name] = fit(model, features['train'], folder, config, data_config)
            self.saturated[name] = saturated(model, features['train'])
            self.phi[name] = {split: score(model, each) for split, each in features.items()}
            if name == 'DFK':
                self.model, self.config, self.data_config = model, config, data_config
        axes = self.model.head.axes.cpu().numpy()
        mean = np.asarray(self.phi['DFK']['train'].mean(0)) @ axes
        self._rotated = {split: each @ axes - mean for split, each in self.phi['DFK'].items()}

    def get(self, method: str, setting: dict[str, Any]) -> dict[str, Any]:
        """Vectors of unit length `[n, d]` of each split; dense for IDFK."""
        if method != 'IDFK':
            return self.phi[method]
        rank, self.model.head.ridge = setting['rank'], setting['ridge']
        scale = self.model.head.inverse_root(torch.float32).cpu().numpy()[:rank]
        return {split: normalize(z[:, :rank] * scale) for split, z in self._rotated.items()}

    def save(self, setting: dict[str, Any], folder: Path) -> None:
        """The DBM with a rank and a ridge of its own, as a model without classifier."""
        rank, ridge = setting['rank'], setting['ridge']
        model = create(self.config, rank=rank, ridge=ridge)
        state = self.model.state_dict()
        state['head.axes'] = state['head.axes'][:, :rank].contiguous()
        state['head.variances'] = state['head.variances'][:rank]
        model.load_state_dict(state)
        timm_fisher.save_model(model, folder, data_config=self.data_config)


def fit(
    model: PooledModel,
    features: Cached,
    folder: Path | None,
    config: Config,
    data_config: dict[str, Any],
) -> float:
    """Fit a model's head and save it, or load it if that was done before; seconds it took then."""
    taken = folder / 'seconds.json' if folder else None
    if taken and folder and taken.exists():
        load(model, folder)
        return float(json.loads(taken.read_text()))
    start = time.perf_counter()
    loader = DataLoader(features, config.batch_size)
    timm_fisher.fit(model.to(Accelerator().device), loader, from_features=True)
    seconds = round(time.perf_counter() - start, 2)
    if taken and folder:
        timm_fisher.save_model(model, folder, data_config=data_config)
        write(taken, json.dumps(seconds))
    return seconds


@torch.no_grad()
def score(model: PooledModel, features: Cached) -> sparse.csr_matrix:
    """phi `[n, d]` of cached features. Sparse: where a pixel is off, so are its products."""
    device = next(model.parameters()).device
    return sparse.vstack(
        [
            sparse.csr_matrix(
                model.head.normalized_score(model.descriptors(x.to(device))).cpu().numpy()
            )
            for x, _ in DataLoader(features, CHUNK)
        ],
        format='csr',
    )


@torch.no_grad()
def saturated(model: PooledModel, features: Cached) -> list[float]:
    """Share of posteriors within 0.05 of 0 or 1, for each layer, over 1024 images."""
    x, _ = next(iter(DataLoader(features, CHUNK)))
    x = model.descriptors(x.to(next(model.parameters()).device))
    return [((mu - 0.5).abs() > 0.45).float().mean().item() for mu in model.head.posteriors(x)]


def nearest(train: Any, labels: np.ndarray, queries: Any) -> np.ndarray:
    """Label of the nearest training vector, once all are centred and of unit length."""
    mean = np.asarray(train.mean(0), np.float32).reshape(1, -1)

    def prepared(part: Any) -> torch.Tensor:
        return torch.from_numpy(normalize(dense(part) - mean))

    best = np.full(queries.shape[0], -np.inf, np.float32)
    found = np.zeros(queries.shape[0], labels.dtype)
    asked = prepared(queries)
    for start in range(0, train.shape[0], CHUNK):
        similarity, where = (asked @ prepared(train[start : start + CHUNK]).T).max(1)
        closer = similarity.numpy() > best
        best[closer] = similarity.numpy()[closer]
        found[closer] = labels[start + where.numpy()[closer]]
    return found


def dense(x: Any) -> np.ndarray:
    return np.asarray(x.todense() if sparse.issparse(x) else x, dtype=np.float32)


def svm(c: float, seed: int) -> LinearSVC:
    return LinearSVC(C=c, tol=1e-3, random_state=seed)


def search(kernels: Kernels, vectors: Vectors, seed: int) -> dict[str, Any]:
    """The settings of each method and classifier with the best accuracy on validation images."""
    y, truth = vectors.labels['train'], vectors.labels['val']
    some = np.random.default_rng(seed).permutation(len(y))[: kernels.search_images]
    chosen: dict[str, Any] = {}
    for method in METHODS:
        grid: list[dict[str, Any]] = [{}]
        if method == 'IDFK':
            pairs = product(kernels.ranks, kernels.ridges)
            grid = [{'rank': rank, 'ridge': ridge} for rank, ridge in pairs]
        tried: dict[str, list[tuple[float, dict[str, Any]]]] = {'svm': [], '1nn': []}
        for setting in grid:
            z = vectors.get(method, setting)
            train, val = z['train'][some], z['val']
            for c in kernels.svm_c:
                found = float(svm(c, seed).fit(train, y[some]).score(val, truth))
                tried['svm'].append((found, {**setting, 'C': c}))
            found = float((nearest(train, y[some], val) == truth).mean())
            tried['1nn'].append((found, setting))
        chosen[method] = {'tried': tried}
        for classifier, each in tried.items():
            best = max(each, key=lambda pair: pair[0])  # the first of equals
            chosen[method] |= {classifier: best[1], f'{classifier}_validation': best[0]}
            print(f'{method}, {classifier}: validation {best[0]:.2%} with {best[1]}', flush=True)
    return chosen


def measure(vectors: Vectors, chosen: dict[str, Any], seed: int) -> dict[str, Any]:
    """Test accuracy of each method and classifier."""
    y = np.concatenate([vectors.labels['train'], vectors.labels['val']])
    truth = vectors.labels['test']
    rows: dict[str, Any] = {}
    for method in METHODS:
        rows[method] = {}
        for classifier in ('svm', '1nn'):
            setting = chosen[method][classifier]
            z = vectors.get(method, setting)
            train = join(z['train'], z['val'])
            if classifier == 'svm':
                predicted = svm(setting['C'], seed).fit(train, y).predict(z['test'])
            else:
                predicted = nearest(train, y, z['test'])
            rows[method][classifier] = {
                'accuracy': float((predicted == truth).mean()),
                'dimensions': int(z['test'].shape[1]),
                **setting,
            }
        print(f'seed {seed}, {method}: {rows[method]}', flush=True)
    images = {name: len(labels) for name, labels in vectors.labels.items()}
    about = {'seed': seed, 'images': images, 'classes': len(vectors.classes)}
    return {**about, 'seconds': vectors.seconds, 'saturated': vectors.saturated, 'rows': rows}


def join(first: Any, second: Any) -> Any:
    if sparse.issparse(first):
        return sparse.vstack([first, second], format='csr')
    return np.concatenate([first, second])


def write_results(results: list[dict[str, Any]], kernels: Kernels, output: Path) -> None:
    """table.md and results.json of what there is so far."""
    write(output / 'table.md', table(results))
    everything = {'settings': asdict(kernels), 'results': results}
    write(output / 'results.json', json.dumps(everything, indent=2) + '\n')


def table(results: list[dict[str, Any]]) -> str:
    """Markdown; mean and standard deviation over the seeds, of means over folds, in per cent."""
    seeds = sorted({each['seed'] for each in results})
    lines = [
        '| Fisher vectors | linear SVM | 1-NN | fit | settings of the SVM | of 1-NN |',
        '|---|---:|---:|---:|---|---|',
    ]
    for method in METHODS:
        cells, settings = [], []
        for classifier in ('svm', '1nn'):
            found = [(each['seed'], each['rows'][method][classifier]) for each in results]
            of_seed = [[row['accuracy'] for s, row in found if s == seed] for seed in seeds]
            cells.append(percent([float(np.mean(part)) for part in of_seed], digits=2))
            names = [key for key in found[0][1] if key != 'accuracy']
            values = {key: sorted({row[key] for _, row in found}) for key in names}
            settings.append(
                ', '.join(
                    f'{key} {" or ".join(f"{v:g}" for v in each)}' for key, each in values.items()
                )
            )
        machine = 'FK' if method == 'FK' else 'DFK'
        seconds = float(np.median([each['seconds'][machine] for each in results]))
        lines.append(
            f'| {method} | {" | ".join(cells)} | {seconds:.0f} s | {" | ".join(settings)} |'
        )
    shares = {
        machine: np.mean([each['saturated'][machine] for each in results], 0)
        for machine in ('DFK', 'FK')
    }
    text = '; '.join(
        f'{machine} {", ".join(f"{100 * share:.0f} %" for share in each)}'
        for machine, each in shares.items()
    )
    folds = len({each['fold'] for each in results})
    images = ', '.join(f'{count} {name}' for name, count in results[0]['images'].items())
    lines += [
        '',
        f'Mean and standard deviation over seeds {", ".join(map(str, seeds))}'
        f'{f" of the mean over {folds} folds" if folds > 1 else ""}; {images} images, of which '
        'validation images join the training once settings are chosen. Saturated posteriors: '
        f'{text}.',
    ]
    return '\n'.join(lines) + '\n'


def figures(vectors: Vectors, chosen: dict[str, Any], output: Path) -> None:
    """The paper's figures 2 to 4."""
    setting, dfk = chosen['IDFK'], vectors.get('DFK', {})
    # t-SNE looks at neighbours.
    near = {'IDFK': vectors.get('IDFK', setting['1nn']), 'DFK': dfk}
    plot_tsne(near, vectors, output / 'tsne.png')
    linear = {'IDFK': vectors.get('IDFK', setting['svm']), 'DFK': dfk}
    plot_features(linear['IDFK'], vectors, setting['svm']['C'], output / 'features.png')
    plot_sgd(linear, vectors, chosen, output / 'sgd.png')


def plot_tsne(pair: dict[str, dict[str, Any]], vectors: Vectors, path: Path) -> None:
    """Test images, and training images where there are few of them, side by side."""
    few = len(vectors.labels['test']) < 500
    names = ['test', 'train'] if few else ['test']
    y = np.concatenate([vectors.labels[name] for name in names])
    shown = np.random.default_rng(0).permutation(len(y))[:SHOWN]
    figure, axes = plt.subplots(1, 2, figsize=(12, 6))
    last = max(1, len(vectors.classes) - 1)
    for ax, (method, z) in zip(axes, pair.items(), strict=True):
        points = join(z['test'], z['train']) if few else z['test']
        spread = TSNE(random_state=0).fit_transform(dense(points[shown]))
        for index, name in enumerate(vectors.classes):
            part = spread[y[shown] == index]
            ax.scatter(*part.T, s=6, color=plt.cm.turbo(index / last), label=name)
        ax.set(title=method, xticks=[], yticks=[])
    columns = 1 if len(vectors.classes) <= 20 else 2
    axes[1].legend(
        markerscale=2, fontsize=7, ncols=columns, loc='center left', bbox_to_anchor=(1, 0.5)
    )
    figure.tight_layout()
    save_png(figure, path)


def plot_features(z: dict[str, np.ndarray], vectors: Vectors, c: float, path: Path) -> None:
    """For each class the features that support it most in its test images, and those that refute
    it most in the others.

    Of a linear model, the SHAP value of a feature is its weight times the feature's distance from
    its mean over the training set.
    """
    some = np.random.default_rng(0).permutation(len(z['train']))[:10_000]
    machine = svm(c, 0).fit(z['train'][some], vectors.labels['train'][some])
    centred = z['test'] - z['train'].mean(0)
    weights = machine.coef_
    if len(weights) == 1:  # two classes share one
        weights = np.concatenate([-weights, weights])
    of_class = dict(zip(machine.classes_, weights, strict=True))
    present = [k for k in of_class if (vectors.labels['test'] == k).any()]
    rows = -(-len(present) // 5)
    figure, axes = plt.subplots(rows, 5, figsize=(14, 2.3 * rows), squeeze=False)
    for ax in axes.flat[len(present) :]:
        ax.set_axis_off()
    for ax, k in zip(axes.flat, present, strict=False):
        inside = vectors.labels['test'] == k
        for_it = of_class[k] * centred[inside].mean(0)
        against = of_class[k] * centred[~inside].mean(0)
        refuting, supporting = against.argsort()[:TOP], for_it.argsort()[-TOP:]
        ax.barh([str(f) for f in refuting], against[refuting], color='tab:red')
        ax.barh([f'{f} ' for f in supporting], for_it[supporting], color='tab:green')
        ax.set_title(f'class {vectors.classes[k]}', fontsize=9)
        ax.tick_params(labelsize=7)
    figure.supxlabel('mean SHAP value of axis number ...', fontsize=9)
    figure.tight_layout()
    save_png(figure, path)


def plot_sgd(
    pair: dict[str, dict[str, Any]], vectors: Vectors, chosen: dict[str, Any], path: Path
) -> None:
    """Accuracy of a linear SVM trained by SGD, by epoch, with and without Fisher information."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True)
    some = np.random.default_rng(0).permutation(len(vectors.labels['train']))[:10_000]
    y = vectors.labels['train'][some]
    for method, z in pair.items():
        train = z['train'][some]
        machine = SGDClassifier(
            alpha=1 / (chosen[method]['svm']['C'] * len(y)), random_state=0, shuffle=True
        )
        curves: tuple[list[float], list[float]] = ([], [])
        for _ in tqdm(range(EPOCHS), f'SGD on {method}', leave=False, disable=None):
            machine.partial_fit(train, y, classes=np.arange(len(vectors.classes)))
            curves[0].append(100 * machine.score(train, y))
            curves[1].append(100 * machine.score(z['test'], vectors.labels['test']))
        for ax, curve in zip(axes, curves, strict=True):
            ax.plot(range(1, EPOCHS + 1), curve, label=method)
    for ax, title in zip(axes, ('training', 'test'), strict=True):
        ax.set(xlabel='epoch', ylabel=f'{title} accuracy (%)')
        ax.grid(alpha=0.3)
        ax.legend()
    figure.tight_layout()
    save_png(figure, path)


if __name__ == '__main__':
    main()
