"""Boltzmann machines of one or two hidden layers: mean field, and training.

Centred gradients of persistent contrastive divergence, after a start layer by layer.

Sources: Salakhutdinov and Hinton, "Deep Boltzmann Machines", AISTATS 2009; Montavon and Mueller,
"Deep Boltzmann Machines and the Centering Trick", 2012.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

BATCH = 100  # images per step of the training, or fewer:
STEPS = 50  # per epoch, at least, as long as a batch holds 10 images
CHAINS = 100  # persistent
GIBBS_SWEEPS = 5  # of the chains per step
MOMENTUM = 0.9
WEIGHT_DECAY = 2e-4


def mean_field(
    v: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], steps: int
) -> list[Tensor]:
    """Posteriors `[B, L1]`, and `[B, L2]`, of the hidden layers that maximise the variational
    bound for visible units `[B, C]`, by turns; that of a single layer is exact.

    The start is bottom-up, with doubled weights in place of the layer above.

    Source: Salakhutdinov and Hinton, AISTATS 2009, eqs. 8 and 9.
    """
    drive = v @ weights[0]
    if len(weights) == 1:
        return [torch.sigmoid(drive + biases[0])]
    below = torch.sigmoid(2 * drive + biases[0])
    above = torch.sigmoid(below @ weights[1] + biases[1])
    for _ in range(steps):
        below = torch.sigmoid(drive + above @ weights[1].T + biases[0])
        above = torch.sigmoid(below @ weights[1] + biases[1])
    return [below, above]


class Machine:
    """A Boltzmann machine of layers, with persistent chains, while it is trained.

    Args:
        sizes: units of each layer, visible ones first.
        v: training rows `[n, C]`: their mean starts the visible bias.
        generator: of everything random, on the device of `v`.
        up: factor on what a layer gets from below.
        down: factor on what it gets from above.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        v: Tensor,
        generator: torch.Generator,
        *,
        up: float = 1.0,
        down: float = 1.0,
    ) -> None:
        self.generator, self.up, self.down = generator, up, down
        self.weights = [
            0.01 * torch.randn(m, n, generator=generator, dtype=v.dtype, device=v.device)
            for m, n in pairwise(sizes)
        ]
        self.biases = [v.mean(0).clamp(0.01, 0.99).logit(), *(v.new_zeros(n) for n in sizes[1:])]
        self.states = [self._draw(bias.expand(CHAINS, -1)) for bias in self.biases]
        self.centres = [v.mean(0), *(torch.full_like(bias, 0.5) for bias in self.biases[1:])]

    def train(self, v: Tensor, epochs: int, learning_rate: float) -> None:
        """Ascend the variational bound, on rows `[n, C]`; the rate falls linearly to zero."""
        slopes = [torch.zeros_like(p) for p in (*self.weights, *self.biases)]
        size = min(BATCH, max(10, len(v) // STEPS), len(v))
        number = len(v) // size  # a few rows left over would count as much as a whole batch
        for step in range(epochs * number):
            if step % number == 0:
                order = torch.randperm(len(v), generator=self.generator, device=v.device)
            batch = v[order[step % number * size :][:size]]
            data = [batch, *self.posteriors(batch)]
            model = self.sample(GIBBS_SWEEPS)
            for centre, layer in zip(self.centres[1:], data[1:], strict=True):
                centre.lerp_(layer.mean(0), 0.05)
            rate = learning_rate * (1 - step / (epochs * number))
            for slope, gradient in zip(slopes, self._gradients(data, model), strict=True):
                slope.mul_(MOMENTUM).add_(gradient)
            for parameter, slope in zip((*self.weights, *self.biases), slopes, strict=True):
                parameter.add_(slope, alpha=rate)

    def posteriors(self, v: Tensor) -> list[Tensor]:
        """Mean field of each hidden layer, given rows `[B, C]`."""
        weights = [self.up * self.weights[0], *self.weights[1:]]
        return mean_field(v, weights, self.biases[1:], steps=5)

    def sample(self, sweeps: int) -> list[Tensor]:
        """Sweep the chains; states `[CHAINS, L]` of each layer, of the odd ones the probability."""
        for _ in range(sweeps):
            for first in (1, 0):
                for layer in range(first, len(self.states), 2):
                    self.states[layer] = self._draw(self._input(layer))
        return [
            torch.sigmoid(self._input(layer)) if layer % 2 else state
            for layer, state in enumerate(self.states)
        ]

    def model_moments(self, sweeps: int = 100) -> Tensor:
        """Expectations of `v h1^T | h1 h2^T` `[C * L1 + L1 * L2]`, over the chains and time."""
        sums = [torch.zeros_like(weight) for weight in self.weights]
        for _ in range(sweeps):
            layers = self.sample(1)
            for moment, below, above in zip(sums, layers, layers[1:], strict=False):
                moment.addmm_(below.T, above, alpha=1 / (sweeps * CHAINS))
        return torch.cat([moment.flatten() for moment in sums])

    def _gradients(self, data: list[Tensor], model: list[Tensor]) -> Iterator[Tensor]:
        """Centred: first of the weights, then of the biases."""
        steps = [d.mean(0) - m.mean(0) for d, m in zip(data, model, strict=True)]
        for j, weight in enumerate(self.weights):
            below, above = self.centres[j : j + 2]
            slope = (data[j] - below).T @ (data[j + 1] - above) / len(data[j])
            slope -= (model[j] - below).T @ (model[j + 1] - above) / CHAINS
            slope -= WEIGHT_DECAY * weight
            steps[j] = steps[j] - self.down * slope @ above
            steps[j + 1] = steps[j + 1] - self.up * below @ slope
            yield slope
        yield from steps

    def _input(self, layer: int) -> Tensor:
        """What the units of a layer of the chains get from their neighbours."""
        total = self.biases[layer]
        if layer > 0:
            total = total + self.up * (self.states[layer - 1] @ self.weights[layer - 1])
        if layer + 1 < len(self.states):
            total = total + self.down * (self.states[layer + 1] @ self.weights[layer].T)
        return total

    def _draw(self, drive: Tensor) -> Tensor:
        chance = torch.empty_like(drive).uniform_(generator=self.generator)
        return (chance < torch.sigmoid(drive)).to(drive.dtype)


def train_machine(
    v: Tensor, hidden: Sequence[int], epochs: int, learning_rate: float, *, seed: int
) -> Machine:
    """An RBM, or a DBM of two hidden layers: each layer alone first, as an RBM whose input from the
    side that is missing is doubled, then both together.

    Args:
        v: rows `[n, C]` in [0, 1].
        hidden: units of one or two layers.
        epochs: of each training.
        learning_rate: at the start of each.
        seed: of everything random.

    Source: Salakhutdinov and Hinton, AISTATS 2009, sections 2.2 and 3.
    """
    generator = torch.Generator(v.device).manual_seed(seed)
    machine = Machine([v.shape[1], *hidden], v, generator)
    if len(hidden) == 2:
        lower = Machine([v.shape[1], hidden[0]], v, generator, up=2.0)
        lower.train(v, epochs, learning_rate)
        below = lower.posteriors(v)[0]
        upper = Machine(hidden, below, generator, down=2.0)
        upper.train(below, epochs, learning_rate)
        machine.weights = [*lower.weights, *upper.weights]
        machine.centres = [*lower.centres, upper.centres[1]]
        # The layer above takes the place of the doubled input. Around the centres that changes
        # nothing; the bias takes up the difference of what the two sides give at the centres.
        visible, _, above = machine.centres
        middle = lower.biases[1] + visible @ lower.weights[0] - upper.weights[0] @ above
        machine.biases = [lower.biases[0], middle, upper.biases[1]]
    machine.train(v, epochs, learning_rate)
    return machine
