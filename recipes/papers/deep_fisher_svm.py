"""Learn the Fisher kernel of a linear SVM: Algorithm 1 of "Deep Fisher Kernels".

    python recipes/deep_fisher_svm.py --config recipes/configs/deep_fisher_svm.yaml \
        --data-dir PATH --mode multi

The backbone is frozen and the PCA of its descriptors fixed; the Gaussian mixture G starts from EM.
Then by turns: solve the one-vs-rest SVMs exactly for the present mixture; move the mixture along
the gradient of their loss, by a line search. The objective never rises:

    L(w, G) = 1/2 |w|^2 + C/n sum_i max(0, 1 - y_i <w, phi(X_i; G)>)^2      (eq. 4, mode `single`)
    sum_l L(w_l, G)                                                         (eq. 6, mode `multi`)

Nothing is chosen on the test split: C on the validation split with the EM mixture, and the mixture
for kernel transfer by its average precision there. Leaves in `--output`: tables.md (tables 2 and 3
of the paper), metrics.json, log.jsonl, objective.png, config.yaml and the models of table (b),
loadable by `timm.create_model('local-dir:...', pretrained=True)`: base/ and model/, the latter in
mode `single` one model-CLASS/ with one output for each class.

One departure: a mean moves along its gradient in units of its standard deviation. The paper's own
direction depends on the unit of the descriptors.

Paper: Sydorov, Sakurada and Lampert, "Deep Fisher Kernels - End to End Learning of the Fisher
Kernel GMM Parameters", CVPR 2014.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jsonargparse
import matplotlib
import numpy as np
import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.metrics import average_precision_score
from sklearn.svm import LinearSVC
from torch import Tensor
from torch.utils.data import DataLoader

import timm_fisher
from timm_fisher import PooledModel
from timm_fisher.files import save_png, write
from timm_fisher.heads.gmm_fisher import GMMFisher, Mixture
from timm_fisher.numerics.linalg import power_l2, unit_length
from timm_fisher.training.config import Config
from timm_fisher.training.data import cache_features, create_datasets, load_splits

matplotlib.use('Agg')
import matplotlib.pyplot as plt

C_GRID = (10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4)
FIRST_STEP = 0.1  # largest change of a log weight, of a mean in stds, or of a log std
TRIALS = 20  # of one line search
RISE = 1e-5  # of the objective, relative, that rounding explains
BATCH = 64  # images that the mixture sees at a time


@dataclass
class DeepFisher:
    """Learn the Fisher kernel of a linear SVM, on a frozen timm backbone.

    Args:
        output: folder of the run.
        data_dir: folder with train/, val/ and test/, one subfolder per class; or the root of a
            torch/ or hfds/ data set.
        dataset: empty for such a folder, torch/NAME or hfds/NAME as timm takes them, or digits.
        train_split: name of the training split.
        val_split: name of the validation split; null carves it from the training split.
        test_split: name of the test split.
        val_fraction: share of the training split that is carved off, stratified by class.
        backbone: any name that timm.create_model takes, local-dir:FOLDER included.
        pretrained: load the backbone's pretrained weights.
        backbone_stage: -1 pools the backbone's output, -2, -3, ... an earlier stage.
        img_size: side of the input image; null for the backbone's own.
        crop_pct: share of the resized image that is cropped; null for the backbone's own.
        reduce_dim: dimensions of a descriptor after PCA; null for no reduction.
        components: Gaussians of the mixture.
        l2_descriptors: L2-normalise each descriptor before PCA.
        mode: a mixture for each class (single), or one that all classes share (multi).
        C: of eq. 4; null chooses it on the validation split, in mode single for each class.
        bias: append a constant 1 to the Fisher vectors. The paper's eq. 4 has no bias; what the
            mixture then learns is, for a good part, to supply one.
        iterations: steps of the mixture, at most; the paper takes 100.
        tolerance: stop when an iteration lowers the objective by less than this share.
        descriptor_fraction: share of each image's descriptors that the gradient is computed from;
            the paper takes 0.1. The objective and the line search use all of them.
        batch_size: images per step of the backbone.
        workers: processes that load images.
        cache_dir: folder of cached features, shared by runs.
        seed: of everything random.
    """

    output: str = 'runs/deep_fisher_svm'
    data_dir: str = ''
    dataset: str = ''
    train_split: str = 'train'
    val_split: str | None = 'val'
    test_split: str = 'test'
    val_fraction: float = 0.15
    backbone: str = 'resnet50'
    pretrained: bool = False
    backbone_stage: int = -1
    img_size: int | None = None
    crop_pct: float | None = None
    reduce_dim: int | None = 64
    components: int = 32
    l2_descriptors: bool = True
    mode: Literal['single', 'multi'] = 'multi'
    C: float | None = None
    bias: bool = False
    iterations: int = 30
    tolerance: float = 1e-4
    descriptor_fraction: float = 0.1
    batch_size: int = 64
    workers: int = 2
    cache_dir: str = 'runs/cache'
    seed: int = 0


def main() -> None:
    config = parse_config(sys.argv[1:])
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise ValueError(f'This runs in one process, not in {accelerator.num_processes}.')
    set_seed(config.seed)
    output = Path(config.output)
    if (output / 'metrics.json').exists():
        raise ValueError(f"'{output}' holds a finished run already. Give another --output.")
    output.mkdir(parents=True, exist_ok=True)
    write(output / 'config.yaml', yaml.safe_dump(asdict(config), sort_keys=False))

    # Data, backbone, PCA and EM; C
    model, data, data_config = prepare(config, accelerator)
    kernel = FisherKernel(model.head, bias=config.bias)
    em = kernel.get()
    costs = choose_costs(kernel, data, config)
    print('C:', ', '.join(f'{name} {c:g}' for name, c in zip(data.classes, costs, strict=True)))

    # Algorithm 1
    log: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        log.append(row)
        write(output / 'log.jsonl', ''.join(json.dumps(each) + '\n' for each in log))
        print('{task} {iteration}: objective {objective:.6g}, val AP {val_ap:.2%}'.format(**row))

    every = list(range(len(data.classes)))
    tasks = {'all': every} if config.mode == 'multi' else {data.classes[c]: [c] for c in every}
    learned = {}
    for name, task in tasks.items():
        kernel.set(em)
        learned[name] = learn(kernel, data, task, costs[task[0]], config, name, report)
        plot(log, output / 'objective.png')

    # Evaluate, and save the models of table (b)
    def solve(mixture: Mixture, task: list[int], *splits: str) -> Tensor:
        kernel.set(mixture)
        phi = torch.cat([kernel.phi(data.y[split]) for split in splits])
        signs = torch.cat([data.signs[split] for split in splits])[:, task]
        return solve_svms(phi, signs, [costs[c] for c in task])

    def decide(mixture: Mixture, svms: Tensor, split: str) -> Tensor:
        kernel.set(mixture)
        return kernel.phi(data.y[split]).double() @ svms

    columns: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    for name, task in tasks.items():
        found = learned[name]
        for kind, last, best in (('base', em, em), ('deep', found.last, found.best)):
            svms = solve(last, task, 'train')
            for split in ('val', 'test'):
                columns[split, kind].append(decide(last, svms, split))
            svms = solve(best, task, 'train', 'val')
            columns['transfer', kind].append(decide(best, svms, 'test'))
            columns['svms', kind].append(svms)
        folder = output / ('model' if config.mode == 'multi' else f'model-{name}')
        save(model, found.best, svms, folder, [data.classes[c] for c in task], data_config)
    svms = torch.cat(columns['svms', 'base'], 1)
    save(model, em, svms, output / 'base', data.classes, data_config)
    results = {
        group: {
            kind: evaluate(torch.cat(columns[group, kind], 1), data.signs[split], data.classes)
            for kind in ('base', 'deep')
        }
        for group, split in (('val', 'val'), ('test', 'test'), ('transfer', 'test'))
    }
    metrics = {
        **results,
        'C': dict(zip(data.classes, costs, strict=True)),
        'iterations': {name: each.iterations for name, each in learned.items()},
        'best_iteration': {name: each.best_iteration for name, each in learned.items()},
        'images': {name: len(y) for name, y in data.y.items()},
        'out_features': model.head.out_features,
        'seconds': round(sum(row['seconds'] for row in log), 1),
        'versions': {'torch': torch.__version__, 'timm': timm.__version__},
    }
    text = table(results, config)
    write(output / 'tables.md', text)
    write(output / 'metrics.json', json.dumps(metrics, indent=2) + '\n')
    print(f'\n{text}\n-> {output}')


def parse_config(arguments: list[str]) -> DeepFisher:
    """`--config FILE`, then overrides. Exits with a message on an error."""
    parser = jsonargparse.ArgumentParser(description=(DeepFisher.__doc__ or '').split('\n')[0])
    parser.add_argument('--config', action='config', help='YAML file of these options')
    parser.add_class_arguments(DeepFisher)
    parsed = parser.parse_args([each.replace('--data-dir', '--data_dir') for each in arguments])
    config = DeepFisher(**{each.name: parsed[each.name] for each in fields(DeepFisher)})
    for name, allowed, wanted in (
        ('iterations', config.iterations >= 1, '1 or more'),
        ('descriptor_fraction', 0 < config.descriptor_fraction <= 1, 'more than 0, at most 1'),
        ('C', config.C is None or config.C > 0, 'more than 0, or null'),
    ):
        if not allowed:
            parser.error(f'{name} is {getattr(config, name)}; give {wanted}.')
    return config


@dataclass
class Data:
    """The splits train, val and test: reduced descriptors `[n, N, D]`, and +1 or -1 for each class
    `[n, classes]`, float64."""

    y: dict[str, Tensor]
    signs: dict[str, Tensor]
    classes: list[str]


@torch.no_grad()
def prepare(
    config: DeepFisher, accelerator: Accelerator
) -> tuple[PooledModel, Data, dict[str, Any]]:
    """The model with its head fitted, what the head's reduction gives, and the preprocessing.

    Raises:
        ValueError: a split without images of some class, and what `load_splits` refuses.
    """
    shared = {each.name for each in fields(Config)} & {each.name for each in fields(config)}
    for_data = Config(**{name: getattr(config, name) for name in shared})
    splits, classes = load_splits(for_data)
    signs = {}
    for name, split in splits.items():
        signs[name] = torch.as_tensor(
            np.where(split.labels[:, None] == range(len(classes)), 1.0, -1.0)
        )
        missing = [
            label for label, sign in zip(classes, signs[name].T, strict=True) if max(sign) < 0
        ]
        if missing:
            raise ValueError(f"The split '{name}' has no images of {missing}.")
    model = timm_fisher.create_model(
        config.backbone,
        'gmm_fisher',
        pretrained=config.pretrained,
        num_classes=len(classes),
        img_size=config.img_size,
        stage=config.backbone_stage,
        reduce_dim=config.reduce_dim,
        components=config.components,
        l2_descriptors=config.l2_descriptors,
    )
    requested = {'img_size': config.img_size, 'crop_pct': config.crop_pct}
    data_config = timm.data.resolve_input_data_config(model, requested)
    images = create_datasets(for_data, splits, data_config)
    loaders = {
        name: DataLoader(cache_features(model, images[name], for_data, accelerator), BATCH)
        for name in splits
    }
    timm_fisher.fit(model.to(accelerator.device).eval(), loaders['train'], from_features=True)

    def reduce(features: Tensor) -> Tensor:
        x = model.descriptors(features.to(accelerator.device))
        return model.head.reduce(unit_length(x) if config.l2_descriptors else x)

    y = {name: torch.cat([reduce(x) for x, _ in loader]) for name, loader in loaders.items()}
    signs = {name: each.to(accelerator.device) for name, each in signs.items()}
    return model, Data(y, signs, classes), data_config


class FisherKernel(GMMFisher):
    """The mixture of a fitted head on descriptors `[n, N, D]` that are reduced already.

    Args:
        head: the mixture is copied.
        bias: append a constant 1 to the Fisher vectors.
    """

    def __init__(self, head: GMMFisher, *, bias: bool) -> None:
        components, d = head.means.shape
        super().__init__(
            d, reduce_dim=None, components=components, l2_descriptors=False, normalize=False
        )
        self.to(head.means).requires_grad_(False)
        self.reduce.weight.copy_(torch.eye(d))
        self.log_std_floor.copy_(head.log_std_floor)
        self.bias = bias
        self.set(Mixture(head.log_weights, head.means, head.log_stds))

    def get(self) -> Mixture:
        """A copy of the mixture."""
        return Mixture(self.log_weights.clone(), self.means.clone(), self.log_stds.clone())

    def set(self, mixture: Mixture) -> None:
        """Take over a mixture; its weights are normalised, standard deviations kept off zero."""
        for name, value in mixture._asdict().items():
            getattr(self, name).copy_(value.detach())
        self.log_weights.copy_(self.log_weights.log_softmax(0))
        self.project_()

    def phi(self, y: Tensor) -> Tensor:
        """Fisher vectors as the SVMs see them, `[n, features]`."""
        return self.finish(self.psi(y))

    def psi(self, y: Tensor) -> Tensor:
        """Fisher vectors `[n, 2KD]` before eq. 3."""
        return torch.cat([self(part) for part in y.split(BATCH)])

    def finish(self, psi: Tensor) -> Tensor:
        """Eq. 3, and the constant if there is one."""
        phi = power_l2(psi)
        return torch.cat([phi, torch.ones_like(phi[:, :1])], 1) if self.bias else phi

    def gradient(
        self, y: Tensor, psi: Tensor, weights: Tensor, signs: Tensor, sample: Tensor | None = None
    ) -> Mixture:
        """Gradient of the summed loss with respect to log weights, means and log stds.

        psi is a mean over descriptors: the chain rule beyond it has the right expectation on a
        random sample of them, if the derivative of the loss by psi is that of all.

        Args:
            y: `[n, N, D]`.
            psi: of y.
            weights: of the SVMs, `[features, tasks]`.
            signs: `[n, tasks]`.
            sample: indices of some descriptors of each image, `[n, M]`; None for all.
        """
        psi = psi.detach().requires_grad_()
        loss = squared_hinge(self.finish(psi), weights, signs).sum()
        (by_psi,) = torch.autograd.grad(loss, psi)
        if sample is not None:
            y = y.gather(1, sample[..., None].expand(-1, -1, y.shape[2]))
        mixture = [each.requires_grad_() for each in (self.log_weights, self.means, self.log_stds)]
        gradient = [torch.zeros_like(each) for each in mixture]
        for x, factor in zip(y.split(BATCH), by_psi.split(BATCH), strict=True):
            parts = torch.autograd.grad(self(x), mixture, factor)
            for total, part in zip(gradient, parts, strict=True):
                total += part
        self.requires_grad_(False)
        return Mixture(*gradient)


def squared_hinge(phi: Tensor, weights: Tensor, signs: Tensor) -> Tensor:
    """The sum over images for each task, `[tasks]`, float64."""
    return (1 - signs * (phi.double() @ weights)).clamp_min(0).square().sum(0)


def solve_svms(phi: Tensor, signs: Tensor, costs: list[float]) -> Tensor:
    """The minimisers of eq. 4 for each task, `[features, tasks]`, float64.

    LIBLINEAR sums the loss over images where eq. 4 takes the mean. Neither has a bias; a constant
    among the features is one, and counts in the norm of w.
    """
    x = phi.double().cpu().numpy()
    solutions = []
    for sign, cost in zip(signs.T.cpu().numpy(), costs, strict=True):
        svm = LinearSVC(
            C=cost / len(x), fit_intercept=False, dual='auto', tol=1e-6, max_iter=100_000,
            random_state=0,
        )  # fmt: skip
        solutions.append(svm.fit(x, sign).coef_[0])
    return torch.as_tensor(np.stack(solutions, 1), device=phi.device)


def average_precision(scores: Tensor, signs: Tensor) -> np.ndarray:
    """Of each task, `[tasks]`."""
    pairs = zip(signs.T.cpu().numpy(), scores.T.cpu().numpy(), strict=True)
    return np.array([average_precision_score(sign > 0, values) for sign, values in pairs])


def choose_costs(kernel: FisherKernel, data: Data, config: DeepFisher) -> list[float]:
    """C of each class: the best on the validation split, or in mode multi the best for all."""
    count = len(data.classes)
    if config.C is not None:
        return [config.C] * count
    train, val = kernel.phi(data.y['train']), kernel.phi(data.y['val'])
    found = np.zeros((len(C_GRID), count))
    for i, cost in enumerate(C_GRID):
        w = solve_svms(train, data.signs['train'], [cost] * count)
        found[i] = average_precision(val.double() @ w, data.signs['val'])
    if config.mode == 'multi':
        found[:] = found.mean(1, keepdims=True)
    return [C_GRID[i] for i in found.argmax(0)]


class Learned(NamedTuple):
    """What Algorithm 1 found for some classes."""

    last: Mixture
    best: Mixture  # in average precision on the validation split
    iterations: int
    best_iteration: int


def learn(
    kernel: FisherKernel,
    data: Data,
    task: list[int],
    cost: float,
    config: DeepFisher,
    name: str,
    report: Callable[[dict[str, Any]], None],
) -> Learned:
    """Algorithm 1 for these classes, from the kernel's mixture, which is moved.

    Raises:
        FloatingPointError: the objective rose.
    """
    y, signs = data.y['train'], data.signs['train'][:, task]
    generator = torch.Generator().manual_seed(config.seed)
    rows: list[dict[str, Any]] = []
    previous, best_ap, step = math.inf, -1.0, None
    while True:
        start, iteration = time.perf_counter(), len(rows)
        psi = kernel.psi(y)
        w = solve_svms(kernel.finish(psi), signs, [cost] * len(task))

        def loss(psi: Tensor, w: Tensor = w) -> float:
            return squared_hinge(kernel.finish(psi), w, signs).sum().item()

        norm, before = 0.5 * w.square().sum().item(), loss(psi)
        objective = norm + cost / len(y) * before
        val = average_precision(kernel.phi(data.y['val']).double() @ w, data.signs['val'][:, task])
        if val.mean() > best_ap:
            best, best_ap, best_iteration = kernel.get(), val.mean(), iteration
        row = {'task': name, 'iteration': iteration, 'objective': objective, 'val_ap': val.mean()}
        if objective > previous * (1 + RISE):
            raise FloatingPointError(
                f'The objective of {name} rose from {previous} to {objective} in iteration '
                f'{iteration}: the SVM was not solved to the end. Try a smaller C.'
            )
        little = rows and rows[-1]['objective'] - objective < config.tolerance * objective
        if iteration < config.iterations and not little:
            number = math.ceil(config.descriptor_fraction * y.shape[1])
            order = torch.rand(y.shape[:2], generator=generator).argsort(1).to(y.device)
            # Where a sample leads uphill, all descriptors have the last word.
            for sample in (order[:, :number], None):
                gradient = kernel.gradient(y, psi, w, signs, sample)
                found, after = line_search(
                    kernel, gradient, lambda: loss(kernel.psi(y)), before, step
                )
                if found:
                    break
            step, previous = found or step, norm + cost / len(y) * after
            row |= {'step': found, 'objective_after_step': previous}
        rows.append(row | {'seconds': round(time.perf_counter() - start, 2)})
        report(rows[-1])
        if not row.get('step'):
            return Learned(kernel.get(), best, iteration, best_iteration)


def line_search(
    kernel: FisherKernel,
    gradient: Mixture,
    loss: Callable[[], float],
    before: float,
    step: float | None,
) -> tuple[float, float]:
    """Move the mixture along the negative gradient to the lowest loss found.

    The step is doubled while the loss falls, or divided until it does; a parabola through the
    lowest point and its neighbours then gives one more.

    Args:
        kernel: its mixture is where the search begins, and is moved.
        gradient: of the loss, from `kernel.gradient`.
        loss: of the kernel's present mixture, the SVMs fixed.
        before: the loss now.
        step: the last one; None for the first time.

    Returns:
        The step and the loss there; 0, and the old mixture, where no step lowers the loss.
    """
    old, stds = kernel.get(), torch.exp(kernel.log_stds)
    direction = gradient._replace(means=gradient.means * stds.square())
    if step is None:
        relative = gradient._replace(means=gradient.means * stds)
        step = FIRST_STEP / max(1e-30, *(each.abs().max().item() for each in relative))

    def place(eta: float) -> None:
        kernel.set(Mixture(*(a - eta * b for a, b in zip(old, direction, strict=True))))

    def at(eta: float) -> float:
        place(eta)
        value = loss()
        return value if math.isfinite(value) else math.inf

    losses = {0.0: before, step: at(step)}
    if losses[step] < before:
        while losses[step] == min(losses.values()) and len(losses) < TRIALS:
            step *= 2
            losses[step] = at(step)
    else:
        while losses[step] >= before and len(losses) < TRIALS:
            step /= 4
            losses[step] = at(step)
    steps = sorted(losses)
    i = steps.index(min(steps, key=losses.__getitem__))
    near = steps[i - 1 : i + 2]
    if 0 < i < len(steps) - 1 and math.isfinite(losses[near[2]]):
        a, b, _ = np.polyfit(near, [losses[each] for each in near], 2)
        vertex = float(-b / (2 * a))
        losses[vertex] = at(vertex)
    best = min(losses, key=losses.__getitem__)
    place(best)
    return best, losses[best]


def evaluate(scores: Tensor, signs: Tensor, classes: list[str]) -> dict[str, Any]:
    """Average precision of each class, their mean, and accuracy of the highest score."""
    precision = average_precision(scores, signs)
    return {
        'average_precision': dict(zip(classes, precision.tolist(), strict=True)),
        'mean_average_precision': precision.mean(),
        'accuracy': (scores.argmax(1) == signs.argmax(1)).double().mean().item(),
    }


def table(results: dict[str, Any], config: DeepFisher) -> str:
    """Markdown, as tables 2 and 3 of the paper."""
    lines = [
        f'Average precision in %, mode {config.mode}, {"with" if config.bias else "without"} bias. '
        '(a) Deep training: SVMs of the training split, with the EM and with the last mixture. '
        '(b) Kernel transfer: SVMs of training and validation split, with the EM mixture and with '
        'the one of the best validation result.\n',
        '| class | (a) val: base | deep | diff. | (a) test: base | deep | diff. '
        '| (b) test: k_base | k_deep | diff. |',
        '|---' + '|---:' * 9 + '|',
    ]
    rows = {
        'average': 'mean_average_precision',
        'accuracy of the highest score': 'accuracy',
    }
    for name in [*results['val']['base']['average_precision'], *rows]:
        cells = [name]
        for group in results.values():
            base, deep = (
                100 * (each[rows[name]] if name in rows else each['average_precision'][name])
                for each in (group['base'], group['deep'])
            )
            cells += [f'{base:.1f}', f'{deep:.1f}', f'{deep - base:+.1f}']
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


@torch.no_grad()
def save(
    model: PooledModel,
    mixture: Mixture,
    weights: Tensor,
    folder: Path,
    names: list[str],
    data_config: dict[str, Any],
) -> None:
    """An ordinary gmm_fisher model whose outputs are the SVMs' decision values."""
    for name, value in mixture._asdict().items():
        getattr(model.head, name).copy_(value)
    model.reset_classifier(len(names))
    model.classifier.weight.copy_(weights[: model.head.out_features].T)
    model.classifier.bias.copy_(weights[model.head.out_features :].sum(0))  # 0 of no rows
    timm_fisher.save_model(model, folder, label_names=names, data_config=data_config)


def plot(log: list[dict[str, Any]], path: Path) -> None:
    """Objective, relative to the first, and average precision on the validation split."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for i, task in enumerate(dict.fromkeys(row['task'] for row in log)):
        rows = [row for row in log if row['task'] == task]
        first = rows[0]['objective']
        svm = [(row['iteration'], row['objective'] / first) for row in rows]
        gmm = [
            (row['iteration'] + 0.5, row['objective_after_step'] / first)
            for row in rows
            if 'objective_after_step' in row
        ]
        left.plot(*zip(*sorted(svm + gmm), strict=True), f'C{i}-', linewidth=1, label=task)
        left.plot(*zip(*svm, strict=True), f'C{i}o', markersize=4)
        left.plot(*zip(*gmm, strict=True), f'C{i}o', markersize=4, markerfacecolor='white')
        right.plot(
            [row['iteration'] for row in rows], [100 * row['val_ap'] for row in rows], f'C{i}.-'
        )
    left.set(xlabel='iteration', ylabel='objective / first objective')
    left.set_title('full: after the SVM step; hollow: after the mixture step', fontsize=9)
    right.set(xlabel='iteration', ylabel='validation average precision (%)')
    left.legend()
    figure.tight_layout()
    save_png(figure, path)


if __name__ == '__main__':
    main()
