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

A forward pass is in eval mode without a graph. A step is forward and backward in train mode, to
the parameters and, for heads alone, to the descriptors; no optimizer. Times are medians over
repetitions, after a warm-up. Memory is the peak of what PyTorch's allocator gives out during one
such pass, above what was there before (weights, input): activations, temporaries and gradients,
but not the scratch memory of BLAS and the like. It is the same in each run. On a CPU threads that
wait for one another are slow beside other jobs: OMP_WAIT_POLICY=passive, or --threads 1, helps.

Prints Markdown tables; leaves them in OUTPUT/benchmark.md, the numbers in OUTPUT/benchmark.json
and the cost against N, d and K in OUTPUT/benchmark.png.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_fisher
from timm_fisher import create_head, get_head, list_heads
from timm_fisher.files import save_png, write
from timm_fisher.heads.gmm_fisher import GMMFisher
from timm_fisher.heads.three_g import EPS
from timm_fisher.numerics.linalg import gram_root, matrix_root
from timm_fisher.training.command_line import run
from timm_fisher.training.measure import environment, load, median_times, peak_memory
from timm_fisher.training.tables import table, three_digits

matplotlib.use('Agg')
import matplotlib.pyplot as plt

DIMENSIONS = (32, 64, 128, 256, 512)
COMPONENTS = (8, 16, 32, 64, 128)
SIZES = {
    'reduce_dim': ('d', DIMENSIONS),
    'components': ('K', COMPONENTS),
    'code_dim': ('K', COMPONENTS),
    'clusters': ('K', COMPONENTS),
}
CLASSES = 100
ROOT = dict(batch=64, number=49, d=256, iterations=5)  # the papers' 7 x 7 maps
FISHER = dict(batch=32, number=196, d=64, components=32)
Row = dict[str, Any]


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
    parts: list[Part] = field(
        default_factory=lambda: ['descriptors', 'sizes', 'model', 'newton_schulz', 'fisher']
    )
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
        try:
            for name in self.heads:
                get_head(name)
            torch.empty(1, device=self.device)
        except Exception as error:  # an unknown head, a broken plug-in, a device that is not there
            raise ValueError(str(error)) from error
        self.heads = ['avg', *(name for name in dict.fromkeys(self.heads) if name != 'avg')]


def main(settings: Settings) -> None:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    about = {**environment(settings.device), 'precision': settings.precision}
    sections = ['\n'.join(f'- {key}: {value}' for key, value in about.items())]
    print(sections[0], flush=True)
    settings.output.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for part in settings.parts:
        text, measured = PARTS[part](settings)
        print(f'\n{text}', flush=True)
        sections.append(text)
        rows += [{'part': part, **row} for row in measured]
        about['load after'] = load()
        write(settings.output / 'benchmark.md', '\n\n'.join(sections) + '\n')
        record = {'environment': about, 'options': asdict(settings), 'results': rows}
        text = json.dumps(record, indent=1, default=str) + '\n'
        write(settings.output / 'benchmark.json', text)
    if {'descriptors', 'sizes'} & set(settings.parts):
        plot(rows, settings.output / 'benchmark.png')
    print(f'\nAll of it is in {settings.output}.')


def costs(settings: Settings, modules: list[Any], x: Tensor) -> list[Row]:
    """Milliseconds per image and MiB per batch of each module: a forward pass, and a step."""
    device = torch.device(settings.device)
    amp = settings.precision == 'amp'
    dtype = torch.float32 if amp else getattr(torch, settings.precision)
    modules, x = [module.to(device, dtype) for module in modules], x.to(device, dtype)
    x.requires_grad_(x.ndim == 3)  # descriptors come from a backbone, images from nowhere

    def forward(module: nn.Module) -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            return module(x)

    def step(module: nn.Module) -> None:
        out = forward(module)
        out.backward(torch.ones_like(out))
        x.grad = None
        module.zero_grad(set_to_none=True)

    rows: list[Row] = [{} for _ in modules]
    for name, function in (('forward', torch.no_grad()(forward)), ('step', step)):
        calls = [partial(function, module.train(name == 'step')) for module in modules]
        for row, call, seconds in zip(rows, calls, times(settings, *calls), strict=True):
            row[f'{name} ms'] = 1e3 * seconds / len(x)
            row[f'{name} MiB'] = peak_memory(call, settings.device) / 2**20
    return rows


def times(settings: Settings, *calls: Callable[[], object]) -> list[float]:
    return median_times(*calls, device=settings.device, repetitions=settings.repetitions)


def descriptors(batch: int, number: int, channels: int) -> Tensor:
    """Random ones, not negative, as after a ReLU."""
    return torch.randn(batch, number, channels).relu()


# The parts: each gives its Markdown text and its rows


def measure_descriptors(settings: Settings) -> tuple[str, list[Row]]:
    rows, text = [], []
    for number in settings.numbers:
        heads = [create_head(name, settings.channels) for name in settings.heads]
        measured = costs(settings, heads, descriptors(settings.batch, number, settings.channels))
        measured = [
            {'head': name, 'N': number, 'output': head.out_features, **row}
            for name, head, row in zip(settings.heads, heads, measured, strict=True)
        ]
        rows += measured
        text.append(
            f'### Heads alone, {settings.batch} images of N = {number} descriptors, '
            f'C = {settings.channels}\n\n' + against_avg(measured)
        )
    return '\n\n'.join(text), rows


def measure_model(settings: Settings) -> tuple[str, list[Row]]:
    rows, text = [], []
    for size in settings.img_sizes:
        models = [
            timm_fisher.create_model(
                settings.backbone, head=name, num_classes=CLASSES, img_size=size
            )
            for name in settings.heads
        ]
        measured = costs(
            settings, models, torch.randn(settings.model_batch, models[0].in_chans, size, size)
        )
        measured = [
            {'head': name, 'image': size, 'output': model.head_hidden_size, **row}
            for name, model, row in zip(settings.heads, models, measured, strict=True)
        ]
        rows += measured
        text.append(
            f'### Inside {settings.backbone}, {settings.model_batch} images of {size} x {size}, '
            f'{CLASSES} classes\n\n' + against_avg(measured)
        )
    return '\n\n'.join(text), rows


def measure_sizes(settings: Settings) -> tuple[str, list[Row]]:
    rows: list[Row] = []
    number = sorted(settings.numbers)[len(settings.numbers) // 2]
    x = descriptors(settings.batch, number, settings.channels)
    for name in settings.heads:
        for argument in inspect.signature(get_head(name)).parameters:
            letter, values = SIZES.get(argument, ('', ()))
            sizes = [v for v in values if letter != 'd' or v <= settings.channels]
            heads = [create_head(name, settings.channels, **{argument: v}) for v in sizes]
            measured = costs(settings, heads, x) if heads else []
            for value, head, row in zip(sizes, heads, measured, strict=True):
                rows.append({'head': name, letter: value, 'output': head.out_features, **row})
    text = []
    for letter, values in (('d', DIMENSIONS), ('K', COMPONENTS)):
        cells: dict[str, dict[int, str]] = {}
        for row in rows:
            if letter in row:
                cell = f'{three_digits(row["step ms"])} ({three_digits(row["step MiB"])})'
                cells.setdefault(row['head'], {})[row[letter]] = cell
        lines = [[f'`{name}`', *(row.get(v, '') for v in values)] for name, row in cells.items()]
        text.append(
            f'### As {letter} grows: step, ms per image (MiB), {settings.batch} images, '
            f'N = {number}, C = {settings.channels}\n\n'
            + table(['head', *(f'{letter} = {v}' for v in values)], lines)
        )
    return '\n\n'.join(text), rows


def measure_newton_schulz(settings: Settings) -> tuple[str, list[Row]]:
    b, n, d, iterations = ROOT.values()
    x = descriptors(b, n, d).to(settings.device)
    x = ((x - x.mean(1, keepdim=True)) * n**-0.5).requires_grad_()
    cotangent = torch.randn(b, d, d, device=settings.device)

    def step(root: Callable[..., Tensor], eps: float) -> Any:
        return torch.autograd.grad(root(x, iterations, eps), x, cotangent)

    def forward(root: Callable[..., Tensor], eps: float) -> Any:
        with torch.no_grad():
            return (root(x, iterations, eps),)

    rows = []
    for name, eps in (('isqrt_cov', 0.0), ('3g', EPS)):
        for label, function in (('forward', forward), ('step', step)):
            small, large = partial(function, gram_root, eps), partial(function, matrix_root, eps)
            (theirs,), (ours,) = large(), small()
            difference = ((ours - theirs).norm() / theirs.norm()).item()
            seconds = times(settings, small, large)
            row: Row = {'head': name, 'pass': label}
            for side, taken, call in zip(('N x N', 'd x d'), seconds, (small, large), strict=True):
                row |= {f'{side} ms': 1e3 * taken}
                row |= {f'{side} MiB': peak_memory(call, settings.device) / 2**20}
            row |= {'times faster': seconds[1] / seconds[0], 'relative difference': difference}
            rows.append(row)
    lines = [[v if isinstance(v, str) else three_digits(v) for v in row.values()] for row in rows]
    title = f'### Newton-Schulz on the smaller side: {b} images, N = {n}, d = {d}, float32\n\n'
    return title + table(list(rows[0]), lines), rows


def measure_fisher(settings: Settings) -> tuple[str, list[Row]]:
    b, n, d, k = FISHER.values()
    head = GMMFisher(d, reduce_dim=None, components=k, l2_descriptors=False)
    head.to(settings.device).eval()
    x = torch.randn(b, n, d, device=settings.device) / d**0.5
    with torch.no_grad():  # an identity, which VLFeat does not have, but some mixture
        head.reduce.weight.copy_(torch.eye(d))
        head.log_weights.add_(0.3 * torch.randn_like(head.log_weights))
        head.log_stds.add_(0.2 * torch.randn_like(head.log_stds))
    posteriors = torch.randn(b, n, k, device=settings.device)

    def products() -> None:
        F.linear(x, head.means), F.linear(x, head.means)
        _ = posteriors.mT @ x, posteriors.mT @ x

    named: dict[str, Callable[[], Any]] = {
        'gmm_fisher': partial(head, x),
        'its four matrix products': products,
    }
    library = ctypes.util.find_library('vl')
    if library and settings.device == 'cpu':
        named['VLFeat'] = vlfeat_encoder(library, head, x)
    with torch.no_grad():
        seconds = times(settings, *named.values())
        vector = head(x)
    rows: list[Row] = [
        {'what': what, 'ms': 1e3 * s, 'gmm_fisher takes': seconds[0] / s}
        for what, s in zip(named, seconds, strict=True)
    ]
    note = 'No VLFeat: it needs a CPU, and on Debian `apt-get install libvlfeat-dev`.'
    if 'VLFeat' in named:
        other = named['VLFeat']()
        difference = ((other - vector).norm() / vector.norm()).item()
        rows[-1]['relative difference'] = difference
        note = f'VLFeat gives the same vectors, up to {difference:.1e} of their length.'
    title = (
        f'### gmm_fisher, encoding: {b} images, N = {n}, D = {d}, K = {k}, float32, '
        f'{torch.get_num_threads()} threads\n\n'
    )
    lines = [[r['what'], three_digits(r['ms']), three_digits(r['gmm_fisher takes'])] for r in rows]
    header = ['what', 'ms', 'gmm_fisher takes, times as long']
    note += ' The time of gmm_fisher includes the product with its reduction, which the rest lacks.'
    return title + table(header, lines) + f'\n\n{note}', rows


def vlfeat_encoder(library: str, head: GMMFisher, x: Tensor) -> Callable[[], Tensor]:
    """`vl_fisher_encode` of VLFeat, image by image, on as many threads as PyTorch.

    Its data are float32, one descriptor after the other, its covariances are variances, and its
    flags ask for signed square root (1) and L2 norm (2).
    """
    vl = ctypes.CDLL(library)
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    vl.vl_set_num_threads.argtypes = [size]
    vl.vl_set_num_threads(torch.get_num_threads())
    vl.vl_fisher_encode.argtypes = [
        *(pointer, ctypes.c_int, pointer, size, size),
        *(pointer, pointer, pointer, size, ctypes.c_int),
    ]
    with torch.no_grad():
        mixture = head.mixture(torch.float32)
        means, variances = mixture.means.clone(), torch.exp(2 * mixture.log_stds)
        weights = mixture.log_weights.exp()
    (k, d), n = means.shape, x.shape[1]
    out = torch.empty(len(x), 2 * k * d)
    pairs = list(zip(out, x, strict=True))

    def encode() -> Tensor:
        for vector, image in pairs:
            vl.vl_fisher_encode(
                *(vector.data_ptr(), 1, means.data_ptr(), d, k),
                *(variances.data_ptr(), weights.data_ptr(), image.data_ptr(), n, 3),
            )
        return out

    return encode


PARTS: dict[str, Callable[[Settings], tuple[str, list[Row]]]] = {
    'descriptors': measure_descriptors,
    'sizes': measure_sizes,
    'model': measure_model,
    'newton_schulz': measure_newton_schulz,
    'fisher': measure_fisher,
}

# Tables and plot


def against_avg(rows: list[Row]) -> str:
    """Heads below one another; the first one is `avg`."""
    header, lines = ['head', 'output'], [[f'`{row["head"]}`', str(row['output'])] for row in rows]
    for name in ('forward', 'step'):
        header += [f'{name}, ms per image', 'times avg', 'MiB']
        for row, line in zip(rows, lines, strict=True):
            ms = row[f'{name} ms']
            line += [
                three_digits(ms),
                three_digits(ms / rows[0][f'{name} ms']),
                three_digits(row[f'{name} MiB']),
            ]
    return table(header, lines)


def plot(rows: list[Row], path: Path) -> None:
    """A step's time and memory against N, d and K, one line per head."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 8), sharey='row', constrained_layout=True)
    colours = {name: f'C{i}' for i, name in enumerate(list_heads())}
    for column, (letter, title) in enumerate(
        {
            'N': 'N, descriptors of an image',
            'd': 'd, dimensions after the reduction',
            'K': 'K, components, atoms or clusters',
        }.items()
    ):
        for axis, key in zip(axes[:, column], ('step ms', 'step MiB'), strict=True):
            for name in dict.fromkeys(row['head'] for row in rows if letter in row):
                points = sorted(
                    (row[letter], row[key])
                    for row in rows
                    if row.get('head') == name and letter in row
                )
                axis.plot(*zip(*points, strict=True), 'o-', color=colours[name], label=name)
            axis.set(xscale='log', yscale='log', xlabel=title)
            values = sorted({row[letter] for row in rows if letter in row})
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
