"""Time and memory of heads' fits, against the usual way to the same result.

    python recipes/benchmarks/fits.py nmf --data features.npz --threads 2
    python recipes/benchmarks/fits.py fisher_information --data usps.npz --threads 2
    python recipes/benchmarks/fits.py fisher_information --data usps.npz --threads 2 --full true

Parts, one at a time, because each takes minutes:
- nmf: the fit of gsnmf against scikit-learn's NMF, in seconds to the objective at which that ends;
- fisher_information: the fit of dbm_idfk, hidden layers of 40 and 80 units, with its peak memory;
  and the leading axes of its Fisher information F, which it takes without forming F, against
  forming F and decomposing it. That is measured at smaller sizes and extrapolated by its growth
  between the two largest of them; --full measures it at the full size too.

Everything is timed once. Peak memory is that of the whole process as the system counts it
(ru_maxrss), with Python, PyTorch, timm and scikit-learn.

Prints Markdown tables; leaves them in OUTPUT/benchmark_fits.md and the numbers in
OUTPUT/benchmark_fits.json.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
import torch.nn.functional as F
from sklearn.decomposition import NMF
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.utils.data import DataLoader

from timm_fisher import ListStream
from timm_fisher.files import write
from timm_fisher.heads.dbm_idfk import DBMFisher
from timm_fisher.heads.gsnmf import factorize
from timm_fisher.numerics.clustering import leading_axes
from timm_fisher.training.command_line import run
from timm_fisher.training.config import Config, Stage
from timm_fisher.training.data import load_splits
from timm_fisher.training.measure import environment, load, synchronize
from timm_fisher.training.tables import table, three_digits

FACTORIZE = dict(images=10_000, channels=1280, components=256, rounds=300)
IMAGES = dict(images=7291, pixels=256)  # as USPS has
HIDDEN = ((5, 10), (10, 20), (20, 40), (40, 80))  # the last one is the paper's
RANK = 512
THRESHOLD = 0.25  # of a pixel that is on
CHUNK = 1024  # images
COMPARED = 50  # eigenvalues
Row = dict[str, Any]


# Options that one part alone has.
OPTIONS = {'nmf': ('device', 'backbone'), 'fisher_information': ('epochs', 'full')}


@dataclass
class Settings:
    """Time and memory of heads' fits, against the usual way to the same result.

    Args:
        part: what is measured.
        data: for nmf an .npz with features x [n, C], none negative, or a folder of images, which go
            through the pretrained backbone; null for random ones of low rank, and noise. For
            fisher_information an .npz of images, x_train or x, as train.py reads it, where a pixel
            is on above a quarter; null for random binary images of low rank, and noise.
        output: folder of results; null for runs/benchmark_fits/PART.
        threads: of PyTorch on the CPU; null for as many as it chooses.
        device: of nmf: cpu, cuda, cuda:1, ...; scikit-learn has the CPU.
        backbone: of nmf: any timm architecture.
        epochs: of fisher_information: of training each layer, and all.
        full: of fisher_information: form and decompose F at the full size too.
    """

    part: Literal['nmf', 'fisher_information']
    data: Path | None = None
    output: Path | None = None
    threads: int | None = None
    device: str = 'cpu'
    backbone: str = 'resnet50'
    epochs: int = 30
    full: bool = False

    def __post_init__(self) -> None:
        for part, names in OPTIONS.items():
            for name in names:
                if part != self.part and getattr(self, name) != getattr(Settings, name):
                    raise ValueError(f'--{name} is an option of {part} alone.')
        for name in ('threads', 'epochs'):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f'--{name} is {value}; give 1 or more.')
        try:
            torch.empty(1, device=self.device)
        except Exception as error:  # a device that is not there
            raise ValueError(str(error)) from error


def main(settings: Settings) -> None:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    about = {**environment(settings.device), 'data': settings.data or 'random'}
    head = '\n'.join(f'- {key}: {value}' for key, value in about.items())
    print(head, flush=True)
    text, rows = PARTS[settings.part](settings)
    print(f'\n{text}')
    about['load after'] = load()
    record = {'environment': about, 'options': asdict(settings), 'results': rows}
    output = settings.output or Path('runs/benchmark_fits', settings.part)
    output.mkdir(parents=True, exist_ok=True)
    write(output / 'benchmark_fits.md', f'{head}\n\n{text}\n')
    write(output / 'benchmark_fits.json', json.dumps(record, indent=1, default=str) + '\n')
    print(f'\nAll of it is in {output}.')


# The parts: each gives its Markdown text and its rows


def measure_nmf(settings: Settings) -> tuple[str, list[Row]]:
    """Both in float32, without penalties, from NNDSVD, which is part of the time."""
    x = F.normalize(nmf_features(settings), dim=1)
    components, rounds = FACTORIZE['components'], FACTORIZE['rounds']

    def objective(w: Tensor, h: Tensor) -> float:
        return 0.5 * (x.double() - h.double().T @ w.double().T).square().sum().item()

    def fit(rounds: int) -> tuple[float, tuple[Tensor, Tensor, list[float]]]:
        rows = x.to(settings.device)
        synchronize(settings.device)
        start = time.perf_counter()
        factors = factorize(rows, components, rounds=rounds, tolerance=0)
        synchronize(settings.device)
        return time.perf_counter() - start, factors

    history = fit(rounds)[1][2]
    rows: list[Row] = []
    for solver in ('mu', 'cd'):
        model = NMF(components, init='nndsvd', solver=solver, max_iter=200, random_state=0)
        start = time.perf_counter()
        with warnings.catch_warnings(), threadpool_limits(torch.get_num_threads()):
            warnings.simplefilter('ignore')  # that it has not converged after 200 iterations
            codes = model.fit_transform(x.numpy())
        theirs = time.perf_counter() - start
        target = objective(torch.from_numpy(model.components_).T, torch.from_numpy(codes).T)
        # All rounds where the objective is not reached: the table then shows a higher one.
        needed = next((k for k, value in enumerate(history, 1) if value <= target), rounds)
        ours, (w, h, _) = fit(needed)
        rows.append({
            'solver': solver, 'iterations': model.n_iter_, 'seconds': theirs, 'objective': target,
            'gsnmf rounds': needed, 'gsnmf seconds': ours,
            'gsnmf objective': objective(w.cpu(), h.cpu()), 'times faster': theirs / ours,
        })  # fmt: skip
    lines = [[v if isinstance(v, str) else three_digits(v) for v in row.values()] for row in rows]
    title = (
        f"### gsnmf's fit to the objective of scikit-learn's NMF: {len(x)} x {x.shape[1]}, "
        f'{components} components, float32, {torch.get_num_threads()} threads\n\n'
    )
    note = (
        f'The objective is 1/2 |X - W H|^2, of rows of unit length. After {len(history)} rounds '
        f'gsnmf has {three_digits(history[-1])}.'
    )
    return title + table(list(rows[0]), lines) + f'\n\n{note}', rows


def nmf_features(settings: Settings) -> Tensor:
    """Features `[n, C]` of `data`, float32; or random sparse parts in random sparse mixtures."""
    if settings.data is None:
        n, c, components, _ = FACTORIZE.values()
        codes, parts = torch.rand(n, components), torch.rand(components, c)
        codes, parts = (
            codes * (torch.rand_like(codes) < 0.1),
            parts * (torch.rand_like(parts) < 0.2),
        )
        x = codes @ parts
        return (x + 0.3 * x.mean() * torch.randn_like(x)).relu()
    if settings.data.suffix == '.npz':
        with np.load(settings.data) as arrays:
            return torch.from_numpy(arrays['x']).float()
    model = (
        timm.create_model(settings.backbone, pretrained=True, num_classes=0)
        .eval()
        .to(settings.device)
    )
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    images = timm.data.create_dataset('', root=str(settings.data), transform=transform)
    with torch.no_grad():
        batches = [model(x.to(settings.device)).relu().cpu() for x, _ in DataLoader(images, 64)]
    return torch.cat(batches)


def measure_fisher_information(
    settings: Settings, hidden: Sequence[tuple[int, int]] = HIDDEN, rank: int = RANK
) -> tuple[str, list[Row]]:
    """Sizes `hidden` of the layers: the last is the full one, the others are smaller."""
    *smaller, full = hidden
    x = binary_images(settings.data)
    before = peak_resident()
    head = DBMFisher(x.shape[1], hidden=full, rank=rank, squash=False, epochs=settings.epochs)
    start = time.perf_counter()
    head.fit(ListStream([x]))
    seconds = time.perf_counter() - start
    fitted: Row = {
        'what': 'fit', 'hidden': full, 'd': head.score_features, 'r': head.out_features,
        'seconds': seconds, 'peak GB': peak_resident() / 1e9, 'GB before': before / 1e9,
    }  # fmt: skip

    rows = []
    for sizes in smaller:
        small = DBMFisher(x.shape[1], hidden=sizes, whiten=False, squash=False, epochs=1)
        small.fit(ListStream([x]))
        rows.append(against_forming(small, x, rank, forming=True))
    rows.append(against_forming(head, x, rank, forming=settings.full))
    fitted['leading_axes s'] = rows[-1]['leading_axes s']
    estimate: Row = {
        'what': 'extrapolation', 'd': head.score_features, 'growth': {},
        'leading_axes s': rows[-1]['leading_axes s'],
    }  # fmt: skip
    for key in ('product s', 'decomposition s'):
        points = [(row['d'], row[key]) for row in rows[: len(smaller)]]
        estimate['growth'][key], estimate[key] = extrapolate(points, head.score_features)

    formed = [row for row in rows if 'product s' in row]
    for row in (*formed, estimate):
        row['both s'] = row['product s'] + row['decomposition s']
        row['times faster'] = row['both s'] / row['leading_axes s']

    def line(row: Row, name: str) -> list[str]:
        keys = ('product s', 'decomposition s', 'both s', 'leading_axes s', 'times faster')
        difference = f'{row["difference"]:.0e}' if 'difference' in row else ''
        return [name, *(three_digits(row[key]) for key in keys), difference]

    growth = estimate['growth']
    small, large = (row['d'] for row in rows[: len(smaller)][-2:])
    values = [fitted[key] for key in ('seconds', 'leading_axes s', 'peak GB')]
    first = table(
        ['hidden layers', 'd', 'r', 'whole fit, s', 'leading axes alone, s', 'peak, GB'],
        [
            [
                ' x '.join(map(str, full)),
                str(fitted['d']),
                str(fitted['r']),
                *map(three_digits, values),
            ]
        ],
    )
    header = ['d', 'product, s', 'decomposition, s', 'both, s', 'leading axes, s', 'times faster']
    second = table(
        [*header, f'largest difference of {min(COMPARED, rank)} eigenvalues'],
        [
            *(line(row, str(row['d'])) for row in formed),
            line(estimate, f'{estimate["d"]}, extrapolated'),
        ],
    )
    text = (
        f"### dbm_idfk's fit: {len(x)} images of {x.shape[1]} pixels, {settings.epochs} epochs, "
        f'float32, {torch.get_num_threads()} threads\n\n{first}\n\n'
        'The peak is the resident memory of the whole process, in 10^9 bytes, with Python, PyTorch '
        f'and other libraries; before the fit, images loaded, it was '
        f'{three_digits(before / 1e9)}.\n\n'
        f'### {rank} leading axes, against forming F (d x d) and decomposing it, float32\n\n'
        f'{second}\n\n'
        'The product makes F in one pass over the scores, which are computed anew in each pass; '
        f'the leading axes take four. Between d = {small} and {large} the product grows as '
        f'd^{growth["product s"]:.2f} and the decomposition as '
        f'd^{growth["decomposition s"]:.2f}. The last line continues this to d = {estimate["d"]}: '
        'there only the leading axes are measured. Differences are relative.'
    )
    return text, [fitted, *rows, estimate]


def binary_images(path: Path | None) -> Tensor:
    """Images as rows of zeros and ones `[n, H * W]`, float32: all training images of an .npz, or
    random ones."""
    if path is None:
        return random_images(**IMAGES)
    reads_no_labels = {'': Stage(unsupervised=True)}
    splits, _ = load_splits(
        Config(dataset='npz', data_dir=str(path), test_split=None, stages=reads_no_labels)
    )
    # The whole array: what the split 'val' holds is among it.
    pixels = torch.from_numpy(splits['train'].dataset.pixels).flatten(1)
    return (pixels > 255 * THRESHOLD).float()


def random_images(images: int, pixels: int, rank: int = 10) -> Tensor:
    """Random binary images `[images, pixels]`: mixtures of a few patterns, and noise."""
    x: Tensor = torch.randn(images, rank) @ torch.randn(rank, pixels) / rank**0.5
    return (x + 0.3 * torch.randn_like(x) > 0.7).float()


def against_forming(head: DBMFisher, x: Tensor, rank: int, *, forming: bool) -> Row:
    """Seconds of the leading axes, and of forming F and decomposing it, for rows `[n, C]`."""

    def chunks() -> Iterable[Tensor]:
        return (head.normalized_score(rows[:, None]) for rows in x.split(CHUNK))

    row: Row = {'what': 'axes', 'hidden': head.hidden, 'd': head.score_features}
    with torch.no_grad():
        start = time.perf_counter()
        _, variances = leading_axes(chunks, min(rank, head.score_features))
        row['leading_axes s'] = time.perf_counter() - start
        if forming:
            start = time.perf_counter()
            covariance = form(chunks())
            row['product s'] = time.perf_counter() - start
            start = time.perf_counter()
            eigenvalues = torch.linalg.eigh(covariance).eigenvalues
            row['decomposition s'] = time.perf_counter() - start
            ours = variances[:COMPARED]
            theirs = eigenvalues.flip(0)[: len(ours)].double()
            row['difference'] = ((ours - theirs).abs() / theirs).max().item()
    return row


def form(chunks: Iterable[Tensor]) -> Tensor:
    """Covariance `[d, d]` of rows that come in chunks, by products in their own precision."""
    total, count, shift = torch.zeros(()), 0, torch.zeros(())
    covariance = torch.zeros(())
    for rows in chunks:
        if not count:  # rows about this mean: they are short, so that the end loses no digits
            shift = rows.mean(0)
            total, covariance = torch.zeros_like(shift), rows.new_zeros(2 * [rows.shape[1]])
        rows = rows - shift
        covariance.addmm_(rows.T, rows)
        total += rows.sum(0)
        count += len(rows)
    return covariance.addr_(total, total, alpha=-1 / count).div_(count)


def extrapolate(points: Sequence[tuple[int, float]], size: int) -> tuple[float, float]:
    """Exponent of a power law through the last two (size, seconds), and its seconds at `size`."""
    (small, before), (large, after) = points[-2:]
    exponent = math.log(after / before) / math.log(large / small)
    return exponent, after * (size / large) ** exponent


def peak_resident() -> int:
    """Most bytes of memory that this process has held at a time so far."""
    unit = 1 if sys.platform == 'darwin' else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


PARTS: dict[str, Callable[[Settings], tuple[str, list[Row]]]] = {
    'nmf': measure_nmf,
    'fisher_information': measure_fisher_information,
}


if __name__ == '__main__':
    run(main, Settings, positional='part')
