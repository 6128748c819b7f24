"""SALAD: descriptors assigned to clusters, or to none, by optimal transport.

    S_nk = MLP_s(x_n)_k, and S_n,m+1 = 0         scores for m clusters, and for a dustbin
    P    = argmax of sum P S + entropy of P      that gives each descriptor the mass 1, each cluster
                                                 1 and the dustbin N - m
    V_k  = L2(sum_n P_nk MLP_f(x_n))             l values; the dustbin's are thrown away
    g    = L2(MLP_t(class token))                without a class token: of the mean descriptor,
                                                 which is not in the paper
    z    = L2([g, V transposed])                 t + l m values, V by channel, then by cluster

P comes from a fixed number of Sinkhorn iterations in the log domain. From v = 0:

    u_k <- log(mass of k) - log sum_n exp(S_nk + v_n)
    v_n <- - log sum_k exp(S_nk + u_k)           P_nk = exp(S_nk + u_k + v_n)

(The paper divides all masses by N + m and multiplies P by it, which changes nothing.)

A number added to the scores of one cluster, or of the dustbin, goes into u and out of P. So the
authors' trained score of the dustbin, and the bias of the scores, have no effect and no gradient.
They are left out here; `convert_state_dict` drops them. The authors train with dropout 0.3 in
MLP_s and MLP_f; it is an option here.

N, the number of descriptors, must exceed m: with N = m nothing is left for the dustbin.

Paper: Izquierdo and Civera, "Optimal Transport Aggregation for Visual Place Recognition", CVPR
2024. Outputs and gradients equal those of the authors' code (tests/golden).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_fisher.head import MOST_FEATURES, MOST_ITERATIONS, PoolingHead, check_range
from timm_fisher.numerics.linalg import Linear, precise, unit_length


class SALAD(PoolingHead):
    """Sinkhorn algorithm for locally aggregated descriptors, beside a global one.

    Args:
        in_features: channels C of one descriptor.
        clusters: m, fewer than there are descriptors.
        cluster_dim: l, channels of a cluster.
        token_dim: t, values made of the class token.
        hidden: width of the three perceptrons between their layers.
        iterations: of Sinkhorn.
        dropout: share of hidden units dropped in training, except those of the class token.

    Output: `[B, t + l * m]`, the t first, then row-major in (l, m).

    Raises:
        ValueError: a number out of range; in `forward`, no more descriptors than clusters.
    """

    def __init__(
        self,
        in_features: int,
        *,
        clusters: int = 64,
        cluster_dim: int = 128,
        token_dim: int = 256,
        hidden: int = 512,
        iterations: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_range(
            'salad',
            clusters=(clusters, 1, MOST_FEATURES),
            cluster_dim=(cluster_dim, 1, MOST_FEATURES),
            token_dim=(token_dim, 1, MOST_FEATURES),
            hidden=(hidden, 1, MOST_FEATURES),
            iterations=(iterations, 1, MOST_ITERATIONS),
            dropout=(dropout, 0.0, 0.9),
        )
        self.in_features = in_features
        self.out_features = token_dim + cluster_dim * clusters
        self.least_descriptors = clusters + 1
        self.clusters = clusters
        self.iterations = iterations
        self.score = perceptron(in_features, hidden, clusters, dropout, bias=False)
        self.features = perceptron(in_features, hidden, cluster_dim, dropout)
        self.token = perceptron(in_features, hidden, token_dim, 0.0)

    @precise
    def forward(self, x: Tensor, *, class_token: Tensor | None = None) -> Tensor:
        v = self.features(x).transpose(1, 2) @ self._assign(x)
        v = unit_length(v.transpose(1, 2)).transpose(1, 2)
        g = self.token(x.mean(1) if class_token is None else class_token)
        z = torch.cat([unit_length(g[:, None]).flatten(1), v.flatten(1)], 1)
        # The parts have length 1, so this floor only ever meets an image of zeros.
        return F.normalize(z, dim=1, eps=0.5)

    @precise
    def attention(self, x: Tensor) -> Tensor:
        """Assignments P `[B, m, N]` of descriptors `[B, N, C]`: how much of each descriptor goes to
        each cluster. What is missing to 1 goes to the dustbin."""
        return self._assign(x).transpose(1, 2)

    def _assign(self, x: Tensor) -> Tensor:
        """P `[B, N, m]`."""
        if x.shape[1] <= self.clusters:
            raise ValueError(
                f'salad needs more descriptors than clusters, got {x.shape[1]} descriptors of an '
                f'image for {self.clusters} clusters. Take fewer clusters, larger images or an '
                f'earlier stage.'
            )
        return sinkhorn(self.score(x), self.iterations)


def perceptron(
    in_features: int, hidden: int, out_features: int, dropout: float, *, bias: bool = True
) -> nn.Sequential:
    """Two layers; the bias is that of the second."""
    return nn.Sequential(
        Linear(in_features, hidden),
        nn.Dropout(dropout),
        nn.ReLU(),
        Linear(hidden, out_features, bias=bias),
    )


def sinkhorn(scores: Tensor, iterations: int) -> Tensor:
    """Masses P `[B, N, m]` that go from N descriptors to m clusters, by their scores `[B, N, m]`,
    when a dustbin with the score 0 takes N - m of them."""
    m = scores.shape[2]
    # Not math.log(N): a traced graph would keep it as a constant.
    number = torch.ones_like(scores[0, :, 0]).sum()
    mass = F.pad((number - m).log()[None], (m, 0))  # log 1 for each cluster, then the dustbin's
    scores = F.pad(scores, (0, 1))
    v = torch.zeros_like(scores[..., :1])
    for _ in range(iterations):
        u = mass - (scores + v).logsumexp(1, keepdim=True)
        v = -(scores + u).logsumexp(2, keepdim=True)
    return (scores + u + v)[..., :m].exp()


def convert_state_dict(authors_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' aggregator, by their names of its parts, as the state of this head.

    ```python
    head = timm_fisher.create_head('salad', 768)
    head.load_state_dict(convert_state_dict(state_of_the_authors_aggregator))
    ```
    """
    names = {
        'score.0': 'score.0', 'score.3': 'score.3',
        'cluster_features.0': 'features.0', 'cluster_features.3': 'features.3',
        'token_features.0': 'token.0', 'token_features.2': 'token.3',
    }  # fmt: skip
    converted = {}
    for key, value in authors_state.items():
        module, _, name = key.rpartition('.')
        if key not in ('dust_bin', 'score.3.bias'):
            converted[f'{names[module]}.{name}'] = value.flatten(1) if name == 'weight' else value
    return converted
