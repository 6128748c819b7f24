"""Metrics of retrieval: against a slow reference, and two libraries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

from timm_fisher.retrieval import metrics
from timm_fisher.retrieval.metrics import evaluate_retrieval


def reference(queries, labels, gallery, gallery_labels, ks):
    """One query after the other, in Python's numbers; gallery None leaves one out."""
    own = gallery is None
    gallery, gallery_labels = (queries, labels) if own else (gallery, gallery_labels)
    sums, counted, without = dict.fromkeys([*ks, 'map', 'map_at_r'], 0.0), 0, 0
    for i, (query, label) in enumerate(zip(queries.tolist(), labels, strict=True)):
        ranking = []
        for j, row in enumerate(gallery.tolist()):
            if own and i == j:
                continue
            whole = sum(
                round(a * 2**25) * round(b * 2**25) for a, b in zip(query, row, strict=True)
            )
            ranking.append((-whole, j))
        right = [gallery_labels[j] == label for _, j in sorted(ranking)]
        matches = sum(right)
        if not matches:
            without += 1
            continue
        counted += 1
        for k in ks:
            sums[k] += any(right[:k])
        seen = 0
        for rank, is_right in enumerate(right, 1):
            if is_right:
                seen += 1
                sums['map'] += seen / rank / matches
                sums['map_at_r'] += (rank <= matches) * seen / rank / matches
    means = {f'recall_at_{k}' if k in ks else k: value / counted for k, value in sums.items()}
    return {**means, 'queries': counted, 'queries_without_match': without}


def with_ties(n, seed):
    """Vectors with four coordinates of 1/2 or -1/2: few different similarities; and copies of
    others. Labels, one of which nobody shares."""
    torch.manual_seed(seed)
    x = torch.zeros(n, 8)
    for row in x:
        row[torch.randperm(8)[:4]] = torch.randint(2, (4,)) - 0.5
    x[: n // 4] = F.normalize(torch.randn(n // 4, 8), dim=1)
    x[n // 8 : n // 4] = x[: n // 4 - n // 8].clone()
    return x, [*torch.randint(5, (n - 1,)).tolist(), 99]


@pytest.mark.parametrize('two_sets', [False, True])
@pytest.mark.parametrize('block', [2**24, 400])
def test_metrics(two_sets, block, monkeypatch):
    monkeypatch.setattr(metrics, 'BLOCK', block)
    queries, labels = with_ties(60, seed=0)
    gallery, gallery_labels = with_ties(41, seed=1) if two_sets else (None, None)
    if two_sets:
        gallery_labels[-1] = 3  # nobody has 99
    ks = (1, 2, 5, 10, 1000)
    result = evaluate_retrieval(queries, labels, gallery, gallery_labels, ks=ks)
    expected = reference(queries, labels, gallery, gallery_labels, ks)
    assert result == pytest.approx(expected, abs=1e-9, rel=0)
    assert result['queries_without_match'] == 1
    assert result['recall_at_1000'] == 1
    assert 0.05 < result['map_at_r'] < result['map'] < 0.9


def test_order_of_ties():
    """The first of two that are equally near comes first."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    query = torch.tensor([[1.0, 0.0]])
    for place, expected in ((1, 1 / 2), (2, 1 / 3)):
        labels = ['a' if i == place else 'b' for i in range(3)]
        assert evaluate_retrieval(query, ['a'], x, labels)['map'] == pytest.approx(expected)


def test_texts_and_tensors_as_labels():
    queries, labels = with_ties(30, seed=2)
    expected = evaluate_retrieval(queries, labels)
    assert evaluate_retrieval(queries, torch.tensor(labels)) == expected
    assert evaluate_retrieval(queries, [f'class {label}' for label in labels]) == expected


def test_average_precision_is_that_of_scikit_learn():
    torch.manual_seed(0)
    x, y = F.normalize(torch.randn(50, 16), dim=1), torch.randint(4, (50,))
    expected = []
    for i in range(50):
        others = torch.arange(50) != i
        expected.append(average_precision_score(y[others] == y[i], x[others] @ x[i]))
    result = evaluate_retrieval(x, y)
    assert result['map'] == pytest.approx(sum(expected) / 50, abs=1e-9)


def test_metrics_are_those_of_pytorch_metric_learning():
    """On its own ranking, in float32: vectors without ties."""
    calculator = pytest.importorskip('pytorch_metric_learning.utils.accuracy_calculator')
    pytest.importorskip('faiss')
    torch.manual_seed(0)
    x, y = F.normalize(torch.randn(80, 16), dim=1), torch.randint(6, (80,))
    y[-1] = 99
    names = ('precision_at_1', 'mean_average_precision', 'mean_average_precision_at_r')
    theirs = calculator.AccuracyCalculator(include=names, k=79, device=torch.device('cpu'))
    for gallery, of_gallery in ((None, None), (x[40:], y[40:])):
        queries, labels = (x, y) if gallery is None else (x[:40], y[:40])
        expected = theirs.get_accuracy(queries, labels, gallery, of_gallery)
        result = evaluate_retrieval(queries, labels, gallery, of_gallery)
        ours = [result[name] for name in ('recall_at_1', 'map', 'map_at_r')]
        assert ours == pytest.approx([expected[name] for name in names], abs=1e-9)


def test_mistakes():
    x, y = with_ties(8, seed=0)
    for arguments, message in (
        ((x, range(8)), 'No query has an image of the same label'),
        ((x, y[1:]), '7 labels of the queries do not fit 8 vectors'),
        ((x, y, x), 'Give gallery and gallery_labels'),
        ((x, y, x, y[1:]), '7 labels of the gallery do not fit 8'),
        ((x, y, x[:, :4] * 0 + 0.5, y), 'queries have 8 dimensions, the gallery 4'),
        ((2 * x, y), 'length of vector 0 is 2'),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_retrieval(*arguments)
    with pytest.raises(ValueError, match=r'ks is \(1, 0\)'):
        evaluate_retrieval(x, y, ks=(1, 0))


def test_labels_may_be_an_array():
    x = torch.eye(4)[[0, 0, 1, 1]]
    labels = [3, 3, 5, 5]
    expected = evaluate_retrieval(x, labels)
    assert expected['map'] == 1
    for given in (np.array(labels), torch.tensor(labels), np.array(['a', 'a', 'b', 'b'])):
        assert evaluate_retrieval(x, given) == expected
