"""Clusters of vectors, and how well they agree with classes (Gui et al., "Factorized Convolutional
Networks", WACV 2018, section 4)."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

STARTS = 10  # of k-means, also within spectral clustering (section 4.3)


def matched_accuracy(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Share of images whose cluster is matched with their class, by the best one-to-one matching
    of any number of clusters `[n]` and classes `[n]` (eq. 7)."""
    counts = contingency_matrix(labels, clusters)
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / len(labels))


def normalized_information(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Mutual information of classes `[n]` and clusters `[n]` by the larger of the two entropies
    (NMI, eq. 8)."""
    return float(normalized_mutual_info_score(labels, clusters, average_method='max'))


def evaluate_clusters(
    points: np.ndarray, labels: np.ndarray, classes: int, *, neighbours: int = 10, seed: int = 0
) -> dict[str, float]:
    """Cluster points by k-means and by spectral clustering.

    Args:
        points: `[n, D]`.
        labels: classes `[n]`, which the clusters are measured by.
        classes: how many clusters.
        neighbours: of each point in the graph of spectral clustering; at most n are taken.
        seed: of both.

    Returns:
        'kmeans_accuracy', 'kmeans_nmi', 'spectral_accuracy' and 'spectral_nmi'.
    """
    options = {'n_init': STARTS, 'random_state': seed}
    graph = {'affinity': 'nearest_neighbors', 'n_neighbors': min(neighbours, len(points))}
    methods = {
        'kmeans': KMeans(classes, **options),
        'spectral': SpectralClustering(classes, **graph, **options),
    }
    metrics = {}
    for name, method in methods.items():
        clusters = method.fit_predict(points)
        metrics[f'{name}_accuracy'] = matched_accuracy(labels, clusters)
        metrics[f'{name}_nmi'] = normalized_information(labels, clusters)
    return metrics
