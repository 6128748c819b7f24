"""Cluster images without labels: gsnmf on a frozen and on a fine-tuned backbone, with baselines.

    python recipes/papers/cluster.py --config recipes/configs/cluster_mnist.yaml --data-dir PATH \
        --output runs/cluster_mnist

Five representations of each image, by their names in the paper:

    CNN            mean of the frozen backbone's map
    PCA-CNN        its principal components, as many as gsnmf has components
    NMF-FCN        gsnmf without penalties, fitted to the training images
    GSNMF-FCN-OTS  gsnmf, off the shelf: likewise, with penalties
    GSNMF-FCN-FT   gsnmf after unsupervised stages of training, which fine-tune the backbone

L2-normalised, they are clustered by k-means and spectral clustering, with as many clusters as there
are classes. Labels serve to measure: accuracy and mutual information of the clusters, and a linear
SVM on the labelled training images (table 5), whose C is chosen on the validation split.

Leaves in `--output`: table.md, measurements.jsonl, results-sSEED.json, tsne.png, the models,
loadable by `timm.create_model('local-dir:...', pretrained=True)`, and a log of each fine-tuning;
interrupted, it goes on where it stopped.

Paper: Gui et al., "Factorized Convolutional Networks: Unsupervised Fine-Tuning for Image
Clustering", WACV 2018.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize

from timm_fisher.files import keep_settings, write
from timm_fisher.training import command_line, embeddings
from timm_fisher.training.classifiers import validated_svm
from timm_fisher.training.clusters import evaluate_clusters
from timm_fisher.training.data import load_splits
from timm_fisher.training.launch import launch
from timm_fisher.training.measurements import Measurement, table_name, table_of
from timm_fisher.training.report import COMMIT, data_name
from timm_fisher.training.rows import write_rows
from timm_fisher.training.run import load_weights
from timm_fisher.training.tsne import plot_tsne

COLUMNS = {
    'kmeans_accuracy': 'k-means: accuracy',
    'kmeans_nmi': 'k-means: NMI',
    'spectral_accuracy': 'spectral: accuracy',
    'spectral_nmi': 'spectral: NMI',
    'svm_accuracy': 'linear SVM',
}


@dataclass
class Clustering:
    """Cluster the images of one data set, by what a backbone and gsnmf make of them.

    Args:
        output: folder of all results.
        data_dir: as recipes/train.py takes it; a file FILE.npz with `dataset: npz` in `train`.
        seeds: of the repetitions, each of everything random.
        train: options of training: data, backbone, `head_kwargs` of gsnmf (no more components than
            training images are made), and the stages of fine-tuning, all of them unsupervised.
        clustered: the test split, or all images.
        neighbours: of each image in the graph of spectral clustering.
        paper: its figures in per cent, by representation and column of the table, shown beside.
    """

    output: str = 'runs/cluster'
    data_dir: str = ''
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    train: dict[str, Any] = field(default_factory=dict)
    clustered: Literal['test', 'all'] = 'test'
    neighbours: int = 10
    paper: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        command_line.check_lists({'seeds': self.seeds})
        self.train = {**self.train, 'head': 'gsnmf'}
        if self.data_dir:
            self.train['data_dir'] = self.data_dir


def main(clustering: Clustering) -> None:
    output = Path(clustering.output)
    settings = {
        k: v for k, v in asdict(clustering).items() if k not in ('output', 'seeds', 'paper')
    }
    keep_settings(output, settings)
    results = []
    for seed in clustering.seeds:
        path = output / f'results-s{seed}.json'
        if not path.exists():
            write(path, json.dumps(measure(clustering, seed, output), indent=2) + '\n')
        results.append(json.loads(path.read_text()))
        measured = measurements(results, clustering.paper)
        write_rows(measured, output / 'measurements.jsonl')
        write(output / 'table.md', f'{table_of(measured)} {describe(results[0])}\n')
    print((output / 'table.md').read_text())


def measure(clustering: Clustering, seed: int, output: Path) -> dict[str, Any]:
    """All representations with one seed, clustered and classified."""
    # Data and frozen backbone
    options = {**clustering.train, 'seed': seed}
    config = embeddings.parse_options(options)
    if not config.unsupervised:
        raise ValueError('Every stage of `train` must be unsupervised: labels are for measuring.')
    splits, classes = load_splits(config)
    if 'test' not in splits or len(classes) < 2:
        raise ValueError(
            f"'{config.data_dir or config.dataset}' must have a test split and images of two "
            f'classes or more; it has {list(splits)} and {classes}.'
        )
    components = min(config.head_kwargs.get('components', 256), len(splits['train'].indices))
    options['head_kwargs'] = {**config.head_kwargs, 'components': components}
    config = embeddings.parse_options(options)
    model = embeddings.create_embedder(config)
    frozen = embeddings.cache_splits(model, splits, config)

    # Representations
    cnn = {part: embeddings.mean_vectors(model, x) for part, x in frozen.items()}
    pca = PCA(min(components, *cnn['train'].shape), random_state=seed).fit(cnn['train'])
    projected = {part: normalize(pca.transform(x)) for part, x in cnn.items()}
    vectors = {'CNN': cnn, 'PCA-CNN': projected}
    no_penalties = {'l1_penalty': 0.0, 'l2_penalty': 0.0}
    for name, head_kwargs in (('NMF-FCN', no_penalties), ('GSNMF-FCN-OTS', {})):
        model = embeddings.create_embedder(config, **head_kwargs)
        embeddings.fit_once(model, frozen['train'], output / name / f's{seed}', config)
        vectors[name] = {part: embeddings.head_vectors(model, x) for part, x in frozen.items()}
    folder = output / 'GSNMF-FCN-FT' / f's{seed}'
    launch(options, folder, log=Path(f'{folder}.log'))
    load_weights(model, folder / 'model')
    # No other run has this backbone: its features serve once. (Windows keeps what is mapped.)
    with TemporaryDirectory(dir=config.cache_dir, ignore_cleanup_errors=True) as once:
        tuned = embeddings.cache_splits(model, splits, replace(config, cache_dir=once))
        fine_tuned = {part: embeddings.head_vectors(model, x) for part, x in tuned.items()}
        vectors['GSNMF-FCN-FT'] = fine_tuned
        if seed == clustering.seeds[0]:
            after = embeddings.mean_vectors(model, tuned['test'])
            panels = {'before fine-tuning': cnn['test'], 'after fine-tuning': after}
            plot_tsne(panels, splits['test'].labels, classes, output / 'tsne.png')

    # Clusters and classes
    labels = {name: split.labels for name, split in splits.items()}
    chosen = list(splits) if clustering.clustered == 'all' else ['test']
    truth = np.concatenate([labels[name] for name in chosen])
    rows = {}
    for name, parts in vectors.items():
        points = np.concatenate([parts[split] for split in chosen])
        clusters = evaluate_clusters(
            points, truth, len(classes), neighbours=clustering.neighbours, seed=seed
        )
        accuracy, c = validated_svm(parts, labels, seed=seed)
        svm = {'svm_accuracy': accuracy, 'svm_C': c}
        rows[name] = {'dimensions': points.shape[1], **clusters, **svm}
        print(f'seed {seed}, {name}: {rows[name]}', flush=True)
    about = {'seed': seed, 'data': data_name(config), 'commit': COMMIT, 'splits': chosen}
    counts = {'clustered': len(truth), 'classes': len(classes)}
    images = {name: len(y) for name, y in labels.items()}
    return {**about, **counts, 'images': images, 'rows': rows}


def measurements(
    results: list[dict[str, Any]], paper: dict[str, dict[str, float]]
) -> list[Measurement]:
    """Lines of all representations and seeds."""
    return [
        Measurement(
            table=table_name('cluster', result['data']),
            row=name,
            seed=result['seed'],
            shares={title: row[key] for key, title in COLUMNS.items()},
            paper=paper.get(name, {}),
            commit=result['commit'],
        )
        for result in results
        for name, row in result['rows'].items()
    ]


def describe(result: dict[str, Any]) -> str:
    """What was clustered."""
    images = ', '.join(f'{count} {name}' for name, count in result['images'].items())
    return (
        f'{result["clustered"]} images of {result["classes"]} classes clustered '
        f'({" + ".join(result["splits"])}); {images} images.'
    )


if __name__ == '__main__':
    command_line.run(main, Clustering)
