"""Algorithm 1 of "Deep Fisher Kernels": learn the Gaussian mixture of linear SVMs' Fisher vectors.

By turns: solve the one-vs-rest SVMs exactly for the present mixture G; move the mixture along the
gradient of their loss, by a line search. The objective never rises:

    L(w, G) = 1/2 |w|^2 + C/n sum_i max(0, 1 - y_i <w, phi(X_i; G)>)^2      (eq. 4)
    sum_l L(w_l, G)                                                         (eq. 6)

One departure: a mean moves along its gradient in units of its standard deviation. The paper's own
direction depends on the unit of the descriptors.

Paper: Sydorov, Sakurada and Lampert, "Deep Fisher Kernels - End to End Learning of the Fisher
Kernel GMM Parameters", CVPR 2014.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from timm_fisher import PooledModel
from timm_fisher.heads.gmm_fisher import GMMFisher, Mixture
from timm_fisher.numerics.linalg import power_l2

C_GRID = (10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4)
FIRST_STEP = 0.1  # largest change of a log weight, of a mean in stds, or of a log std
TRIALS = 20  # of one line search
RISE = 1e-5  # of the objective, relative, that rounding explains
BATCH = 64  # images that the mixture sees at a time


@dataclass
class LabelledDescriptors:
    """The splits 'train', 'val' and 'test' of a data set.

    Attributes:
        y: reduced descriptors `[n, N, D]` of each split.
        signs: +1 or -1 for each class, `[n, classes]`, float64; see `one_vs_rest`.
        classes: their names.
    """

    y: dict[str, Tensor]
    signs: dict[str, Tensor]
    classes: list[str]


def one_vs_rest(labels: np.ndarray, classes: Sequence[str], split: str) -> Tensor:
    """+1 for the class of an image and -1 for the others, `[n, classes]`, float64. ValueError,
    which names the split, if there is no image of some class."""
    missing = [name for index, name in enumerate(classes) if index not in labels]
    if missing:
        raise ValueError(f"The split '{split}' has no images of {missing}.")
    return torch.as_tensor(np.where(labels[:, None] == range(len(classes)), 1.0, -1.0))


class FisherKernel:
    """The mixture of a fitted head on descriptors `[n, N, D]` that are reduced already.

    Args:
        head: is copied.
        bias: append a constant 1 to the Fisher vectors.
    """

    def __init__(self, head: GMMFisher, *, bias: bool) -> None:
        self.head = copy.deepcopy(head).requires_grad_(False)
        self.head.reduce = torch.nn.Identity()  # type: ignore[assignment]
        self.head.l2_descriptors = self.head.normalize = False
        self.bias = bias
        self.set(self.get())

    def get(self) -> Mixture:
        """A copy of the mixture."""
        return Mixture(*(parameter.clone() for parameter in self._mixture))

    def set(self, mixture: Mixture) -> None:
        """Take over a mixture; its weights are normalised, standard deviations kept off zero."""
        for parameter, value in zip(self._mixture, mixture, strict=True):
            parameter.copy_(value.detach())
        self.head.log_weights.copy_(self.head.log_weights.log_softmax(0))
        self.head.project_()

    @property
    def _mixture(self) -> Mixture:
        return Mixture(self.head.log_weights, self.head.means, self.head.log_stds)

    def phi(self, y: Tensor) -> Tensor:
        """Fisher vectors as the SVMs see them, `[n, features]`."""
        return self.finish(self.psi(y))

    def psi(self, y: Tensor) -> Tensor:
        """Fisher vectors `[n, 2KD]` before eq. 3."""
        return torch.cat([self.head(part) for part in torch.split(y, BATCH)])

    def finish(self, psi: Tensor) -> Tensor:
        """Eq. 3, and the constant if there is one."""
        phi = power_l2(psi)
        return torch.cat([phi, torch.ones_like(phi[:, :1])], 1) if self.bias else phi

    def loss(self, psi: Tensor, weights: Tensor, signs: Tensor) -> Tensor:
        """Squared hinge loss, float64, summed over images and tasks, of SVMs `[features, tasks]`
        for psi `[n, 2KD]` and signs `[n, tasks]`."""
        margins = signs * (self.finish(psi).double() @ weights)
        return (1 - margins).clamp_min(0).square().sum(0).sum()

    def gradient(
        self, y: Tensor, psi: Tensor, weights: Tensor, signs: Tensor, sample: Tensor | None = None
    ) -> Mixture:
        """Gradient of `loss` with respect to log weights, means and log stds, for descriptors y
        `[n, N, D]` and their psi, or for a sample of them, indices `[n, M]`.

        psi is a mean over descriptors: the chain rule beyond it has the right expectation on a
        random sample, if the derivative of the loss by psi is that of all.
        """
        psi = psi.detach().requires_grad_()
        (by_psi,) = torch.autograd.grad(self.loss(psi, weights, signs), psi)
        if sample is not None:
            y = y.gather(1, sample[..., None].expand(-1, -1, y.shape[2]))
        mixture = [parameter.requires_grad_() for parameter in self._mixture]
        gradient = [torch.zeros_like(parameter) for parameter in mixture]
        for x, factor in zip(torch.split(y, BATCH), torch.split(by_psi, BATCH), strict=True):
            parts = torch.autograd.grad(self.head(x), mixture, factor)
            for total, part in zip(gradient, parts, strict=True):
                total += part
        self.head.requires_grad_(False)
        return Mixture(*gradient)


def solve_svms(
    phi: Tensor, signs: Tensor, costs: Sequence[float], start: Tensor | None = None
) -> Tensor:
    """The minimisers `[features, tasks]` of eq. 4 for Fisher vectors phi `[n, features]`, signs
    `[n, tasks]` and the C of each task, float64. Without a bias, but for a constant among the
    features, which counts in the norm of w. A start of their shape, near them, saves time.

    A minimiser is sum_i a_i phi_i. Time and memory are those of an `n x n` matrix or two: little
    where there are fewer images than features. Of unit vectors, a C beyond 1e10 loses digits.

    Raises:
        ValueError: phi or start is not finite.
    """
    phi = phi.double()
    if start is None:
        start = phi.new_zeros(phi.shape[1], signs.shape[1])
    signs, start = signs.to(phi), start.to(phi)
    if not (phi.isfinite().all() and start.isfinite().all()):
        raise ValueError('The Fisher vectors, or the SVMs to start from, are not finite.')
    gram, scores = phi @ phi.T, phi @ start
    weights = []
    for sign, score, cost in zip(signs.T, scores.T, costs, strict=True):
        weights.append(phi.T @ _solve_svm(gram, sign, len(phi) / (2 * cost), score))
    return torch.stack(weights, 1)


def _solve_svm(gram: Tensor, signs: Tensor, ridge: float, scores: Tensor) -> Tensor:
    """The minimiser `[n]` of ridge a' gram a + sum_i max(0, 1 - y_i (gram a)_i)^2.

    It is quadratic as long as the same images are inside the margin. Newton's method solves for
    those that are, at first by the scores `[n]`, until they stay the same. See Keerthi and DeCoste,
    "A modified finite Newton method for fast solution of large scale linear SVMs", JMLR 2005.
    """
    a, inside, least = torch.zeros_like(signs), signs * scores < 1, math.inf
    while True:
        rows = inside.nonzero()[:, 0]
        system = gram[rows][:, rows]
        system.diagonal().add_(ridge)
        solution = torch.cholesky_solve(signs[rows, None], torch.linalg.cholesky(system))
        full = torch.zeros_like(a).index_copy(0, rows, solution[:, 0])
        full_scores = gram @ full
        # Full steps alone could go round in circles.
        for share in (0.5**k for k in range(30)):
            shorter, shorter_scores = a.lerp(full, share), scores.lerp(full_scores, share)
            hinge = (1 - signs * shorter_scores).clamp_min(0)
            loss = (ridge * shorter @ shorter_scores + hinge @ hinge).item()
            if loss < least:
                break
        else:
            return a
        a, scores, least = shorter, shorter_scores, loss
        before, inside = inside, signs * scores < 1
        if share == 1 and inside.equal(before):
            return a


def average_precision(scores: Tensor, signs: Tensor) -> np.ndarray:
    """Of each task, `[tasks]`, for decision values and signs `[n, tasks]`."""
    precision = average_precision_score(signs.cpu() > 0, scores.cpu(), average=None)
    return np.atleast_1d(precision)  # a number of one task


def choose_costs(
    kernel: FisherKernel, data: LabelledDescriptors, *, shared: bool, grid: Sequence[float] = C_GRID
) -> list[float]:
    """C of each class, or with `shared` one for all: of the best average precision, or mean of it,
    on the validation split, by the kernel's mixture; the first of equals."""
    count = len(data.classes)
    train, val = kernel.phi(data.y['train']), kernel.phi(data.y['val'])
    rows = []
    for cost in grid:
        w = solve_svms(train, data.signs['train'], [cost] * count)
        precision = average_precision(val.double() @ w, data.signs['val'])
        rows.append([precision.mean()] * count if shared else precision)
    return [grid[i] for i in np.argmax(rows, 0)]


def learn(
    kernel: FisherKernel,
    data: LabelledDescriptors,
    task: Sequence[int],
    cost: float,
    *,
    iterations: int = 30,
    tolerance: float = 1e-4,
    descriptor_fraction: float = 0.1,
    seed: int = 0,
) -> Iterator[tuple[dict[str, Any], Mixture]]:
    """Algorithm 1, from the kernel's mixture, which is moved.

    Args:
        kernel: shared by all classes of the task.
        data: whose test split is not read.
        task: indices of the classes.
        cost: C of eq. 4.
        iterations: steps of the mixture, at most.
        tolerance: stop when an iteration lowers the objective by less than this share.
        descriptor_fraction: share of each image's descriptors that the gradient is computed from.
        seed: of their choice.

    Yields:
        For each iteration its mixture, and 'iteration', from 0, 'objective', 'val_ap' (mean average
        precision on the validation split), 'seconds', and but for the last one 'step' and
        'objective_after_step'.

    Raises:
        FloatingPointError: the objective rose.
    """
    y, signs = data.y['train'], data.signs['train'][:, task]
    generator = torch.Generator().manual_seed(seed)
    previous, objective, step, w = math.inf, math.inf, None, None
    for iteration in range(iterations + 1):
        start, mixture = time.perf_counter(), kernel.get()
        psi = kernel.psi(y)
        w = solve_svms(kernel.finish(psi), signs, [cost] * len(task), w)

        def loss(w: Tensor = w) -> float:
            return kernel.loss(kernel.psi(y), w, signs).item()

        norm, before = 0.5 * w.square().sum().item(), kernel.loss(psi, w, signs).item()
        last, objective = objective, norm + cost / len(y) * before
        val = average_precision(kernel.phi(data.y['val']).double() @ w, data.signs['val'][:, task])
        row = {'iteration': iteration, 'objective': objective, 'val_ap': val.mean()}
        if objective > previous * (1 + RISE):
            names = [data.classes[c] for c in task]
            raise FloatingPointError(
                f'The objective of {names} rose from {previous} to {objective} in iteration '
                f'{iteration}: the SVM was not solved to the end. Try a smaller C.'
            )
        if iteration < iterations and last - objective >= tolerance * objective:
            number = math.ceil(descriptor_fraction * y.shape[1])
            order = torch.rand(y.shape[:2], generator=generator).argsort(1).to(y.device)
            # Where a sample leads uphill, all descriptors have the last word.
            for sample in (order[:, :number], None):
                gradient = kernel.gradient(y, psi, w, signs, sample)
                moved, after = line_search(kernel, gradient, loss, before, step)
                if moved:
                    break
            step, previous = moved or step, norm + cost / len(y) * after
            row |= {'step': moved, 'objective_after_step': previous}
        yield row | {'seconds': round(time.perf_counter() - start, 2)}, mixture
        if not row.get('step'):
            return


def line_search(
    kernel: FisherKernel,
    gradient: Mixture,
    loss: Callable[[], float],
    before: float,
    step: float | None,
) -> tuple[float, float]:
    """Move the kernel's mixture along the negative gradient to the lowest loss that is tried. The
    step is doubled while the loss falls, or divided until it does; a parabola through the lowest
    point and its neighbours then gives one more.

    Args:
        kernel: whose mixture is moved.
        gradient: from `kernel.gradient`.
        loss: of the kernel's present mixture, the SVMs fixed; `before` is its value now.
        step: the last one; None for the first time.

    Returns:
        The step and the loss there; 0, and the old mixture, where no step lowers the loss.
    """
    old = kernel.get()
    stds = torch.exp(old.log_stds)
    direction = gradient._replace(means=gradient.means * stds.square())
    if step is None:
        relative = gradient._replace(means=gradient.means * stds)
        step = FIRST_STEP / max(1e-30, *(part.abs().max().item() for part in relative))
    losses = {0.0: before}

    def place(eta: float) -> None:
        kernel.set(Mixture(*(a - eta * b for a, b in zip(old, direction, strict=True))))

    def attempt(eta: float) -> None:
        place(eta)
        value = loss()
        losses[eta] = value if math.isfinite(value) else math.inf

    attempt(step)
    if losses[step] < before:
        while losses[step] == min(losses.values()) and len(losses) < TRIALS:
            step *= 2
            attempt(step)
    else:
        while losses[step] >= before and len(losses) < TRIALS:
            step /= 4
            attempt(step)
    steps = sorted(losses)
    i = steps.index(min(steps, key=losses.__getitem__))
    near = steps[i - 1 : i + 2]
    if 0 < i < len(steps) - 1 and math.isfinite(losses[near[2]]):
        a, b, _ = np.polyfit(near, [losses[eta] for eta in near], 2)
        attempt(float(-b / (2 * a)))
    best = min(losses, key=losses.__getitem__)
    place(best)
    return best, losses[best]


@torch.no_grad()
def to_classifier(model: PooledModel, mixture: Mixture, weights: Tensor) -> None:
    """Give the `gmm_fisher` model that reduced the descriptors this mixture, and a classifier whose
    logits are the decision values of SVMs `[features, tasks]`, with a constant's weights or
    without."""
    for name, value in mixture._asdict().items():
        getattr(model.head, name).copy_(value)
    model.reset_classifier(weights.shape[1])
    classifier = cast(torch.nn.Linear, model.classifier)
    classifier.weight.copy_(weights[: model.head.out_features].T)
    classifier.bias.copy_(weights[model.head.out_features :].sum(0))  # 0 of no rows
