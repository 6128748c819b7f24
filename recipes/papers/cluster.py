"""Cluster images without labels: gsnmf on a frozen and on a fine-tuned backbone, with baselines.

    python recipes/cluster.py --config recipes/configs/cluster_mnist.yaml --data-dir PATH \
        --output runs/cluster_mnist

Five representations of each image, by their names in the paper:

    CNN            mean of the frozen backbone's map
    PCA-CNN        its principal components, as many as gsnmf has components
    NMF-FCN        gsnmf without penalties, fitted to the training images
    GSNMF-FCN-OTS  gsnmf, off the shelf: likewise, with penalties
    GSNMF-FCN-FT   gsnmf after unsupervised stages of recipes/train.py, which fine-tune the backbone

L2-normalised, they are clustered by k-means and spectral clustering, with as many clusters as there
are classes. Labels serve to measure: accuracy under the best matching of clusters to classes, and
mutual information normalised by the larger entropy; and, apart from that, for a linear SVM on the
labelled training images (table 5). No setting is chosen by them but the C of that SVM, on the
validation split.

A seed is of everything: what is carved off for validation, fine-tuning, clustering. Leaves in
`--output`: table.md, results.json, tsne.png, the models, each loadable by
`timm.create_model('local-dir:...', pretrained=True)`, and a log of each fine-tuning; interrupted,
it goes on where it stopped.

Paper: Gui et al., "Factorized Convolutional Networks: Unsupervised Fine-Tuning for Image
Clustering", WACV 2018.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import matplotlib
import numpy as np
import safetensors.torch
import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from compare import percent, run
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.preprocessing import normalize
from sklearn.svm import LinearSVC
from torch import Tensor
from torch.utils.data import DataLoader

import timm_fisher
from timm_fisher import PooledModel
from timm_fisher.files import keep_settings, save_png, write
from timm_fisher.training.config import Config, parse_config
from timm_fisher.training.data import Cached, cache_features, create_datasets, load_splits
from timm_fisher.training.run import create_model

matplotlib.use('Agg')
import matplotlib.pyplot as plt

STARTS = 10  # of k-means, also within spectral clustering (section 4.3)
C_GRID = (0.1, 1.0, 10.0, 100.0)
SHOWN = 2000  # images in tsne.png
COLUMNS = {
    'kmeans_accuracy': 'k-means, accuracy',
    'kmeans_nmi': 'k-means, NMI',
    'spectral_accuracy': 'spectral, accuracy',
    'spectral_nmi': 'spectral, NMI',
    'svm_accuracy': 'linear SVM',
}


@dataclass
class Clustering:
    """Cluster the images of one data set, by what a backbone and gsnmf make of them.

    Args:
        output: folder of all results.
        data_dir: as train.py takes it; a file FILE.npz with `dataset: npz` in `train`.
        seeds: of the repetitions.
        train: options of train.py: data, backbone, `head_kwargs` of gsnmf (no more components than
            training images are made), and the stages of fine-tuning, all of them unsupervised.
        clustered: the images that are clustered: the test split, or all. All are where the file or
            data set has no test split of its own.
        neighbours: of each image in the graph of spectral clustering.
    """

    output: str = 'runs/cluster'
    data_dir: str = ''
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    train: dict[str, Any] = field(default_factory=dict)
    clustered: Literal['test', 'all'] = 'test'
    neighbours: int = 10


def main() -> None:
    parser = jsonargparse.ArgumentParser(description='Cluster images without labels.')
    parser.add_argument('--config', action='config', help='YAML file of these options')
    parser.add_class_arguments(Clustering)
    arguments = [a.replace('--data-dir', '--data_dir') for a in sys.argv[1:]]
    parsed = parser.instantiate(parser.parse_args(arguments))
    clustering = Clustering(**{key: parsed[key] for key in Clustering.__dataclass_fields__})
    if not clustering.seeds or len(set(clustering.seeds)) < len(clustering.seeds):
        parser.error(f'seeds is {clustering.seeds}; give one or more, all different.')
    if clustering.data_dir:
        clustering.train['data_dir'] = clustering.data_dir
    clustering.train['head'] = 'gsnmf'
    output = Path(clustering.output)
    settings = {k: v for k, v in asdict(clustering).items() if k not in ('output', 'seeds')}
    keep_settings(output, settings)

    results = {}
    for seed in clustering.seeds:
        path = output / f'results-s{seed}.json'
        if not path.exists():
            write(path, json.dumps(measure(clustering, seed, output), indent=2) + '\n')
        results[seed] = json.loads(path.read_text())
        write_results(list(results.values()), clustering, output)
    print((output / 'table.md').read_text())


def measure(clustering: Clustering, seed: int, output: Path) -> dict[str, Any]:
    """All representations with one seed, clustered and classified."""
    # Data and frozen backbone
    accelerator = Accelerator()
    config = parse(clustering.train, seed, output)
    if not config.unsupervised:
        raise ValueError('Every stage of `train` must be unsupervised: labels are for measuring.')
    splits, classes = load_splits(config)
    if 'test' not in splits or len(classes) < 2:
        raise ValueError(
            f"'{config.data_dir or config.dataset}' must have a test split and images of two "
            f'classes or more; it has {list(splits)} and {classes}.'
        )
    components = config.head_kwargs.get('components', 256)
    components = min(components, len(splits['train'].indices))
    options = {**clustering.train, 'head_kwargs': {**config.head_kwargs, 'components': components}}
    config = parse(options, seed, output)
    model = create(config)
    shape = {'img_size': config.img_size, 'crop_pct': config.crop_pct}
    data_config = timm.data.resolve_input_data_config(model, shape)
    datasets = create_datasets(config, splits, data_config)

    def features(of: PooledModel) -> dict[str, Cached]:
        return {name: cache_features(of, datasets[name], config, accelerator) for name in splits}

    # Representations
    frozen = features(model)
    found = {'CNN': {name: encode(each, pooled(model)) for name, each in frozen.items()}}
    dimensions = min(components, *found['CNN']['train'].shape)
    pca = PCA(dimensions, random_state=seed).fit(found['CNN']['train'])
    found['PCA-CNN'] = {name: normalize(pca.transform(x)) for name, x in found['CNN'].items()}
    for name, penalties in (
        ('NMF-FCN', {'l1_penalty': 0.0, 'l2_penalty': 0.0}),
        ('GSNMF-FCN-OTS', {}),
    ):
        folder = output / name / f's{seed}'
        model = create(config, **penalties).to(accelerator.device)
        if not (folder / 'model.safetensors').exists():
            loader = DataLoader(frozen['train'], config.batch_size)
            timm_fisher.fit(model, loader, from_features=True)
            timm_fisher.save_model(model, folder, data_config=data_config)
        load(model, folder)
        found[name] = {split: encode(each, codes(model)) for split, each in frozen.items()}
    run(options, {}, seed, output / 'GSNMF-FCN-FT')
    load(model, output / 'GSNMF-FCN-FT' / f's{seed}' / 'model')
    tuned = features(model)
    found['GSNMF-FCN-FT'] = {name: encode(each, codes(model)) for name, each in tuned.items()}
    labels = {name: split.labels for name, split in splits.items()}
    if seed == clustering.seeds[0]:
        pair = [found['CNN']['test'], encode(tuned['test'], pooled(model))]
        plot(pair, labels['test'], classes, output / 'tsne.png')
    # No other run has this backbone; the features of the frozen one may serve again.
    own = files(tuned) - files(frozen)
    del tuned  # Windows keeps what is mapped
    for path in own:
        path.unlink()

    # Clusters and classes
    one_set = splits['test'].dataset is splits['train'].dataset
    chosen = list(splits) if one_set or clustering.clustered == 'all' else ['test']
    truth = np.concatenate([labels[name] for name in chosen])
    rows = {}
    for name, z in found.items():
        points = np.concatenate([z[split] for split in chosen])
        rows[name] = {'dimensions': points.shape[1]}
        for method, clusters in cluster(points, len(classes), clustering.neighbours, seed).items():
            rows[name][f'{method}_accuracy'] = matched_accuracy(truth, clusters)
            rows[name][f'{method}_nmi'] = nmi(truth, clusters)
        rows[name] |= classify(z, labels, seed)
        print(f'seed {seed}, {name}: {rows[name]}', flush=True)
    about = {'clustered': len(truth), 'splits': chosen, 'classes': len(classes)}
    return {**about, 'images': {name: len(y) for name, y in labels.items()}, 'rows': rows}


def parse(options: dict[str, Any], seed: int, output: Path) -> Config:
    """Options of train.py, checked as it checks them."""
    file = output / 'train.yaml'
    write(file, yaml.safe_dump(options, sort_keys=False))
    return parse_config(['--config', str(file), '--seed', str(seed)])


def create(config: Config, **of_head: Any) -> PooledModel:
    """A model without classifier, as train.py would build it."""
    set_seed(config.seed)
    config = replace(config, head_kwargs={**config.head_kwargs, **of_head})
    return create_model(config, num_classes=0).to(memory_format=torch.channels_last)


def load(model: PooledModel, folder: Path) -> None:
    """Saved weights into a model, all or none."""
    model.load_state_dict(safetensors.torch.load_file(folder / 'model.safetensors'), strict=True)


def files(features: dict[str, Cached]) -> set[Path]:
    """Where cached features lie."""
    return {Path(array.filename) for each in features.values() for array in each.arrays}


def pooled(model: PooledModel) -> Callable[[Tensor], Tensor]:
    """Features of a backbone -> the mean of its map."""
    return lambda x: model.descriptors(x).mean(1)


def codes(model: PooledModel) -> Callable[[Tensor], Tensor]:
    """Features of a backbone -> what the head makes of them."""
    return lambda x: model.forward_head(x, pre_logits=True)


@torch.no_grad()
def encode(features: Cached, function: Callable[[Tensor], Tensor]) -> np.ndarray:
    """L2-normalised vectors `[n, D]` of a function of the features."""
    device = Accelerator().device
    parts = [function(x.to(device)).cpu() for x, _ in DataLoader(features, 256)]
    return normalize(torch.cat(parts).double().numpy())


def cluster(points: np.ndarray, k: int, neighbours: int, seed: int) -> dict[str, np.ndarray]:
    """Clusters `[n]` by k-means and by spectral clustering."""
    spectral = SpectralClustering(
        k,
        affinity='nearest_neighbors',
        n_neighbors=min(neighbours, len(points)),
        n_init=STARTS,
        random_state=seed,
    )
    return {
        'kmeans': KMeans(k, n_init=STARTS, random_state=seed).fit_predict(points),
        'spectral': spectral.fit_predict(points),
    }


def matched_accuracy(truth: np.ndarray, clusters: np.ndarray) -> float:
    """Share of images whose cluster is matched with their class, by the best one-to-one matching
    (eq. 7)."""
    counts = contingency_matrix(truth, clusters)
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / len(truth))


def nmi(truth: np.ndarray, clusters: np.ndarray) -> float:
    """Mutual information by the larger of the two entropies (eq. 8)."""
    return float(normalized_mutual_info_score(truth, clusters, average_method='max'))


def classify(
    z: dict[str, np.ndarray], labels: dict[str, np.ndarray], seed: int
) -> dict[str, float]:
    """Test accuracy of a linear SVM on the training split, its C chosen on the validation split,
    the smallest of equals."""
    svms = [
        LinearSVC(C=c, random_state=seed, max_iter=10_000).fit(z['train'], labels['train'])
        for c in C_GRID
    ]
    scores = [svm.score(z['val'], labels['val']) for svm in svms]
    best = int(np.argmax(scores))
    accuracy = float(svms[best].score(z['test'], labels['test']))
    return {'svm_accuracy': accuracy, 'svm_C': C_GRID[best]}


def write_results(results: list[dict[str, Any]], clustering: Clustering, output: Path) -> None:
    """table.md and results.json of the seeds so far."""
    seeds = clustering.seeds[: len(results)]
    write(output / 'table.md', table(results, seeds))
    everything = {'seeds': seeds, 'settings': asdict(clustering), 'results': results}
    write(output / 'results.json', json.dumps(everything, indent=2) + '\n')


def table(results: list[dict[str, Any]], seeds: list[int]) -> str:
    """Markdown; mean and standard deviation over the seeds, in per cent."""
    first = results[0]
    lines = [
        f'| representation | dimensions | {" | ".join(COLUMNS.values())} |',
        f'|---|---:|{"---:|" * len(COLUMNS)}',
    ]
    for name, row in first['rows'].items():
        cells = [percent([each['rows'][name][key] for each in results]) for key in COLUMNS]
        lines.append(f'| {name} | {row["dimensions"]} | {" | ".join(cells)} |')
    images = ', '.join(f'{count} {name}' for name, count in first['images'].items())
    lines += [
        '',
        f'{first["clustered"]} images of {first["classes"]} classes clustered '
        f'({" + ".join(first["splits"])}); {images} images. Mean and standard deviation over seeds '
        f'{", ".join(map(str, seeds))}.',
    ]
    return '\n'.join(lines) + '\n'


def plot(pair: list[np.ndarray], labels: np.ndarray, classes: list[str], path: Path) -> None:
    """t-SNE of the test images' pooled features before and after fine-tuning, coloured by class."""
    shown = np.random.default_rng(0).permutation(len(labels))[:SHOWN]
    figure, axes = plt.subplots(1, 2, figsize=(12, 6))
    for ax, title, points in zip(axes, ('before', 'after'), pair, strict=True):
        perplexity = min(30.0, (len(shown) - 1) / 3)
        spread = TSNE(perplexity=perplexity, random_state=0).fit_transform(points[shown])
        for index, name in enumerate(classes):
            x, y = spread[labels[shown] == index].T
            ax.scatter(x, y, s=6, color=plt.cm.turbo(index / (len(classes) - 1)), label=name)
        ax.set(title=f'{title} fine-tuning', xticks=[], yticks=[])
    if len(classes) <= 20:
        axes[1].legend(markerscale=2, fontsize=7, loc='center left', bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    save_png(figure, path)


if __name__ == '__main__':
    main()
