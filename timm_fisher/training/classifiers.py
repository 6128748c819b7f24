"""Linear SVM and nearest neighbour on vectors that are computed already, dense or sparse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.preprocessing import normalize
from sklearn.svm import LinearSVC
from torch import Tensor

C_GRID = (0.1, 1.0, 10.0, 100.0)
CHUNK = 1024  # training vectors that are dense at a time


def validated_svm(
    vectors: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray], *, seed: int = 0
) -> tuple[float, float]:
    """Test accuracy of a linear SVM on the training split, and its C: of the best accuracy on the
    validation split, the first of equals.

    Args:
        vectors: `[n, D]` of 'train', 'val' and 'test'.
        labels: `[n]` of each.
        seed: of the solver.
    """
    svms = [
        LinearSVC(C=c, random_state=seed, max_iter=10_000).fit(vectors['train'], labels['train'])
        for c in C_GRID
    ]
    best = int(np.argmax([svm.score(vectors['val'], labels['val']) for svm in svms]))
    return float(svms[best].score(vectors['test'], labels['test'])), C_GRID[best]


def nearest_labels(train: Any, labels: np.ndarray, queries: Any) -> np.ndarray:
    """Labels `[m]` of the nearest training vectors, once all vectors have the mean of the training
    vectors taken off, and unit length: for `[n, D]`, `[n]` and `[m, D]`, arrays or sparse."""
    mean = np.asarray(train.mean(0), np.float32).reshape(1, -1)

    def prepared(part: Any) -> Tensor:
        return torch.from_numpy(normalize(dense(part) - mean))

    asked = prepared(queries)
    parts = [
        (asked @ prepared(train[start : start + CHUNK]).T).max(1)
        for start in range(0, train.shape[0], CHUNK)
    ]
    part = torch.stack([similarity for similarity, _ in parts]).argmax(0)
    index = torch.stack([index for _, index in parts]).gather(0, part[None])[0]
    nearest: np.ndarray = labels[(CHUNK * part + index).numpy()]
    return nearest


def dense(vectors: Any) -> np.ndarray:
    """An array or a sparse matrix as a float32 array."""
    return np.asarray(vectors.todense() if sparse.issparse(vectors) else vectors, np.float32)


def stack(*parts: Any) -> Any:
    """The rows of several arrays, or of several sparse matrices as CSR."""
    if sparse.issparse(parts[0]):
        return sparse.vstack(parts, format='csr')
    return np.concatenate(parts)
