"""Time and memory of heads' fits, against the usual way to the same result.

    python recipes/benchmarks/fits.py nmf --data features.npz --threads 2
    python recipes/benchmarks/fits.py fisher_information --data usps.npz --threads 2
    python recipes/benchmarks/fits.py fisher_information --data usps.npz --threads 2 --full true

Parts, one at a time, because each takes minutes:
- nmf: the fit of gsnmf against scikit-learn's NMF, in seconds to the objective at which that ends.
  The features may be those of a backbone, averaged over each of some thousand images:
  `np.savez('features.npz', x=backbone.forward_features(images).relu().mean((2, 3)).numpy())`;
- fisher_information: the fit of dbm_idfk, hidden layers of 40 and 80 units, with its peak memory;
  and the leading axes of its Fisher information F, which it takes without forming F, against
  forming F and decomposing it, for smaller layers; --full does so for the full ones too.

Everything is timed once. Peak memory is that of the whole process as the system counts it
(ru_maxrss), with all libraries. Leaves in OUTPUT benchmark_fits.md, the tables that it prints, and
benchmark_fits.json, the numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import NMF
from threadpoolctl import threadpool_limits
from torch import Tensor

from timm_fisher import ListStream
from timm_fisher.heads.dbm_idfk import DBMFisher
from timm_fisher.heads.gsnmf import factorize
from timm_fisher.numerics.clustering import leading_axes
from timm_fisher.training.benchmark import Row, Sections, peak_resident, report, timed
from timm_fisher.training.command_line import run
from timm_fisher.training.config import Config, Stage
from timm_fisher.training.data import load_splits
from timm_fisher.training.tables import records, three_digits

FACTORIZE = dict(images=10_000, channels=1280, components=256, rounds=300)
IMAGES = dict(images=7291, pixels=256)  # as USPS has
HIDDEN = ((5, 10), (10, 20), (20, 40), (40, 80))  # the last one is the paper's
RANK = 512
THRESHOLD = 0.25  # of a pixel that is on
CHUNK = 1024  # images
COMPARED = 50  # eigenvalues


@dataclass
class Settings:
    """Time and memory of heads' fits, against the usual way to the same result.

    Args:
        part: what is measured.
        data: for nmf an .npz with features x [n, C], none negative; for fisher_information one of
            images, x_train or x, as train.py reads it, where a pixel is on above a quarter; null
            for random ones of low rank, and noise.
        output: folder of results; null for runs/benchmark_fits/PART.
        threads: of PyTorch on the CPU; null for as many as it chooses.
        device: of nmf: cpu, cuda, cuda:1, ...; scikit-learn has the CPU.
        epochs: of fisher_information: of training each layer, and all.
        full: of fisher_information: form and decompose F of the full layers too.
    """

    part: Literal['nmf', 'fisher_information']
    data: Path | None = None
    output: Path | None = None
    threads: int | None = None
    device: str = 'cpu'
    epochs: int = 30
    full: bool = False

    def __post_init__(self) -> None:
        for name in ('threads', 'epochs'):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f'--{name} is {value}; give 1 or more.')


def main(settings: Settings) -> None:
    folder = settings.output or Path('runs/benchmark_fits', settings.part)
    parts = {settings.part: partial(PARTS[settings.part], settings)}
    report(
        parts,
        folder / 'benchmark_fits',
        asdict(settings),
        data=settings.data.name if settings.data else 'random',
    )


# The parts


def measure_nmf(settings: Settings) -> Sections:
    """Both in float32, without penalties, from NNDSVD, which is part of the time."""
    x = F.normalize(nmf_features(settings.data), dim=1)
    components, rounds = FACTORIZE['components'], FACTORIZE['rounds']

    def objective(w: Tensor, h: Tensor) -> float:
        return 0.5 * (x.double() - h.double().T @ w.double().T).square().sum().item()

    def fit(rounds: int) -> tuple[Tensor, Tensor, list[float]]:
        return factorize(x.to(settings.device), components, rounds=rounds, tolerance=0)

    *_, history = fit(rounds)
    rows: list[Row] = []
    for solver in ('mu', 'cd'):
        model = NMF(components, init='nndsvd', solver=solver, max_iter=200, random_state=0)
        with warnings.catch_warnings(), threadpool_limits(torch.get_num_threads()):
            warnings.simplefilter('ignore')  # that it has not converged after 200 iterations
            theirs, codes = timed(partial(model.fit_transform, x.numpy()))
        target = objective(torch.from_numpy(model.components_).T, torch.from_numpy(codes).T)
        # All rounds where the objective is not reached: the table then shows a higher one.
        needed = next((k for k, value in enumerate(history, 1) if value <= target), rounds)
        ours, (w, h, _) = timed(partial(fit, needed), settings.device)
        rows.append({
            'solver': solver, 'iterations': model.n_iter_, 'seconds': theirs, 'objective': target,
            'gsnmf rounds': needed, 'gsnmf seconds': ours,
            'gsnmf objective': objective(w.cpu(), h.cpu()), 'times faster': theirs / ours,
        })  # fmt: skip
    text = (
        f'{records(rows)}\n\nThe objective is 1/2 |X - W H|^2, of rows of unit length. After '
        f'{len(history)} rounds gsnmf has {three_digits(history[-1])}.'
    )
    sizes = f'{len(x)} x {x.shape[1]}, {components} components, float32'
    yield f"gsnmf's fit to the objective of scikit-learn's NMF: {sizes}", text, rows


def nmf_features(path: Path | None) -> Tensor:
    """Features `[n, C]` of a file, float32; or random sparse parts in random sparse mixtures."""
    if path is None:
        n, c, components, _ = FACTORIZE.values()
        codes = torch.rand(n, components) * (torch.rand(n, components) < 0.1)
        x = codes @ (torch.rand(components, c) * (torch.rand(components, c) < 0.2))
        return (x + 0.3 * x.mean() * torch.randn_like(x)).relu()
    with np.load(path) as arrays:
        return torch.from_numpy(arrays['x']).float()


def measure_fisher_information(settings: Settings) -> Sections:
    x = binary_images(settings.data)
    *smaller, full = HIDDEN
    before = peak_resident()
    head = DBMFisher(x.shape[1], hidden=full, rank=RANK, squash=False, epochs=settings.epochs)
    taken, _ = timed(partial(head.fit, ListStream([x])))
    peak = peak_resident()

    rows = []
    for sizes in smaller:
        small = DBMFisher(x.shape[1], hidden=sizes, whiten=False, squash=False, epochs=1)
        small.fit(ListStream([x]))
        rows.append(against_forming(small, x))
    rows.append(against_forming(head, x, forming=settings.full))
    fitted: Row = {
        'hidden': full, 'd': head.score_features, 'r': head.out_features, 'seconds': taken,
        'peak GB': peak / 1e9, 'GB before': before / 1e9,
    }  # fmt: skip
    text = (
        f'{records([fitted], list(fitted)[1:])}\n\nMemory is that of the whole process, in 10^9 '
        'bytes: its peak, and before the fit, images loaded.'
    )
    images = f'{len(x)} images of {x.shape[1]} pixels'
    yield f"dbm_idfk's fit: {images}, {settings.epochs} epochs, float32", text, [fitted]

    text = (
        f'{records(rows, list(rows[0])[1:])}\n\nThe product makes F in one pass over the scores, '
        'which are computed anew in each pass; the leading axes take four. The difference is the '
        f'largest, relative one of {min(COMPARED, RANK)} eigenvalues.'
    )
    title = f'{RANK} leading axes, against forming F (d x d) and decomposing it, float32'
    yield title, text, rows


def binary_images(path: Path | None) -> Tensor:
    """Images as rows of zeros and ones `[n, H * W]`, float32: all training images of an .npz, or
    random mixtures of a few patterns, and noise."""
    if path is None:
        n, d = IMAGES.values()
        x: Tensor = torch.randn(n, 10) @ torch.randn(10, d) / 10**0.5
        return (x + 0.3 * torch.randn_like(x) > 0.7).float()
    reads_no_labels = {'': Stage(unsupervised=True)}
    splits, _ = load_splits(
        Config(dataset='npz', data_dir=str(path), test_split=None, stages=reads_no_labels)
    )
    # The whole array: what the split 'val' holds is among it.
    pixels = torch.from_numpy(splits['train'].dataset.pixels).flatten(1)
    return (pixels > 255 * THRESHOLD).float()


@torch.no_grad()
def against_forming(head: DBMFisher, x: Tensor, *, forming: bool = True) -> Row:
    """Seconds of the leading axes, and of forming F and decomposing it, for rows `[n, C]`."""

    def chunks() -> Iterable[Tensor]:
        return (head.normalized_score(rows[:, None]) for rows in x.split(CHUNK))

    row: Row = {'hidden': head.hidden, 'd': head.score_features}
    rank = min(RANK, head.score_features)
    row['leading_axes s'], (_, variances) = timed(partial(leading_axes, chunks, rank))
    if forming:
        row['product s'], covariance = timed(lambda: form(chunks()))
        row['decomposition s'], eigen = timed(partial(torch.linalg.eigh, covariance))
        ours = variances[:COMPARED]
        theirs = eigen.eigenvalues.flip(0)[: len(ours)].double()
        formed = row['product s'] + row['decomposition s']
        row['times faster'] = formed / row['leading_axes s']
        row['difference'] = ((ours - theirs).abs() / theirs).max().item()
    return row


def form(chunks: Iterable[Tensor]) -> Tensor:
    """Covariance `[d, d]` of rows that come in chunks, by products in their own precision."""
    count = 0
    for rows in chunks:
        if not count:  # rows about this mean: they are short, so that the end loses no digits
            shift = rows.mean(0)
            total, covariance = torch.zeros_like(shift), rows.new_zeros(2 * [len(shift)])
        rows = rows - shift
        covariance.addmm_(rows.T, rows)
        total += rows.sum(0)
        count += len(rows)
    return covariance.addr_(total, total, alpha=-1 / count).div_(count)


PARTS: dict[str, Callable[[Settings], Sections]] = {
    'nmf': measure_nmf,
    'fisher_information': measure_fisher_information,
}


if __name__ == '__main__':
    run(main, Settings, positional='part')
