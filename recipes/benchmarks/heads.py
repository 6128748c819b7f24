"""Time and memory of every installed head, against `avg`.

    python recipes/benchmarks/heads.py                       # all of it, some minutes on 2 cores
    python recipes/benchmarks/heads.py sparse_fisher 3g --parts '[descriptors]' --threads 1
    python recipes/benchmarks/heads.py --device cuda --precision amp --batch 64 --model-batch 64

Parts:
- descriptors: heads alone, on the same descriptors, for several N;
- sizes: heads alone, as d (`reduce_dim`) and K (`components`, `code_dim`, `clusters`) grow;
- model: heads inside a model with random weights, for several image sizes;
- newton_schulz: the matrix root of 3g and isqrt_cov on the N x N side against the d x d one;
- fisher: gmm_fisher against its bare matrix products, and against VLFeat where that is installed.

A forward pass is in eval mode without a graph; a step is forward and backward in train mode, to the
parameters and, for heads alone, to the descriptors. Times are medians, after a warm-up. Memory is
the peak of what PyTorch's allocator gives out meanwhile. On a busy CPU OMP_WAIT_POLICY=passive, or
--threads 1, helps. Leaves in OUTPUT benchmark.md, the tables that it prints; benchmark.json, the
numbers; and benchmark.png, the cost against N, d and K.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import inspect
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

import timm_fisher
from timm_fisher import PooledModel, PoolingHead, create_head, get_head, list_heads
from timm_fisher.files import save_png
from timm_fisher.heads.gmm_fisher import GMMFisher
from timm_fisher.heads.three_g import EPS
from timm_fisher.numerics.linalg import gram_root, matrix_root
from timm_fisher.training.benchmark import Row, Sections, median_times, peak_memory, report
from timm_fisher.training.command_line import run
from timm_fisher.training.tables import records, three_digits

# Arguments of heads, as they are named in papers; and the values that are tried
ARGUMENTS = {'d': ('reduce_dim',), 'K': ('components', 'code_dim', 'clusters')}
VALUES = {'d': (32, 64, 128, 256, 512), 'K': (8, 16, 32, 64, 128)}
CLASSES = 100
ROOT = dict(batch=64, number=49, d=256, iterations=5)  # the papers' 7 x 7 maps
FISHER = dict(batch=32, number=196, d=64, components=32)
Part = Literal['descriptors', 'sizes', 'model', 'newton_schulz', 'fisher']


@dataclass
class Settings:
    """Time and memory of every installed head, against `avg`.

    Args:
        heads: names; all that are installed if none is given.
        parts: of the benchmark.
        output: folder of results.
        device: cpu, cuda, cuda:1, ...
        precision: amp is autocast to bfloat16.
        threads: of PyTorch on the CPU; null for as many as it chooses.
        repetitions: at least this many.
        batch: images, for heads alone.
        channels: C of the descriptors.
        numbers: N of the descriptors.
        backbone: any timm architecture.
        img_sizes: sides of the images, inside a model.
        model_batch: images, inside a model.
    """

    heads: list[str] = field(default_factory=list_heads)
    parts: list[Part] = field(default_factory=lambda: list(get_args(Part)))
    output: Path = Path('runs/benchmark')
    device: str = 'cpu'
    precision: Literal['float32', 'float64', 'bfloat16', 'amp'] = 'float32'
    threads: int | None = None
    repetitions: int = 3
    batch: int = 8
    channels: int = 2048
    numbers: list[int] = field(default_factory=lambda: [49, 196, 784])
    backbone: str = 'resnet50'
    img_sizes: list[int] = field(default_factory=lambda: [224, 448])
    model_batch: int = 2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            numbers = value if isinstance(value, list) else [value]
            if any(isinstance(number, int) and number < 1 for number in numbers):
                raise ValueError(f'--{name} is {value}; give 1 or more.')
        for name in self.heads:
            get_head(name)  # refuses an unknown one before anything is measured
        self.heads = list(dict.fromkeys(['avg', *self.heads]))


def main(settings: Settings) -> None:
    parts = {name: partial(PARTS[name], settings) for name in settings.parts}
    path = settings.output / 'benchmark'
    rows = report(parts, path, asdict(settings), precision=settings.precision)
    if {'descriptors', 'sizes'} & set(settings.parts):
        plot(rows, path.with_suffix('.png'))


def costs(settings: Settings, heads: list[tuple[Row, Any]], x: Tensor) -> list[Row]:
    """Rows with the milliseconds per image and MiB per batch of each module: a forward pass, and a
    step."""
    device = torch.device(settings.device)
    amp = settings.precision == 'amp'
    dtype = torch.float32 if amp else getattr(torch, settings.precision)
    x = x.to(device, dtype)
    x.requires_grad_(x.ndim == 3)  # descriptors come from a backbone, images from nowhere

    def forward(module: nn.Module) -> Any:
        # As if the first descriptor were a class token, and the descriptors one row.
        context = {'class_token': x[:, 0], 'grid': (1, x.shape[1])}
        asked = {name: context[name] for name in getattr(module, 'asks_for', ())}
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            return module(x, **asked)

    def step(module: nn.Module) -> None:
        out = forward(module)
        out.backward(torch.ones_like(out))
        x.grad = None
        module.zero_grad(set_to_none=True)

    rows = [dict(row) for row, _ in heads]
    modules = [module.to(device, dtype) for _, module in heads]
    for name, function in (('forward', torch.no_grad()(forward)), ('step', step)):
        calls = [partial(function, module.train(name == 'step')) for module in modules]
        for row, call, seconds in zip(rows, calls, times(settings, *calls), strict=True):
            row[f'{name} ms'] = 1e3 * seconds / len(x)
            row[f'{name} MiB'] = peak_memory(call, settings.device) / 2**20
    return rows


def times(settings: Settings, *calls: Callable[[], object]) -> list[float]:
    return median_times(*calls, device=settings.device, repetitions=settings.repetitions)


def descriptors(batch: int, number: int, channels: int) -> Tensor:
    return torch.randn(batch, number, channels).relu()  # none is negative, as in a backbone


def head_alone(
    settings: Settings, name: str, row: Row, **arguments: int
) -> tuple[Row, PoolingHead]:
    head = create_head(name, settings.channels, **arguments)
    return {**row, 'head': name, 'output': head.out_features}, head


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


# The parts


def measure_descriptors(settings: Settings) -> Sections:
    for number in settings.numbers:
        heads = [head_alone(settings, name, {'N': number}) for name in settings.heads]
        heads = [(row, head) for row, head in heads if head.least_descriptors <= number]
        rows = costs(settings, heads, descriptors(settings.batch, number, settings.channels))
        images = f'{settings.batch} images of N = {number} descriptors, C = {settings.channels}'
        yield f'Heads alone, {images}', against_avg(rows), rows


def measure_model(settings: Settings) -> Sections:
    for size in settings.img_sizes:
        heads = []
        create = partial(timm_fisher.create_model, settings.backbone, num_classes=CLASSES)
        plain = create(img_size=size)
        for name in (name for name in settings.heads if takes(plain, name)):
            model = create(head=name, img_size=size)
            heads.append(({'head': name, 'image': size, 'output': model.head_hidden_size}, model))
        rows = costs(settings, heads, torch.randn(settings.model_batch, model.in_chans, size, size))
        images = f'{settings.model_batch} images of {size} x {size}, {CLASSES} classes'
        yield f'Inside {settings.backbone}, {images}', against_avg(rows), rows


def takes(model: PooledModel, name: str) -> bool:
    """Whether a model's backbone gives what a head needs."""
    (reader,), grid = model.descriptors, model.pretrained_cfg['pool_size']
    head = create_head(name, reader.num_features)
    needs = [key for key, needed in head.asks_for.items() if needed]
    return all(map(reader.can_give, needs)) and math.prod(grid) >= head.least_descriptors


def measure_sizes(settings: Settings) -> Sections:
    number = sorted(settings.numbers)[len(settings.numbers) // 2]
    x = descriptors(settings.batch, number, settings.channels)
    images = f'{settings.batch} images, N = {number}, C = {settings.channels}'
    for letter, values in VALUES.items():
        sizes = [size for size in values if letter != 'd' or size <= settings.channels]
        rows: list[Row] = []
        lines = []
        for name, argument in product(settings.heads, ARGUMENTS[letter]):
            if argument in inspect.signature(get_head(name)).parameters:
                grown = ({letter: size} for size in sizes)
                heads = [head_alone(settings, name, r, **{argument: r[letter]}) for r in grown]
                heads = [(row, head) for row, head in heads if head.least_descriptors <= number]
                line = {'head': f'`{name}`'}
                for row in costs(settings, heads, x):
                    rows.append(row)
                    cell = f'{three_digits(row["step ms"])} ({three_digits(row["step MiB"])})'
                    line[f'{letter} = {row[letter]}'] = cell
                lines.append(line)
        columns = ['head', *(f'{letter} = {size}' for size in values)]
        title = f'As {letter} grows: step, ms per image (MiB), {images}'
        yield title, records(lines, columns), rows


def measure_newton_schulz(settings: Settings) -> Sections:
    b, n, d, iterations = ROOT.values()
    x = descriptors(b, n, d).to(settings.device)
    x = ((x - x.mean(1, keepdim=True)) * n**-0.5).requires_grad_()
    cotangent = torch.randn(b, d, d, device=settings.device)

    def step(root: Callable[..., Tensor], eps: float) -> Any:
        return torch.autograd.grad(root(x, iterations, eps), x, cotangent)[0]

    @torch.no_grad()
    def forward(root: Callable[..., Tensor], eps: float) -> Tensor:
        return root(x, iterations, eps)

    rows = []
    for name, eps in (('isqrt_cov', 0.0), ('3g', EPS)):
        for label, function in (('forward', forward), ('step', step)):
            calls = [partial(function, root, eps) for root in (gram_root, matrix_root)]
            seconds = times(settings, *calls)
            row: Row = {'head': name, 'pass': label}
            for side, taken, call in zip(('N x N', 'd x d'), seconds, calls, strict=True):
                row[f'{side} ms'] = 1e3 * taken
                row[f'{side} MiB'] = peak_memory(call, settings.device) / 2**20
            row['times faster'] = seconds[1] / seconds[0]
            row['relative difference'] = relative_difference(*(call() for call in calls))
            rows.append(row)
    title = f'Newton-Schulz on the smaller side: {b} images, N = {n}, d = {d}, float32'
    yield title, records(rows), rows


@torch.no_grad()
def measure_fisher(settings: Settings) -> Sections:
    b, n, d, k = FISHER.values()
    head = GMMFisher(d, reduce_dim=None, components=k, l2_descriptors=False)
    head.to(settings.device).eval()
    x = torch.randn(b, n, d, device=settings.device) / d**0.5
    head.reduce.weight.copy_(torch.eye(d))  # VLFeat reduces nothing
    head.log_weights.add_(0.3 * torch.randn_like(head.log_weights))
    head.log_stds.add_(0.2 * torch.randn_like(head.log_stds))
    posteriors = torch.randn(b, n, k, device=settings.device)

    def products() -> None:
        F.linear(x, head.means), F.linear(x, head.means)
        _ = posteriors.mT @ x, posteriors.mT @ x

    calls: dict[str, Callable[[], Any]] = {
        'gmm_fisher': partial(head, x),
        'its four matrix products': products,
    }
    note = 'No VLFeat: it needs a CPU, and on Debian `apt-get install libvlfeat-dev`.'
    library = ctypes.util.find_library('vl')
    if library and settings.device == 'cpu':
        calls['VLFeat'] = partial(vlfeat_vectors, library, head, x)
        apart = relative_difference(calls['VLFeat'](), head(x))
        note = f'VLFeat gives the same vectors, up to {apart:.1e} of their length.'
    seconds = times(settings, *calls.values())
    rows: list[Row] = [
        {'what': what, 'ms': 1e3 * taken, 'gmm_fisher takes': seconds[0] / taken}
        for what, taken in zip(calls, seconds, strict=True)
    ]
    columns = {'what': 'what', 'ms': 'ms', 'gmm_fisher takes': 'gmm_fisher takes, times as long'}
    if 'VLFeat' in calls:
        rows[-1]['relative difference'] = apart
    note += ' The time of gmm_fisher includes the product with its reduction, which the rest lacks.'
    sizes = f'{b} images, N = {n}, D = {d}, K = {k}, float32'
    yield f'gmm_fisher, encoding: {sizes}', f'{records(rows, columns)}\n\n{note}', rows


def vlfeat_vectors(library: str, head: GMMFisher, x: Tensor) -> Tensor:
    """`vl_fisher_encode` of VLFeat, image by image. Its covariances are variances, its flags mean
    signed square root (1) and L2 norm (2)."""
    vl, size = ctypes.CDLL(library), ctypes.c_size_t
    vl.vl_set_num_threads(size(torch.get_num_threads()))
    log_weights, means, log_stds = head.mixture(torch.float32)
    weights, variances = log_weights.exp(), torch.exp(2 * log_stds)
    k, d = means.shape
    vectors = torch.empty(len(x), 2 * k * d)

    def pointer(tensor: Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())

    for vector, image in zip(vectors, x, strict=True):
        vl.vl_fisher_encode(
            *(pointer(vector), 1, pointer(means), size(d), size(k), pointer(variances)),
            *(pointer(weights), pointer(image), size(x.shape[1]), 3),
        )
    return vectors


PARTS: dict[str, Callable[[Settings], Sections]] = {
    'descriptors': measure_descriptors,
    'sizes': measure_sizes,
    'model': measure_model,
    'newton_schulz': measure_newton_schulz,
    'fisher': measure_fisher,
}

# Tables and plot


def against_avg(rows: list[Row]) -> str:
    """Heads below one another; the first one is `avg`."""
    columns = {'head': 'head', 'output': 'output'}
    shown = [{**row, 'head': f'`{row["head"]}`'} for row in rows]
    for name in ('forward', 'step'):
        columns |= {f'{name} ms': f'{name}, ms per image', name: 'times avg', f'{name} MiB': 'MiB'}
        for row in shown:
            row[name] = row[f'{name} ms'] / rows[0][f'{name} ms']
    return records(shown, columns)


def plot(rows: list[Row], path: Path) -> None:
    """A step's time and memory against N, d and K, one line per head."""
    figure = Figure(figsize=(13, 8), layout='constrained')
    axes = figure.subplots(2, 3, sharey='row')
    colours = {name: f'C{i}' for i, name in enumerate(list_heads())}
    titles = {
        'N': 'N, descriptors of an image',
        'd': 'd, dimensions after the reduction',
        'K': 'K, components, atoms or clusters',
    }
    for (letter, title), column in zip(titles.items(), axes.T, strict=True):
        points = sorted((row for row in rows if letter in row), key=lambda row: row[letter])
        values = list(dict.fromkeys(row[letter] for row in points))
        for axis, key in zip(column, ('step ms', 'step MiB'), strict=True):
            for name in dict.fromkeys(row['head'] for row in rows if letter in row):
                line = [(row[letter], row[key]) for row in points if row['head'] == name]
                axis.plot(*zip(*line, strict=True), 'o-', color=colours[name], label=name)
            axis.set(xscale='log', yscale='log', xlabel=title)
            axis.set_xticks(values, labels=map(str, values))
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel('step, ms per image')
    axes[1, 0].set_ylabel('step, peak MiB of the batch')
    drawn = {line.get_label(): line for axis in axes[0] for line in axis.lines}
    figure.legend(drawn.values(), drawn.keys(), loc='outside right upper')
    save_png(figure, path)


if __name__ == '__main__':
    run(main, Settings, positional='heads')
