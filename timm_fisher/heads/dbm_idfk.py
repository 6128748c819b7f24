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
- The map to [0, 1] stretches by 1000 at most, and is clamped: a pixel that was on in one training
  image only would otherwise drown all others of a new image.
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

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from timm_fisher.fitting.stream import DescriptorStream
from timm_fisher.head import MOST_FEATURES, MOST_ITERATIONS, PoolingHead, check_range
from timm_fisher.numerics.boltzmann import mean_field, train_machine
from timm_fisher.numerics.clustering import check_finite, leading_axes
from timm_fisher.numerics.linalg import at_least_float32, unit_length, without_autocast

FIT_IMAGES = 65_536  # that the fit keeps, one vector each
CHUNK = 1024  # images whose scores are held at a time

LEAST_RANGE = 1e-3  # that is stretched to [0, 1], of entries that lie in [0, 1] by themselves


class DBMFisher(PoolingHead):
    """Improved Fisher vector of a deep Boltzmann machine over the mean descriptor.

    Args:
        in_features: channels C of one descriptor.
        hidden: units of the hidden layers: two for a DBM, one for an RBM.
        rank: r, leading axes of the Fisher information that are kept; None keeps all, which takes
            as much memory as the Fisher information itself.
        ridge: added to the variances along the axes, relative to the largest.
        mean_field_steps: of the posteriors of two layers.
        whiten: use the Fisher information (IDFK); without it (DFK, FK) phi is the output.
        squash: visible units are the logistic function of standardised channels, with statistics
            from `fit`. Without it the descriptors must lie in [0, 1], such as binary pixels.
        epochs: of training in `fit`, for each layer alone and then for all of them.
        learning_rate: at their start; it falls linearly to zero.
        seed: of the training.

    Range and axes are those of `fit`: a stage that trains the weights by other losses leaves them.

    Output: `[B, r]`; without whitening `[B, C * L1 + L1 * L2]`, or `[B, C * L1]` of an RBM.

    Raises:
        ValueError: not one or two hidden layers, or a number out of range.
    """

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
        if not isinstance(hidden, list | tuple) or len(hidden) not in (1, 2):
            raise ValueError(
                f'dbm_idfk takes hidden as a list of one or two sizes, got {hidden!r:.99}.'
            )
        for units in hidden:
            check_range('dbm_idfk', hidden=(units, 1, MOST_FEATURES))
        check_range(
            'dbm_idfk',
            rank=(rank, 1, MOST_FEATURES, None),
            ridge=(ridge, 0.0, 1e6),
            mean_field_steps=(mean_field_steps, 1, MOST_ITERATIONS),
            epochs=(epochs, 1, 100_000),
            learning_rate=(learning_rate, 1e-9, 1e3),
            seed=(seed, 0, 2**63 - 1),
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
        self.visible_bias = nn.Buffer(torch.zeros(in_features))
        self.model_moments = nn.Buffer(torch.zeros(self.score_features))
        if squash:
            self.centre = nn.Buffer(torch.zeros(in_features))
            self.deviation = nn.Buffer(torch.ones(in_features))
        self.low = nn.Buffer(torch.zeros(self.score_features))
        self.high = nn.Buffer(torch.ones(self.score_features))
        if whiten:
            self.axes = nn.Buffer(torch.randn(self.score_features, r) / self.score_features**0.5)
            self.variances = nn.Buffer(torch.ones(r))

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            z = self.normalized_score(x)
            if self.whiten:
                z = z @ self.axes.to(z.dtype) * self.inverse_root(z.dtype)
            return z.to(x.dtype)

    def score(self, x: Tensor) -> Tensor:
        """The score (eq. 3) `[B, C * L1 + L1 * L2]` of descriptors `[B, N, C]`, S before Q, each
        row by row; float32 or better."""
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
        here = [*self.weights, self.visible_bias, *self.biases]
        for value, trained_value in zip(here, [*trained.weights, *trained.biases], strict=True):
            value.copy_(trained_value)
        self.model_moments.copy_(trained.model_moments())

        low = high = self._moments(v[:1])[0]
        for chunk in v.split(CHUNK):
            moments = self._moments(chunk)
            low, high = torch.minimum(low, moments.amin(0)), torch.maximum(high, moments.amax(0))
        self.low.copy_(low)
        self.high.copy_(high)
        if self.whiten:
            axes, variances = leading_axes(
                lambda: (self._normalize(self._moments(chunk)) for chunk in v.split(CHUNK)),
                self.out_features,
            )
            self.axes.copy_(axes)
            self.variances.copy_(variances)

    def _visible(self, x: Tensor) -> Tensor:
        """v `[B, C]` of descriptors `[B, N, C]`, float32 or better."""
        v = mean_descriptor(x)
        if not self.squash:
            return v
        return torch.sigmoid((v - self.centre.to(v.dtype)) / self.deviation.to(v.dtype))

    def _posteriors(self, v: Tensor) -> list[Tensor]:
        weights = [weight.to(v.dtype) for weight in self.weights]
        biases = [bias.to(v.dtype) for bias in self.biases]
        return mean_field(v, weights, biases, self.mean_field_steps)

    def _moments(self, v: Tensor) -> Tensor:
        """`v mu1^T | mu1 mu2^T` `[B, C * L1 + L1 * L2]`."""
        pairs = pairwise([v, *self._posteriors(v)])
        products = [(below[:, :, None] * above[:, None, :]).flatten(1) for below, above in pairs]
        return torch.cat(products, 1)

    def _normalize(self, moments: Tensor) -> Tensor:
        """phi: to [0, 1] entry by entry, then to unit length."""
        low, high = self.low.to(moments.dtype), self.high.to(moments.dtype)
        # Off the training set a product that was next to nothing there may be 1.
        phi = ((moments - low) / (high - low).clamp_min(LEAST_RANGE)).clamp(0, 1)
        return unit_length(phi[:, None])[:, 0]

    def inverse_root(self, dtype: torch.dtype) -> Tensor:
        """What each axis is multiplied by, `[r]`: S^(-1/2) with the ridge; zero along axes where
        the training set did not vary at all."""
        variances = self.variances.to(dtype)
        largest = variances.max()  # amax of all entries has no ONNX
        variances = variances + self.ridge * largest
        kept = variances > torch.finfo(self.variances.dtype).eps * largest
        return torch.where(kept, variances, torch.inf).rsqrt()


def mean_descriptor(x: Tensor) -> Tensor:
    """`[B, N, C]` -> `[B, C]`, float32 or better."""
    return x.to(at_least_float32(x.dtype)).mean(1)
