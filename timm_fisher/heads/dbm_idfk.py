"""Improved deep Fisher kernel of a deep Boltzmann machine (DBM).

    v        visible units in [0, 1]: the mean of the descriptors, squashed
    mu1, mu2 mean-field posteriors of two layers of binary hidden units
    S | Q    v mu1^T - <v h1^T>_model | mu1 mu2^T - <h1 h2^T>_model: the score (eq. 3)
    phi      each entry mapped to [0, 1] by the training set's range, then unit length
    z        S^(-1/2) U^T phi: F = U S U^T is the covariance of phi (eqs. 7, 8)

Where the paper is silent or wrong, and what is done here:
- Its energy (eq. 1) has neither biases nor a minus sign. Here it is that of Salakhutdinov and
  Hinton (AISTATS 2009), `-v W1 h1 - h1 W2 h2 - a v - b1 h1 - b2 h2`. The score is that of the
  weights, as in the paper.
- Mean field is not the true posterior of two layers: S | Q is the gradient of the variational
  bound; of an RBM it is that of the log-likelihood itself.
- The model's expectations come from persistent chains. They are constants, which the map to [0, 1]
  takes out: only `score` shows them.
- The paper forms F, and decomposes it "exactly". F is never formed here: randomised subspace
  iterations over the scores of one chunk of images after the other give its leading axes.
- Small eigenvalues are noise, and their inverse explodes. `rank` drops them, `ridge` bounds them.
- Training is silent there: persistent chains with centred gradients (Montavon and Mueller 2012),
  which do not depend on which state of a unit is called 1, after a start layer by layer.

Without the whitening the same is the deep Fisher kernel (DFK), and with one layer of hidden units
the Fisher kernel of a restricted Boltzmann machine (FK), which the paper compares with.

Paper: Ahmed, Azim, Early and Ramchurn, "Revisiting Deep Fisher Vectors: Using Fisher Information to
Improve Object Classification"; equations are numbered as there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from timm_fisher.fitting import check_finite, leading_axes
from timm_fisher.head import PoolingHead
from timm_fisher.linalg import at_least_float32, without_autocast
from timm_fisher.stream import DescriptorStream

FIT_IMAGES = 2**16  # that the fit keeps, one vector each
CHUNK = 1024  # images whose scores are held at a time

BATCH = 100  # images per step of the training, or fewer:
STEPS = 50  # per epoch, at least, as long as a batch holds 10 images
CHAINS = 100  # persistent
GIBBS_SWEEPS = 5  # of the chains per step
MOMENTUM = 0.9
WEIGHT_DECAY = 2e-4


class DBMFisher(PoolingHead):
    """Improved Fisher vector of a deep Boltzmann machine over the mean descriptor.

    Args:
        in_features: channels C of one descriptor.
        hidden: units of the hidden layers: two for a DBM, one for an RBM.
        rank: r, leading axes of the Fisher information that are kept; None keeps all.
        ridge: added to the variances along the axes, relative to the largest.
        mean_field_steps: of the posteriors of two layers.
        whiten: use the Fisher information (IDFK); without it (DFK, FK) phi is the output.
        squash: visible units are the logistic function of standardised channels, with statistics
            from `fit`. Without it the descriptors must lie in [0, 1], such as binary pixels.
        epochs: of training in `fit`, for each layer alone and then for all of them.
        learning_rate: at their start; it falls linearly to zero.
        seed: of the training.

    Output: `[B, r]`; without whitening `[B, C * L1 + L1 * L2]`, or `[B, C * L1]` of an RBM.

    Raises:
        ValueError: not one or two hidden layers, a size or a number of steps below 1, or a negative
            ridge.
    """

    low: Tensor
    high: Tensor
    axes: Tensor
    variances: Tensor
    visible_bias: Tensor
    model_moments: Tensor
    centre: Tensor
    deviation: Tensor

    def __init__(
        self,
        in_features: int,
        *,
        hidden: Sequence[int] = (40, 80),
        rank: int | None = 512,
        ridge: float = 0.01,
        mean_field_steps: int = 10,
        whiten: bool = True,
        squash: bool = True,
        epochs: int = 50,
        learning_rate: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        positive = [*hidden, 1 if rank is None else rank, mean_field_steps, epochs]
        if len(hidden) not in (1, 2) or min(positive) < 1 or ridge < 0 or learning_rate <= 0:
            raise ValueError(
                'dbm_idfk needs one or two hidden layers of 1 unit or more, rank >= 1, ridge >= 0, '
                f'mean_field_steps >= 1, epochs >= 1 and learning_rate > 0, got {hidden=}, '
                f'{rank=}, {ridge=}, {mean_field_steps=}, {epochs=}, {learning_rate=}.'
            )
        self.in_features = in_features
        self.hidden = list(hidden)
        self.ridge = ridge
        self.mean_field_steps = mean_field_steps
        self.whiten = whiten
        self.squash = squash
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.seed = seed
        sizes = [in_features, *hidden]
        self.score_features = sum(m * n for m, n in pairwise(sizes))
        r = self.score_features if rank is None else min(rank, self.score_features)
        self.out_features = r if whiten else self.score_features

        pairs = pairwise(sizes)
        self.weights = nn.ParameterList(torch.randn(m, n) / (m + n) ** 0.5 for m, n in pairs)
        self.biases = nn.ParameterList(torch.zeros(n) for n in hidden)
        # The posteriors do not depend on it, so no gradient would reach it.
        self.register_buffer('visible_bias', torch.zeros(in_features))
        self.register_buffer('model_moments', torch.zeros(self.score_features))
        if squash:
            self.register_buffer('centre', torch.zeros(in_features))
            self.register_buffer('deviation', torch.ones(in_features))
        self.register_buffer('low', torch.zeros(self.score_features))
        self.register_buffer('high', torch.ones(self.score_features))
        if whiten:
            axes = torch.randn(self.score_features, r) / self.score_features**0.5
            self.register_buffer('axes', axes)
            self.register_buffer('variances', torch.ones(r))

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            phi = self.normalized_score(x)
            return (self._improve(phi) if self.whiten else phi).to(x.dtype)

    def score(self, x: Tensor) -> Tensor:
        """The score `[B, C * L1 + L1 * L2]`, not normalised, S before Q, each row by row, of
        descriptors `[B, N, C]`; float32 or better (eq. 3)."""
        with without_autocast(x):
            moments = self._moments(self._visible(x))
            return moments - self.model_moments.to(moments.dtype)

    def normalized_score(self, x: Tensor) -> Tensor:
        """phi `[B, C * L1 + L1 * L2]` of descriptors `[B, N, C]`; float32 or better."""
        with without_autocast(x):
            return self._normalize(self._moments(self._visible(x)))

    def posteriors(self, x: Tensor) -> list[Tensor]:
        """Mean-field posteriors `[B, L]` of each hidden layer, for descriptors `[B, N, C]`."""
        with without_autocast(x):
            return self._posteriors(self._visible(x))

    @torch.no_grad()
    def fit(self, stream: DescriptorStream) -> None:
        """Train the DBM, take the range of the scores, then the axes of their covariance.

        Raises:
            ValueError: descriptors that are not finite; or outside [0, 1] without `squash`.
        """
        rows = stream.sample_images(FIT_IMAGES, mean_descriptor)
        check_finite(rows)
        if self.squash:
            deviation, centre = torch.std_mean(rows.double(), 0, correction=0)
            self.centre.copy_(centre)
            least = torch.finfo(rows.dtype).eps * centre.abs()  # below it there is only rounding
            self.deviation.copy_(torch.where(deviation > least, deviation, 1.0))
        elif rows.amin() < 0 or rows.amax() > 1:
            raise ValueError(
                'dbm_idfk with squash=False takes descriptors in [0, 1]; they lie in '
                f'[{rows.amin():.3g}, {rows.amax():.3g}]. Leave squash at True.'
            )
        v = self._visible(rows[:, None])
        trained = train_machine(v, self.hidden, self.epochs, self.learning_rate, seed=self.seed)
        self.visible_bias.copy_(trained.biases[0])
        for own, found in zip(self.weights, trained.weights, strict=True):
            own.copy_(found)
        for own, found in zip(self.biases, trained.biases[1:], strict=True):
            own.copy_(found)
        self.model_moments.copy_(trained.model_moments())

        low, high = self._moments(v[:1])[0], self._moments(v[:1])[0]
        for chunk in _chunks(v, CHUNK):
            moments = self._moments(chunk)
            low, high = torch.minimum(low, moments.amin(0)), torch.maximum(high, moments.amax(0))
        self.low.copy_(low)
        self.high.copy_(high)
        if self.whiten:
            axes, variances = leading_axes(
                lambda: (self._normalize(self._moments(chunk)) for chunk in _chunks(v, CHUNK)),
                self.out_features,
            )
            self.axes.copy_(axes)
            self.variances.copy_(variances)

    def extra_repr(self) -> str:
        return (
            f'{self.in_features} x {" x ".join(map(str, self.hidden))} -> {self.out_features}, '
            f'whiten={self.whiten}, ridge={self.ridge}, squash={self.squash}'
        )

    def _visible(self, x: Tensor) -> Tensor:
        """v `[B, C]` of descriptors `[B, N, C]`, float32 or better."""
        v = mean_descriptor(x)
        if self.squash:
            v = torch.sigmoid((v - self.centre.to(v.dtype)) / self.deviation.to(v.dtype))
        return v

    def _posteriors(self, v: Tensor) -> list[Tensor]:
        weights = [weight.to(v.dtype) for weight in self.weights]
        biases = [bias.to(v.dtype) for bias in self.biases]
        return mean_field(v, weights, biases, self.mean_field_steps)

    def _moments(self, v: Tensor) -> Tensor:
        """`v mu1^T | mu1 mu2^T` `[B, C * L1 + L1 * L2]`."""
        layers = [v, *self._posteriors(v)]
        return torch.cat(
            [
                (below[:, :, None] * above[:, None, :]).flatten(1)
                for below, above in pairwise(layers)
            ],
            1,
        )

    def _normalize(self, moments: Tensor) -> Tensor:
        """phi: to [0, 1] entry by entry, then to unit length."""
        low, high = self.low.to(moments.dtype), self.high.to(moments.dtype)
        # What varies by no more than rounding is nothing to stretch to [0, 1].
        varies = high - low > 1e-5 * high.abs()
        phi = (moments - low) / torch.where(varies, high - low, torch.inf)
        length = torch.linalg.vector_norm(phi.detach(), dim=1, keepdim=True)
        phi = phi / torch.where(length > 0, length, 1.0)
        # The gradient of the length, where it is not zero.
        return cast(Tensor, phi / torch.linalg.vector_norm(phi, dim=1, keepdim=True).clamp_min(0.5))

    def _improve(self, phi: Tensor) -> Tensor:
        variances = self.variances.to(phi.dtype)
        largest = variances.amax()
        variances = variances + self.ridge * largest
        # Along the remaining axes the training set did not vary at all.
        kept = variances > torch.finfo(self.variances.dtype).eps * largest
        inverse_root = torch.where(kept, variances, torch.inf).rsqrt()
        return phi @ self.axes.to(phi.dtype) * inverse_root


def mean_descriptor(x: Tensor) -> Tensor:
    """`[B, N, C]` -> `[B, C]`, float32 or better."""
    return x.to(at_least_float32(x.dtype)).mean(1)


def _chunks(rows: Tensor, size: int) -> Iterator[Tensor]:
    return (rows[i : i + size] for i in range(0, len(rows), size))


def mean_field(
    v: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], steps: int
) -> list[Tensor]:
    """Posteriors of the hidden layers that maximise the variational bound, by turns.

    Args:
        v: visible units `[B, C]`.
        weights: `[C, L1]`, and `[L1, L2]` if there is a second layer.
        biases: `[L1]`, and `[L2]`.
        steps: rounds; the posterior of a single layer is exact.

    Returns:
        `[B, L1]`, and `[B, L2]`.

    Source: Salakhutdinov and Hinton, AISTATS 2009, eqs. 8 and 9; start: bottom-up, with doubled
    weights in place of the layer above.
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
        like = dict(dtype=v.dtype, device=v.device)
        self.generator, self.up, self.down = generator, up, down
        self.weights = [
            0.01 * torch.randn(m, n, generator=generator, **like)  # type: ignore[call-overload]
            for m, n in pairwise(sizes)
        ]
        self.biases = [v.mean(0).clamp(0.01, 0.99).logit()]
        self.biases += [torch.zeros(n, **like) for n in sizes[1:]]  # type: ignore[call-overload]
        self.states = [self._draw(bias.expand(CHAINS, -1)) for bias in self.biases]
        self.centres = [v.mean(0), *(torch.full_like(bias, 0.5) for bias in self.biases[1:])]

    def train(self, v: Tensor, epochs: int, learning_rate: float) -> None:
        """Ascend the variational bound by persistent contrastive divergence, on rows `[n, C]`."""
        slopes = [torch.zeros_like(p) for p in (*self.weights, *self.biases)]
        size = min(BATCH, max(10, len(v) // STEPS))
        total = epochs * -(-len(v) // size)
        for step, batch in enumerate(self._batches(v, size, epochs)):
            data = [batch, *self.posteriors(batch)]
            model = self.sample(GIBBS_SWEEPS)
            for centre, layer in zip(self.centres[1:], data[1:], strict=True):
                centre.lerp_(layer.mean(0), 0.05)
            rate = learning_rate * (1 - step / total)
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
            for found, below, above in zip(sums, layers, layers[1:], strict=False):
                found.addmm_(below.T, above, alpha=1 / (sweeps * CHAINS))
        return torch.cat([found.flatten() for found in sums])

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

    def _batches(self, v: Tensor, size: int, epochs: int) -> Iterator[Tensor]:
        for _ in range(epochs):
            order = torch.randperm(len(v), generator=self.generator, device=v.device)
            yield from (v[rows] for rows in _chunks(order, size))

    def _input(self, layer: int) -> Tensor:
        """What the units of a layer of the chains get from their neighbours."""
        total = self.biases[layer]
        if layer > 0:
            total = total + self.up * (self.states[layer - 1] @ self.weights[layer - 1])
        if layer + 1 < len(self.states):
            total = total + self.down * (self.states[layer + 1] @ self.weights[layer].T)
        return total

    def _draw(self, drive: Tensor) -> Tensor:
        chance = torch.rand(
            drive.shape, generator=self.generator, dtype=drive.dtype, device=drive.device
        )
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
        learning_rate: of each training, at its start.
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
        machine.biases = [*lower.biases, upper.biases[1]]
        machine.centres = [*lower.centres, upper.centres[1]]
    machine.train(v, epochs, learning_rate)
    return machine
