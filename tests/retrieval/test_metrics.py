"""Measures of retrieval against slow ones, and those of pytorch-metric-learning."""

from __future__ import annotations

import pytest
import torch

from timm_fisher.retrieval import evaluate_retrieval, search

KS = (1, 3, 50)


def slow(queries, labels, gallery=None, gallery_labels=None):
    """One query after the other, by definition."""
    alone = gallery is None
    gallery, gallery_labels = (queries, labels) if alone else (gallery, gallery_labels)
    rows = []
    for i, (query, label) in enumerate(zip(queries, labels, strict=True)):
        order = sorted(
            (j for j in range(len(gallery)) if not (alone and j == i)),
            key=lambda j: (-float(query.double() @ gallery[j].double()), j),
        )
        right = [bool(gallery_labels[j] == label) for j in order]
        number = sum(right)
        if not number:
            continue
        precision = [sum(right[: r + 1]) / (r + 1) for r in range(len(right))]
        rows.append(
            {
                **{f'recall_at_{k}': float(any(right[:k])) for k in KS},
                'map': sum(p for p, hit in zip(precision, right, strict=True) if hit) / number,
                'map_at_r': sum(precision[r] for r in range(number) if right[r]) / number,
            }
        )
    means = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    return {**means, 'queries': len(rows), 'queries_without_match': len(queries) - len(rows)}


def data(n, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    if ties:  # exact in binary, of unit length, few different ones
        x = torch.randint(2, (n, 4), generator=generator) - 0.5
    else:
        x = torch.nn.functional.normalize(torch.randn(n, 6, generator=generator), dim=1)
    return x.double(), torch.randint(9, (n,), generator=generator)


@pytest.mark.parametrize('held', [1, 200, search.HELD])
@pytest.mark.parametrize('ties', [False, True])
def test_against_the_definition(ties, held, monkeypatch):
    """Leave-one-out and with a gallery, with ties, with classes that only queries have."""
    monkeypatch.setattr(search, 'HELD', held)
    x, y = data(40, 0, ties)
    y[5] = 77
    gallery, gallery_labels = data(30, 1, ties)
    gallery_labels[gallery_labels == 2] = 3
    for given in ((x, y), (x, y, gallery, gallery_labels)):
        expected = slow(*given)
        assert expected['queries_without_match'] > 0
        assert evaluate_retrieval(*given, ks=KS) == pytest.approx(expected, abs=1e-9)


def test_known_values():
    """By hand: the match of the only query with one is second of two."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    found = evaluate_retrieval(x[:1], torch.tensor([0]), x[1:], torch.tensor([0, 1]), ks=(1, 2))
    assert found == {
        'recall_at_1': 0.0, 'recall_at_2': 1.0, 'map': 0.5, 'map_at_r': 0.0,
        'queries': 1, 'queries_without_match': 0,
    }  # fmt: skip


def test_against_pytorch_metric_learning():
    accuracy = pytest.importorskip('pytorch_metric_learning.utils.accuracy_calculator')
    x, y = data(60, 2, ties=False)
    found = evaluate_retrieval(x, y, ks=(1,))
    names = {
        'precision_at_1': 'recall_at_1', 'mean_average_precision_at_r': 'map_at_r',
        'mean_average_precision': 'map',
    }  # fmt: skip
    oracle = accuracy.AccuracyCalculator(include=tuple(names), k=len(x) - 1).get_accuracy(x, y)
    for theirs, ours in names.items():
        assert found[ours] == pytest.approx(oracle[theirs], abs=1e-6)


def test_mistakes():
    x, y = data(5, 0, ties=False)
    with pytest.raises(ValueError, match='None of the 5 queries has another image'):
        evaluate_retrieval(x, torch.arange(5))
    with pytest.raises(ValueError, match='5 queries have 4 labels'):
        evaluate_retrieval(x, y[:4])
    with pytest.raises(ValueError, match='belong together'):
        evaluate_retrieval(x, y, x)
    with pytest.raises(ValueError, match=r'ks is \[0\]'):
        evaluate_retrieval(x, y, ks=(0,))
