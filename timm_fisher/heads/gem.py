"""GeM: generalised mean of the descriptors, channel by channel.

    z_c = ( 1/N sum_i max(x_ic, 0)^p )^(1/p)

p = 1 is the average and p -> infinity the maximum, after a ReLU; p is learned, one for all
channels. It is stored as its logarithm, so no gradient step can make it zero or negative, and
`project_` keeps it where float32 can tell the mean from its limits.

The power is taken of x / m, m the channel's maximum in the image, so it cannot overflow; m times
the result is the same mean. x / m is held above a small floor, where power and logarithm have
finite derivatives; the paper's floor is absolute.

Paper: Radenovic, Tolias and Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation",
TPAMI 2018 (eq. 3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from timm_fisher.head import PoolingHead, check_range
from timm_fisher.numerics.linalg import precise

FLOOR = 1e-6  # of the channel's maximum
LEAST, MOST = 0.01, 10_000  # exponents: near the geometric mean, near the maximum


class GeM(PoolingHead):
    """Generalised mean with one learned exponent.

    Args:
        in_features: channels C of one descriptor.
        p: the exponent to start from.

    Output: `[B, C]`, in the units of the descriptors; zero where a channel is nowhere positive.

    Raises:
        ValueError: `p` is not between 0.01 and 10 000.
    """

    def __init__(self, in_features: int, *, p: float = 3.0) -> None:
        super().__init__()
        check_range('gem', p=(p, LEAST, MOST))
        self.in_features = self.out_features = in_features
        self.log_p = nn.Parameter(torch.tensor([math.log(p)]))

    @precise
    def forward(self, x: Tensor) -> Tensor:
        p = self.log_p.to(x.dtype).exp()
        # A constant to autograd: the result does not depend on it. Zero in a dead channel.
        m = x.detach().amax(1, keepdim=True).clamp_min(0)
        ratio = torch.where(m > 0, (x / torch.where(m > 0, m, 1.0)).clamp_min(FLOOR), 1.0)
        # Not `pow`: its backward is slow on a CPU.
        return m[:, 0] * torch.exp(p * ratio.log()).mean(1).pow(1 / p)

    @torch.no_grad()
    def project_(self) -> None:
        """The exponent, back to between 0.01 and 10 000."""
        self.log_p.clamp_(math.log(LEAST), math.log(MOST))
