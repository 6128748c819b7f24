"""Time and memory of every installed head, against `avg`.

    python recipes/benchmark.py                              # all of it, some minutes on 2 cores
    python recipes/benchmark.py --parts descriptors --heads sparse_fisher 3g --threads 1
    python recipes/benchmark.py --device cuda --precision amp --batch 64 --model-batch 64

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

import argparse
import ctypes
import ctypes.util
import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_fisher
from timm_fisher import create_head, get_head, list_heads
from timm_fisher.heads.gmm_fisher import GMMFisher
from timm_fisher.heads.three_g import EPS
from timm_fisher.numerics.linalg import gram_root, matrix_root
from timm_fisher.training.measure import digits, load, median_times, peak_memory, processor, table

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


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    about: dict[str, Any] = {
        'versions': f'torch {torch.__version__}, timm {timm.__version__}',
        'device': processor(args.device),
        'threads': torch.get_num_threads(),
        'precision': args.precision,
        'load before': load(),
    }
    sections = ['\n'.join(f'- {key}: {value}' for key, value in about.items())]
    print(sections[0], flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for part in args.parts:
        text, found = PARTS[part](args)
        print(f'\n{text}', flush=True)
        sections.append(text)
        rows += [{'part': part, **row} for row in found]
        about['load after'] = load()
        (args.output / 'benchmark.md').write_text('\n\n'.join(sections) + '\n')
        record = {'environment': about, 'options': vars(args), 'results': rows}
        text = json.dumps(record, indent=1, default=str) + '\n'
        (args.output / 'benchmark.json').write_text(text)
    if any(part in args.parts for part in ('descriptors', 'sizes')):
        plot(rows, args.output / 'benchmark.png')
    print(f'\nAll of it is in {args.output}.')


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--parts', nargs='+', default=list(PARTS), choices=PARTS, metavar='PART')
    add('--heads', nargs='+', default=list_heads(), metavar='HEAD', help='default: all installed')
    add('--output', type=Path, default=Path('runs/benchmark'), help='folder')
    add('--device', default='cpu', help='cpu, cuda, cuda:1, ...')
    precisions = ['float32', 'float64', 'bfloat16', 'amp']
    add('--precision', default='float32', choices=precisions, help='amp: autocast to bfloat16')
    add('--threads', type=positive, help='of PyTorch on the CPU; default: as it chooses')
    add('--repetitions', type=positive, default=3, help='at least')
    add('--batch', type=positive, default=8, help='images, for heads alone')
    add('--channels', type=positive, default=2048, help='C of the descriptors')
    add('--numbers', type=positive, nargs='+', default=[49, 196, 784], help='N of the descriptors')
    add('--backbone', default='resnet50', help='any timm architecture')
    add('--img-sizes', type=positive, nargs='+', default=[224, 448])
    add('--model-batch', type=positive, default=2, help='images, inside a model')
    args = parser.parse_args()
    try:
        for name in args.heads:
            get_head(name)
        torch.empty(1, device=args.device)
    except Exception as error:  # an unknown head, a broken plug-in, a device that is not there
        parser.error(str(error))
    args.heads = ['avg', *(name for name in dict.fromkeys(args.heads) if name != 'avg')]
    return args


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{value} is less than 1')
    return value


def costs(args: argparse.Namespace, modules: list[Any], x: Tensor) -> list[Row]:
    """Milliseconds per image and MiB per batch of each module: a forward pass, and a step."""
    device = torch.device(args.device)
    amp = args.precision == 'amp'
    dtype = torch.float32 if amp else getattr(torch, args.precision)
    modules, x = [module.to(device, dtype) for module in modules], x.to(device, dtype)
    x.requires_grad_(x.ndim == 3)  # descriptors come from a backbone, images from nowhere

    def forward(module: nn.Module) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            return module(x)

    def step(module: nn.Module) -> None:
        out = forward(module)
        out.backward(torch.ones_like(out))
        x.grad = None
        module.zero_grad(set_to_none=True)

    rows: list[Row] = [{} for _ in modules]
    for name, function in (('forward', torch.no_grad()(forward)), ('step', step)):
        runs = [partial(function, module.train(name == 'step')) for module in modules]
        for row, run, seconds in zip(rows, runs, times(args, *runs), strict=True):
            row[f'{name} ms'] = 1e3 * seconds / len(x)
            row[f'{name} MiB'] = peak_memory(run, args.device) / 2**20
    return rows


def times(args: argparse.Namespace, *runs: Callable[[], object]) -> list[float]:
    return median_times(*runs, device=args.device, repetitions=args.repetitions)


def descriptors(batch: int, number: int, channels: int) -> Tensor:
    """Random ones, not negative, as after a ReLU."""
    return torch.randn(batch, number, channels).relu()


# The parts: each gives its Markdown text and its rows


def measure_descriptors(args: argparse.Namespace) -> tuple[str, list[Row]]:
    rows, text = [], []
    for number in args.numbers:
        heads = [create_head(name, args.channels) for name in args.heads]
        found = costs(args, heads, descriptors(args.batch, number, args.channels))
        found = [
            {'head': name, 'N': number, 'output': head.out_features, **row}
            for name, head, row in zip(args.heads, heads, found, strict=True)
        ]
        rows += found
        text.append(
            f'### Heads alone, {args.batch} images of N = {number} descriptors, '
            f'C = {args.channels}\n\n' + against_avg(found)
        )
    return '\n\n'.join(text), rows


def measure_model(args: argparse.Namespace) -> tuple[str, list[Row]]:
    rows, text = [], []
    for size in args.img_sizes:
        models = [
            timm_fisher.create_model(args.backbone, head=name, num_classes=CLASSES, img_size=size)
            for name in args.heads
        ]
        found = costs(args, models, torch.randn(args.model_batch, models[0].in_chans, size, size))
        found = [
            {'head': name, 'image': size, 'output': model.head_hidden_size, **row}
            for name, model, row in zip(args.heads, models, found, strict=True)
        ]
        rows += found
        text.append(
            f'### Inside {args.backbone}, {args.model_batch} images of {size} x {size}, '
            f'{CLASSES} classes\n\n' + against_avg(found)
        )
    return '\n\n'.join(text), rows


def measure_sizes(args: argparse.Namespace) -> tuple[str, list[Row]]:
    rows: list[Row] = []
    number = sorted(args.numbers)[len(args.numbers) // 2]
    x = descriptors(args.batch, number, args.channels)
    for name in args.heads:
        for argument in inspect.signature(get_head(name)).parameters:
            letter, values = SIZES.get(argument, ('', ()))
            values = [v for v in values if letter != 'd' or v <= args.channels]
            heads = [create_head(name, args.channels, **{argument: v}) for v in values]
            found = costs(args, heads, x) if heads else []
            for value, head, row in zip(values, heads, found, strict=True):
                rows.append({'head': name, letter: value, 'output': head.out_features, **row})
    text = []
    for letter, values in (('d', DIMENSIONS), ('K', COMPONENTS)):
        cells: dict[str, dict[int, str]] = {}
        for row in rows:
            if letter in row:
                cell = f'{digits(row["step ms"])} ({digits(row["step MiB"])})'
                cells.setdefault(row['head'], {})[row[letter]] = cell
        lines = [[f'`{name}`', *(row.get(v, '') for v in values)] for name, row in cells.items()]
        text.append(
            f'### As {letter} grows: step, ms per image (MiB), {args.batch} images, N = {number}, '
            f'C = {args.channels}\n\n'
            + table(['head', *(f'{letter} = {v}' for v in values)], lines)
        )
    return '\n\n'.join(text), rows


def measure_newton_schulz(args: argparse.Namespace) -> tuple[str, list[Row]]:
    b, n, d, iterations = ROOT.values()
    x = descriptors(b, n, d).to(args.device)
    x = ((x - x.mean(1, keepdim=True)) * n**-0.5).requires_grad_()
    cotangent = torch.randn(b, d, d, device=args.device)

    def step(root: Callable[..., Tensor], eps: float) -> tuple[Tensor, ...]:
        return torch.autograd.grad(root(x, iterations, eps), x, cotangent)

    def forward(root: Callable[..., Tensor], eps: float) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (root(x, iterations, eps),)

    rows = []
    for name, eps in (('isqrt_cov', 0.0), ('3g', EPS)):
        for label, run in (('forward', forward), ('step', step)):
            small, large = partial(run, gram_root, eps), partial(run, matrix_root, eps)
            (theirs,), (ours,) = large(), small()
            difference = ((ours - theirs).norm() / theirs.norm()).item()
            seconds = times(args, small, large)
            row: Row = {'head': name, 'pass': label}
            for side, taken, run in zip(('N x N', 'd x d'), seconds, (small, large), strict=True):
                row |= {f'{side} ms': 1e3 * taken}
                row |= {f'{side} MiB': peak_memory(run, args.device) / 2**20}
            row |= {'times faster': seconds[1] / seconds[0], 'relative difference': difference}
            rows.append(row)
    lines = [[v if isinstance(v, str) else digits(v) for v in row.values()] for row in rows]
    title = f'### Newton-Schulz on the smaller side: {b} images, N = {n}, d = {d}, float32\n\n'
    return title + table(list(rows[0]), lines), rows


def measure_fisher(args: argparse.Namespace) -> tuple[str, list[Row]]:
    b, n, d, k = FISHER.values()
    head = GMMFisher(d, reduce_dim=None, components=k, l2_descriptors=False)
    head.to(args.device).eval()
    x = torch.randn(b, n, d, device=args.device) / d**0.5
    with torch.no_grad():  # an identity, which VLFeat does not have, but some mixture
        head.reduce.weight.copy_(torch.eye(d))
        head.log_weights.add_(0.3 * torch.randn_like(head.log_weights))
        head.log_stds.add_(0.2 * torch.randn_like(head.log_stds))
    posteriors = torch.randn(b, n, k, device=args.device)

    def products() -> None:
        F.linear(x, head.means), F.linear(x, head.means)
        _ = posteriors.mT @ x, posteriors.mT @ x

    named = {'gmm_fisher': partial(head, x), 'its four matrix products': products}
    library = ctypes.util.find_library('vl')
    if library and args.device == 'cpu':
        named['VLFeat'] = vlfeat_encoder(library, head, x)
    with torch.no_grad():
        seconds = times(args, *named.values())
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
    lines = [[r['what'], digits(r['ms']), digits(r['gmm_fisher takes'])] for r in rows]
    header = ['what', 'ms', 'gmm_fisher takes so many times as long']
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


PARTS = {
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
            line += [digits(ms), digits(ms / rows[0][f'{name} ms']), digits(row[f'{name} MiB'])]
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
                found = [row for row in rows if row.get('head') == name and letter in row]
                points = sorted((row[letter], row[key]) for row in found)
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
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == '__main__':
    main()
