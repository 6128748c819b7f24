"""Pictures of vectors in the plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from timm_fisher.files import save_png
from timm_fisher.training.classifiers import dense

SHOWN = 2000  # vectors of each panel, at most


def plot_tsne(
    panels: Mapping[str, Any], labels: np.ndarray, classes: Sequence[str], path: Path
) -> None:
    """t-SNE of several representations of the same images, side by side, coloured by class.

    Args:
        panels: by title, vectors `[n, D]`, an array or a sparse matrix; at most 2000 of them,
            chosen at random, are shown.
        labels: `[n]`.
        classes: their names; more than 40 get no legend.
        path: of the PNG.
    """
    shown = np.random.default_rng(0).permutation(len(labels))[:SHOWN]
    figure = Figure(figsize=(6 * len(panels), 6), layout='tight')
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, vectors) in zip(axes, panels.items(), strict=True):
        perplexity = min(30.0, (len(shown) - 1) / 3)
        plane = TSNE(perplexity=perplexity, random_state=0).fit_transform(dense(vectors[shown]))
        for index, name in enumerate(classes):
            color = matplotlib.colormaps['turbo'](index / max(1, len(classes) - 1))
            ax.scatter(*plane[labels[shown] == index].T, s=6, color=color, label=name)
        ax.set(title=title, xticks=[], yticks=[])
    if len(classes) <= 40:
        columns = 1 if len(classes) <= 20 else 2
        axes[-1].legend(
            markerscale=2, fontsize=7, ncols=columns, loc='center left', bbox_to_anchor=(1, 0.5)
        )
    save_png(figure, path)
