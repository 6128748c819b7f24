"""Linear SVM and nearest neighbour on vectors: scikit-learn's, and who chooses C."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

from timm_fisher.training import classifiers
from timm_fisher.training.classifiers import C_GRID, nearest_labels, stack, validated_svm


def blobs(count, *, seed):
    """Unit vectors around three axes, and their labels."""
    labels = np.arange(count) % 3
    noise = 0.05 * np.random.default_rng(seed).standard_normal((count, 3))
    return normalize(np.eye(3)[labels] + noise), labels


def test_test_labels_do_not_choose_C():
    parts = {name: blobs(30, seed=i) for i, name in enumerate(('train', 'val', 'test'))}
    z, labels = ({name: part[i] for name, part in parts.items()} for i in (0, 1))
    assert validated_svm(z, labels) == (1.0, C_GRID[0])  # the first of equals
    wrong = {**labels, 'test': (labels['test'] + 1) % 3}
    assert validated_svm(z, wrong) == (0.0, C_GRID[0])


@pytest.mark.parametrize('form', [np.asarray, sparse.csr_matrix])
def test_nearest_is_scikit_learns(monkeypatch, form):
    monkeypatch.setattr(classifiers, 'CHUNK', 7)
    random = np.random.default_rng(0)
    train, queries = (
        normalize(random.standard_normal((n, 6)).astype(np.float32)) for n in (50, 20)
    )
    labels = np.arange(50) % 4
    x, q = (normalize(part - train.mean(0)) for part in (train, queries))
    expected = KNeighborsClassifier(1).fit(x, labels).predict(q)
    assert (nearest_labels(form(train), labels, form(queries)) == expected).all()


@pytest.mark.parametrize('form', [np.asarray, sparse.csr_matrix])
def test_stacked_rows(form):
    first, second = form([[1.0, 0.0]]), form([[0.0, 2.0], [3.0, 0.0]])
    stacked = stack(first, second)
    assert sparse.issparse(stacked) == sparse.issparse(first)
    assert classifiers.dense(stacked).tolist() == [[1, 0], [0, 2], [3, 0]]
