"""Group-sparse non-negative matrix factorization: pooled features as sums of non-negative parts.

    p = mean of s(x_i) over descriptors          s: ReLU, softplus, or both signs side by side
    x = p / |p|                                  C values, or 2 C, none of them negative
    h <- h * (W^T x) / (W^T W h + l2 h + l1)     the code: a fixed number of updates (eq. 6)

W has unit columns, none of its entries negative. The unsupervised loss is the
mean over images of eq. 2,

    1/2 |x - W h|^2 + l2/2 |h|^2 + l1 |h|_1,

with h held fixed: where h minimises it, its gradient in x and W is that of the minimum (envelope
theorem).

Where the paper is silent or wrong, and what is done here:
- Eq. 2 is degenerate in W and H together: a longer W with a shorter H lowers the penalties at no
  cost. The objective is therefore eq. 2 *under unit columns of W* (section 3.3 normalises W as
  well, "following the standard NMF practice").
- lambda_1 is the weight of the squared norm and lambda_2 that of the L1 norm; here they are
  `l2_penalty` and `l1_penalty`.
- Multiplicative updates from NNDSVD never leave its zeros, and creep. `fit` descends by exact
  minimisation over one column of W, or one row of H, at a time (HALS); `partial_fit`, which sees
  a mini-batch, does the paper's updates.
- The output h is not normalised; clustering normalises it (section 4.3).

Paper: "Factorized convolutional networks"; sections and equations are numbered as there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_fisher.fitting.stream import DescriptorStream
from timm_fisher.head import MOST_FEATURES, MOST_ITERATIONS, PoolingHead, check_range
from timm_fisher.numerics.clustering import check_finite
from timm_fisher.numerics.linalg import at_least_float32, precise, without_autocast

FIT_IMAGES = 65_536  # images that the basis is fitted to
FLOOR = 1e-8  # of what is divided by; features and columns of the basis have unit length
SIGNS = ('relu', 'softplus', 'split')
NNDSVD_ZERO = 1e-6  # entries below count as zero, as in scikit-learn
BLOCK = 16  # components updated between two matrix products


class GSNMF(PoolingHead):
    """Code of the pooled features over a non-negative basis, with an elastic-net penalty.

    Args:
        in_features: channels C of one descriptor.
        components: L, columns of the basis.
        updates: multiplicative updates of the code. On pooled features of tf_efficientnet_lite0,
            over 256 components, eq. 2 ended 5.8 % above its minimum after 20, 1.0 % after 50,
            0.2 % after 100.
        l2_penalty: weight of |h|^2 / 2, lambda_1 of the paper.
        l1_penalty: weight of |h|_1, lambda_2 of the paper. Both zero: plain NMF.
        signed: what becomes of negative descriptors: 'relu' drops them, 'softplus' makes them
            small, 'split' puts positive and negative parts side by side, for a basis of 2 C rows.

    Output: `[B, L]`, not negative.

    Raises:
        ValueError: a number out of range, or an unknown `signed`.
    """

    def __init__(
        self,
        in_features: int,
        *,
        components: int = 256,
        updates: int = 100,
        l2_penalty: float = 0.02,
        l1_penalty: float = 0.05,
        signed: str = 'relu',
    ) -> None:
        super().__init__()
        check_range(
            'gsnmf',
            components=(components, 1, MOST_FEATURES),
            updates=(updates, 1, MOST_ITERATIONS),
            l2_penalty=(l2_penalty, 0.0, 1e6),
            l1_penalty=(l1_penalty, 0.0, 1e6),
        )
        if signed not in SIGNS:
            raise ValueError(
                f'gsnmf takes signed as one of {", ".join(SIGNS)}, got {signed!r:.99}.'
            )
        self.in_features = in_features
        self.out_features = components
        self.updates = updates
        self.l2_penalty = l2_penalty
        self.l1_penalty = l1_penalty
        self.signed = signed
        rows = 2 * in_features if signed == 'split' else in_features
        self.basis = nn.Parameter(F.normalize(torch.rand(rows, components), dim=0))

    @precise
    def forward(self, x: Tensor) -> Tensor:
        return self._code(self._features(x))

    @precise
    def forward_with_loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self._features(x)
        code = self._code(features)
        h = code.detach()
        error = features - F.linear(h, self.basis.to(h.dtype))
        penalty = 0.5 * self.l2_penalty * h.square().sum(1) + self.l1_penalty * h.sum(1)
        return code, (0.5 * error.square().sum(1) + penalty).mean()

    @torch.no_grad()
    def fit(self, stream: DescriptorStream) -> None:
        """NNDSVD, then HALS (`factorize`), on the pooled features of at most 65 536 images."""
        features = stream.sample_images(FIT_IMAGES, lambda x: self._features(x).float())
        basis, _, _ = factorize(
            features, self.out_features, l2_penalty=self.l2_penalty, l1_penalty=self.l1_penalty
        )
        self.basis.copy_(basis)
        self.project_()

    @torch.no_grad()
    def partial_fit(self, stream: DescriptorStream) -> None:
        """One round of eq. 6: codes of the mini-batch, then `W <- W * X H^T / (W H H^T)`, then unit
        columns. Columns that no code uses stay as they are."""
        with without_autocast(self.basis):
            dtype = at_least_float32(self.basis.dtype)
            basis = self.basis.to(dtype)
            cross, gram = torch.zeros_like(basis), basis.new_zeros(basis.shape[1], basis.shape[1])
            for x in stream.batches():
                features = self._features(x).to(dtype)
                h = self._code(features)
                cross += features.T @ h
                gram += h.T @ h
            cross, gram = stream.sum(cross, gram)
            denominator = basis @ gram
            # Both sides of the fraction grow with the codes, so the floor does too.
            floor = FLOOR * gram.diagonal().amax().sqrt() * gram.diagonal().sqrt()
            used = denominator > floor
            self.basis.copy_(basis * torch.where(used, cross / denominator, 1.0))
            self.project_()

    @torch.no_grad()
    def project_(self) -> None:
        """Negative entries of the basis become zero, its columns unit vectors; a column without a
        positive entry becomes zero."""
        self.basis.copy_(F.normalize(self.basis.double().clamp_min(0), dim=0))

    def _features(self, x: Tensor) -> Tensor:
        """Non-negative features of unit length `[B, C or 2 C]`; zero where nothing is positive."""
        x = x.to(at_least_float32(x.dtype))
        if self.signed == 'softplus':
            x = F.softplus(x)
        else:
            x = (torch.cat([x, -x], -1) if self.signed == 'split' else x).relu()
        pooled = x.mean(1)
        # The result does not depend on the scale, so it can be taken out as a constant. The
        # largest entry is 1 by then, and the floor only ever meets a zero vector.
        scale = pooled.detach().amax(1, keepdim=True)
        return F.normalize(pooled / torch.where(scale > 0, scale, 1.0), dim=1, eps=0.5)

    def _code(self, features: Tensor) -> Tensor:
        """Codes `[B, L]` by multiplicative updates (eq. 6)."""
        basis = self.basis.to(features.dtype)
        rows, components = basis.shape
        # W^T W h by way of the smaller side.
        gram = basis.T @ basis if components <= 2 * rows else None
        drive = features @ basis
        h = torch.full_like(drive, components**-0.5)
        for _ in range(self.updates):
            product = h @ gram if gram is not None else h @ basis.T @ basis
            slope = product + (self.l2_penalty * h + self.l1_penalty)
            h = h * drive / slope.clamp_min(FLOOR)
        return h


@torch.no_grad()
def factorize(
    x: Tensor,
    components: int,
    *,
    l2_penalty: float = 0.0,
    l1_penalty: float = 0.0,
    rounds: int = 200,
    tolerance: float = 5e-5,
) -> tuple[Tensor, Tensor, list[float]]:
    """Lower `1/2 |X - W H|^2 + l2/2 |H|^2 + l1 |H|_1` over W, H >= 0, W with unit columns.

    Starts from NNDSVD, or from the rows of X where there are no more than L of them. Alternates
    one sweep over the rows of H, in one pass over X, with one over the columns of W, which needs
    only X H^T and H H^T (HALS). No step raises the objective. A column of W that no row of X uses
    takes the direction in which some row is represented worst.

    Args:
        x: rows `[n, C]`, not negative, finite, float32 or better.
        components: L.
        l2_penalty: l2.
        l1_penalty: l1.
        rounds: at most this many.
        tolerance: stop where a round gains less than this share of the objective.

    Returns:
        W `[C, L]`, float64; H `[L, n]`, in the dtype of `x`; and the objective of each round.

    Source: Cichocki and Phan, IEICE 2009 (HALS); the sweeps over blocks are ours.
    """
    check_finite(x)
    # On a CPU so few rows that their codes stay in the cache from one component to the next.
    chunks = torch.split(x, 2048 if x.device.type == 'cpu' else len(x))
    start, h = (nndsvd if len(x) > components else copies)(x, components)
    parts = torch.split(h, len(chunks[0]), dim=1)
    squares = sum(chunk.double().square().sum().item() for chunk in chunks)
    damping = l2_penalty * torch.eye(components, dtype=torch.float64, device=x.device)

    generator = torch.Generator().manual_seed(0)
    filler = torch.rand(start.shape, generator=generator, dtype=torch.float64).to(x.device)
    length = start.norm(dim=0)
    w = F.normalize(torch.where(length > 0, start, filler), dim=0).T.contiguous()  # [L, C]
    h *= length.to(h.dtype)[:, None]

    history: list[float] = []
    while True:
        gram = w @ w.T + damping
        cross, outer, total = torch.zeros_like(w), torch.zeros_like(gram), 0.0
        for chunk, part in zip(chunks, parts, strict=True):
            descend_(part, w.to(x.dtype) @ chunk.T - l1_penalty, gram.to(x.dtype))
            cross += part @ chunk
            outer += part @ part.T
            total += part.sum().item()
        inner = (cross * w).sum() - 0.5 * (gram * outer).sum()
        history.append(0.5 * squares - inner.item() + l1_penalty * total)
        # Float32 does not tell what lies below a millionth of the squares.
        least = tolerance * max(history[-1], 1e-6 * squares)
        if len(history) >= rounds or (len(history) > 1 and history[-2] - history[-1] <= least):
            return w.T, h, history

        # A penalty holds columns within the unit ball, where the best ones have unit length. One
        # that ends up shorter is made longer and its codes smaller, which lowers the objective,
        # and without a penalty leaves it as it is, whatever the length.
        descend_(w, cross, outer, within_ball=l2_penalty > 0 or l1_penalty > 0)
        length = w.norm(dim=1)
        unused = (length == 0) | (outer.diagonal() == 0)
        w /= torch.where(length > 0, length, 1.0)[:, None]
        h *= length.to(h.dtype)[:, None]
        if unused.any():
            h[unused] = 0
            least = max(l1_penalty**2, 1e-8 * squares / len(x))
            fresh = worst_residuals(x, w, h, int(unused.sum()), least)
            w[unused.nonzero().flatten()[: len(fresh)]] = fresh


def descend_(values: Tensor, drive: Tensor, gram: Tensor, *, within_ball: bool = False) -> None:
    """One sweep of exact minimisation of `1/2 tr(V^T G V) - tr(D^T V)` over each row of V `[L, m]`
    in turn, in place; rows are not negative, and within the unit ball if asked for.

    The loop over rows is the method: each one starts from those before it. Rows of other blocks
    come in by a matrix product. Where the diagonal of G `[L, L]` is zero, a row is left alone.
    """
    diagonal = gram.diagonal()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0).tolist()
    changes = values.new_empty(min(BLOCK, len(values)), values.shape[1])
    for start in range(0, len(values), BLOCK):
        here = slice(start, start + BLOCK)
        block = values[here]
        slopes = torch.addmm(drive[here], gram[here], values, alpha=-1)
        # Rows of zeros without a reason to leave them: many, with a strong penalty.
        moves = ((block > 0) | (slopes > 0)).any(1) & (diagonal[here] > 0)
        chosen = moves.nonzero().flatten()
        weights = gram[here, here][chosen][:, chosen]
        for k, row in enumerate(chosen.tolist()):
            old, slope = block[row], slopes[row]
            if k:  # what the rows of this block have changed so far
                slope = torch.addmv(slope, changes[:k].T, weights[k, :k], alpha=-1)
            new = torch.add(old, slope, alpha=inverse[start + row]).clamp_min_(0)
            if within_ball:
                new /= new.norm().clamp_min(1)
            torch.sub(new, old, out=changes[k])
            old.copy_(new)


def worst_residuals(x: Tensor, w: Tensor, h: Tensor, count: int, least: float) -> Tensor:
    """Directions `[count, C]`, or fewer, in which some row of x `[n, C]` is represented worst by
    columns w `[L, C]` and codes h `[L, n]`: positive parts of residuals whose squared length, which
    says how much a new column helps at best, exceeds `least`."""
    w = w.to(x.dtype)
    chunks = zip(x.split(8192), h.split(8192, dim=1), strict=True)
    reach = [(chunk - part.T @ w).clamp_min_(0).square().sum(1) for chunk, part in chunks]
    farthest = torch.cat(reach).topk(min(count, len(x)))
    rows = farthest.indices[farthest.values > least]
    return F.normalize((x[rows] - h[:, rows].T @ w).clamp_min(0).double(), dim=1)


def copies(x: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """As `nndsvd`, for no more rows than components: each row becomes a column, or several."""
    owner = torch.arange(components, device=x.device) % len(x)
    h = F.one_hot(owner, len(x)).to(x.dtype)
    return x.double().T[:, owner], h / h.sum(0)


@torch.no_grad()
def nndsvd(x: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Non-negative double singular value decomposition of X^T, for rows X `[n, C]`: W `[C, L]`,
    float64, and H `[L, n]`, in the dtype of X; zero beyond its rank.

    What scikit-learn's `init='nndsvd'` gives, with an exact decomposition, by way of the C x C Gram
    matrix, in float64, and two passes over X.

    Source: Boutsidis and Gallopoulos, Pattern Recognition 2008.
    """
    chunks = torch.split(x, 8192)
    gram = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for chunk in chunks:
        gram += chunk.double().T @ chunk.double()
    eigenvalues, v = torch.linalg.eigh(gram)
    rank = min(components, *x.shape)
    s, v = eigenvalues.flip(0)[:rank].clamp_min(0).sqrt(), v.flip(1)[:, :rank]
    s = torch.where(s > 1e-7 * s[0], s, 0.0)  # the root of the rounding errors of float64
    v = torch.where(s > 0, v, 0.0)
    u = torch.cat([(chunk.double() @ v).to(x.dtype) for chunk in chunks])
    u /= torch.where(s > 0, s, 1.0)

    def split(vectors: Tensor) -> tuple[Tensor, Tensor]:
        return vectors.clamp_min(0).norm(dim=0).double(), vectors.clamp_max(0).norm(dim=0).double()

    (u_plus, u_minus), (v_plus, v_minus) = split(u), split(v)
    positive = u_plus * v_plus > u_minus * v_minus
    sign = torch.where(positive, 1.0, -1.0)
    u_length = torch.where(positive, u_plus, u_minus)
    v_length = torch.where(positive, v_plus, v_minus)
    # The first pair has one sign throughout.
    u[:, 0], v[:, 0], sign[0], u_length[0], v_length[0] = u[:, 0].abs(), v[:, 0].abs(), 1, 1, 1

    def part(vectors: Tensor, own: Tensor, other: Tensor) -> Tensor:
        """sqrt(s |u| |v|) times the unit vector of the chosen sign."""
        factor = sign * (s * other / torch.where(own > 0, own, 1.0)).sqrt()
        values = vectors * factor.to(vectors.dtype)
        values = torch.where(values < NNDSVD_ZERO, 0.0, values)
        return F.pad(values, (0, components - rank))

    return part(v, v_length, u_length), part(u, u_length, v_length).T.contiguous()
