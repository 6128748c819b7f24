"""Deep GMM Fisher vector.

    y   = R x / |x| + r                              reduction C -> D, started from PCA
    g_k = posterior of component k given y           mixture of K Gaussians, diagonal sigma
    F_k = 1/sqrt(pi_k)   1/N sum g_k (y - mu_k) / sigma_k                   (eq. 1)
    G_k = 1/sqrt(2 pi_k) 1/N sum g_k ((y - mu_k)^2 / sigma_k^2 - 1)         (eq. 2)
    z   = power_l2(F_1 ... F_K, G_1 ... G_K)                                (eq. 3)

The sums over descriptors need only `s0 = sum g`, `s1 = sum g y` and `s2 = sum g y^2`, so that all
of it is four matrix products: two for the posteriors, two for s1 and s2.

Parameters are log pi (up to a constant), mu and log sigma, so that no gradient step leaves the
model. sigma is the standard deviation, as in eqs. 1 and 2; section 2.1 of the paper once writes it
for the variance. Eq. 3 divides by the square root of the L1 norm, which is the L2 norm of the
signed square roots.

`fit` is PCA, then EM: from k-means on a sample, then on over the whole stream. The paper's own
training is Algorithm 1, `recipes/papers/deep_fisher_svm.py`; it can be trained end to end, too.

Paper: Sydorov, Sakurada and Lampert, "Deep Fisher Kernels - End to End Learning of the Fisher
Kernel GMM Parameters", CVPR 2014.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_fisher.fitting.stream import DescriptorStream
from timm_fisher.head import MOST_FEATURES, PoolingHead, check_range
from timm_fisher.numerics.clustering import kmeans, start_reduction
from timm_fisher.numerics.linalg import Linear, at_least_float32, power_l2, precise, unit_length

FIT_SAMPLE = 50_000  # descriptors that PCA and the first rounds of EM see
STARTS, START_ROWS, START_ROUNDS = 4, 10_000, 20  # the best start is chosen on some of them
SAMPLE_ROUNDS, STREAM_ROUNDS = 100, 10  # of EM, at most
TOLERANCE = 1e-5  # relative gain of the log-likelihood at which EM stops
VARIANCE_FLOOR = 1e-3  # relative to the variance of all descriptors, in each dimension
LOG_WEIGHT_FLOOR = math.log(1e-10)  # a component below it is dead; 1/sqrt(pi) stays finite


class GMMFisher(PoolingHead):
    """Fisher vector of a Gaussian mixture whose parameters can be trained.

    Args:
        in_features: channels C of one descriptor.
        reduce_dim: D, dimensions after the reduction, at most C; None keeps C.
        components: K, Gaussians of the mixture.
        l2_descriptors: L2-normalise each descriptor before the reduction (table 1).
        normalize: end with `power_l2`.

    Output: `[B, 2 K D]`: F of all components, then G.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        in_features: int,
        *,
        reduce_dim: int | None = 64,
        components: int = 32,
        l2_descriptors: bool = True,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        check_range(
            'gmm_fisher',
            reduce_dim=(reduce_dim, 1, MOST_FEATURES, None),
            components=(components, 1, MOST_FEATURES),
        )
        d = min(reduce_dim or in_features, in_features)
        self.in_features = in_features
        self.out_features = 2 * components * d
        self.components = components
        self.l2_descriptors = l2_descriptors
        self.normalize = normalize

        self.reduce = Linear(in_features, d)
        nn.init.orthogonal_(self.reduce.weight)
        nn.init.zeros_(self.reduce.bias)
        # As after a fit: descriptors of unit mean squared length.
        self.log_weights = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(torch.randn(components, d) / math.sqrt(d))
        self.log_stds = nn.Parameter(torch.full((components, d), -math.log(d) / 2))
        self.log_std_floor = nn.Buffer(torch.full((d,), math.log(VARIANCE_FLOOR / d) / 2))

    @precise
    def forward(self, x: Tensor) -> Tensor:
        y = self._reduce(x)
        mixture = self.mixture(y.dtype)
        squares = y.square()
        g = mixture.log_joint(y, squares).softmax(-1).transpose(1, 2)
        s0 = g.mean(-1, keepdim=True)
        s1 = g @ y / y.shape[1]
        s2 = g @ squares / y.shape[1]
        mu, precision = mixture.means, torch.exp(-2 * mixture.log_stds)
        scale = torch.exp(-mixture.log_weights / 2)[:, None]
        first = (s1 - s0 * mu) * (precision.sqrt() * scale)
        second = ((s2 + mu * (s0 * mu - 2 * s1)) * precision - s0) * (scale / math.sqrt(2))
        fisher = torch.cat([first.flatten(1), second.flatten(1)], 1)
        return power_l2(fisher) if self.normalize else fisher

    def mixture(self, dtype: torch.dtype) -> Mixture:
        """The mixture in the reduced space, its weights normalised."""
        log_weights = self.log_weights.to(dtype).log_softmax(0).clamp_min(LOG_WEIGHT_FLOOR)
        return Mixture(log_weights, self.means.to(dtype), self.log_stds.to(dtype))

    @torch.no_grad()
    def fit(self, stream: DescriptorStream) -> None:
        """PCA, k-means and EM on a sample, then EM on the whole stream."""
        sample = stream.sample(FIT_SAMPLE).double()
        if self.l2_descriptors:
            sample = unit_length(sample)
        start_reduction(self.reduce, sample)
        y: Tensor = self.reduce(sample)
        variance = y.var(0, unbiased=False)
        floor = VARIANCE_FLOOR * torch.maximum(variance, 1e-6 * variance.mean() + 1e-12)
        mixture = start_mixture(y, len(self.means), floor)
        mixture, _ = expectation_maximisation(mixture, lambda: [y], floor, rounds=SAMPLE_ROUNDS)
        mixture, _ = expectation_maximisation(
            mixture,
            lambda: (self._reduce(x).flatten(0, 1).double() for x in stream.batches()),
            floor,
            rounds=STREAM_ROUNDS,
            sum_over_ranks=stream.sum,
        )
        for name, value in mixture._asdict().items():
            getattr(self, name).copy_(value)
        self.log_std_floor.copy_(floor.log() / 2)

    def no_weight_decay(self) -> set[str]:
        """Zero is no natural place for means and log deviations."""
        return {'means', 'log_stds'}

    @torch.no_grad()
    def project_(self) -> None:
        """Standard deviations below the floor that `fit` sets are raised to it."""
        self.log_stds.copy_(torch.maximum(self.log_stds, self.log_std_floor))

    def _reduce(self, x: Tensor) -> Tensor:
        x = x.to(at_least_float32(x.dtype))
        y: Tensor = self.reduce(unit_length(x) if self.l2_descriptors else x)
        return y


class Mixture(NamedTuple):
    """K Gaussians with diagonal covariance in D dimensions."""

    log_weights: Tensor  # [K], of weights that sum to 1
    means: Tensor  # [K, D]
    log_stds: Tensor  # [K, D]

    def log_joint(self, y: Tensor, squares: Tensor) -> Tensor:
        """`log p(y, k)` `[..., K]` of descriptors y `[..., D]` and their squares, up to
        `D/2 log(2 pi)`."""
        precision = torch.exp(-2 * self.log_stds)
        distance = (self.means.square() * precision).sum(1)
        constant = self.log_weights - self.log_stds.sum(1) - 0.5 * distance
        linear = F.linear(y, self.means * precision, constant)
        return linear - F.linear(squares, 0.5 * precision)


def start_mixture(y: Tensor, components: int, floor: Tensor) -> Mixture:
    """The best of some mixtures from k-means, after a few rounds of EM on some of the descriptors
    y `[M, D]`, float64; the floor `[D]` is of variances."""
    y = y[:: math.ceil(len(y) / START_ROWS)]
    wide = (y.var(0, unbiased=False) + floor).log() / 2
    candidates = []
    for seed in range(STARTS):
        centroids = kmeans(y, components, seed=seed, iterations=20)
        hard = F.one_hot(torch.cdist(y, centroids).argmin(1), components).to(y.dtype)
        start = Mixture(centroids.new_zeros(components), centroids, wide.expand_as(centroids))
        start = _maximisation(start, (hard.sum(0), hard.T @ y, hard.T @ y.square()), floor)
        start, history = expectation_maximisation(start, lambda: [y], floor, rounds=START_ROUNDS)
        candidates.append((history[-1], start))
    return max(candidates, key=lambda candidate: candidate[0])[1]


def expectation_maximisation(
    mixture: Mixture,
    chunks: Callable[[], Iterable[Tensor]],
    floor: Tensor,
    *,
    rounds: int,
    sum_over_ranks: Callable[..., tuple[Tensor, ...]] = lambda *tensors: tensors,
) -> tuple[Mixture, list[float]]:
    """EM on sufficient statistics, all float64: the mixture, and the mean log-likelihood of a
    descriptor in nats before each round.

    Args:
        mixture: to start from.
        chunks: gives this rank's descriptors `[M, D]`, again for each round.
        floor: smallest variances `[D]`.
        rounds: at most this many; fewer when the relative gain falls below `TOLERANCE`.
        sum_over_ranks: adds tensors up over ranks.
    """
    history: list[float] = []
    constant = 0.5 * mixture.means.shape[1] * math.log(2 * math.pi)
    for _ in range(rounds):
        totals = [torch.zeros_like(like) for like in (floor.sum(), *mixture[:2], mixture.means)]
        for y in chunks():
            squares = y.square()
            joint = mixture.log_joint(y, squares)
            evidence = joint.logsumexp(-1, keepdim=True)
            g = torch.exp(joint - evidence).T
            parts = evidence.sum(), g.sum(1), g @ y, g @ squares
            for total, part in zip(totals, parts, strict=True):
                total += part
        likelihood, *statistics = sum_over_ranks(*totals)
        history.append((likelihood / statistics[0].sum()).item() - constant)
        mixture = _maximisation(mixture, statistics, floor)
        if len(history) > 1 and history[-1] - history[-2] < TOLERANCE * abs(history[-2]):
            break
    return mixture, history


def _maximisation(mixture: Mixture, statistics: Iterable[Tensor], floor: Tensor) -> Mixture:
    """The M step; a component that has lost all descriptors keeps its mean and variance."""
    s0, s1, s2 = statistics
    weights = s0 / s0.sum()
    alive = (weights > math.exp(LOG_WEIGHT_FLOOR))[:, None]
    count = torch.where(alive, s0[:, None], 1.0)
    means = torch.where(alive, s1 / count, mixture.means)
    variances = torch.maximum(s2 / count - means.square(), floor)
    log_stds = torch.where(alive, variances.log() / 2, mixture.log_stds)
    log_weights = weights.log().clamp_min(LOG_WEIGHT_FLOOR)
    return Mixture(log_weights, means, log_stds)
