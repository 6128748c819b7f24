"""Clusters and how they agree with classes, against slow and obvious computations."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from timm_fisher.training.clusters import (
    evaluate_clusters,
    matched_accuracy,
    normalized_information,
)


def random_clusters(classes, clusters):
    random = np.random.default_rng(classes + 10 * clusters)
    labels = random.integers(classes, size=60)
    noisy = (labels + random.integers(2, size=60)) % clusters
    return labels, noisy + 7  # the clusters' numbers mean nothing


@pytest.mark.parametrize(('classes', 'clusters'), [(4, 4), (3, 5), (5, 3)])
def test_accuracy_by_the_best_matching(classes, clusters):
    """Of all one-to-one matchings, tried one by one."""
    labels, assigned = random_clusters(classes, clusters)
    numbers = [*range(7, 7 + clusters), *[None] * classes]  # a class may go without a cluster
    best = max(
        sum(matching[y] == c for y, c in zip(labels, assigned, strict=True))
        for matching in set(itertools.permutations(numbers, classes))
    )
    assert matched_accuracy(labels, assigned) == best / 60
    assert matched_accuracy(labels, (labels + 1) % classes) == 1


def test_information_by_the_larger_entropy():
    labels, assigned = random_clusters(5, 3)

    def entropy(values):
        return -sum(n / 60 * math.log(n / 60) for n in Counter(values).values())

    pairs = list(zip(labels, assigned, strict=True))
    information = entropy(labels) + entropy(assigned) - entropy(pairs)
    assert entropy(labels) > 1.1 * entropy(assigned)
    expected = information / max(entropy(labels), entropy(assigned))
    assert normalized_information(labels, assigned) == pytest.approx(expected)


def test_clusters_that_are_plain():
    random = np.random.default_rng(0)
    labels = np.arange(60) % 3
    points = np.eye(3)[labels] + 0.05 * random.standard_normal((60, 3))
    metrics = evaluate_clusters(points, labels, 3, neighbours=25)
    assert metrics == pytest.approx(
        dict.fromkeys(['kmeans_accuracy', 'kmeans_nmi', 'spectral_accuracy', 'spectral_nmi'], 1.0)
    )
