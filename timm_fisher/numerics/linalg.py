"""Differentiable pieces that two heads or more use."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

POWER_EPS = 1e-6


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: half precision is raised to float32, float64 stays float64."""
    return torch.promote_types(dtype, torch.float32)


def power_l2(z: Tensor) -> Tensor:
    """Signed square root, then L2 norm: `z' = sign(z) sqrt(|z|)`, `z' / ||z'||`.

    The gradient of the square root is infinite at zero, so `sign(z) sqrt(|z|)` becomes
    `z / sqrt(|z| + eps max|z|)`: the floor is relative to the scale of the vectors `[..., D]`,
    float32 or better, which the L2 norm then removes. A zero vector stays zero.

    Source: Perronnin, Sanchez and Mensink, ECCV 2010, sections 3.1 and 3.2.
    """
    # The result does not depend on the scale of z, so taking it out as a constant leaves the
    # gradient as it is, and keeps 1e-12 as well as 1e12 within the range of float32.
    scale = z.detach().abs().amax(-1, keepdim=True)
    z = z / torch.where(scale > 0, scale, 1.0)
    z = z * torch.rsqrt(z.abs() + POWER_EPS)
    # Unless z is zero its largest entry is 1 by now, so this floor only ever meets a zero vector.
    return F.normalize(z, dim=-1, eps=0.5)


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A context in which autocast does not touch mathematics on the device of `x`."""
    # torch.autocast knows no 'meta' device, where nothing is computed anyway.
    return (
        nullcontext() if x.device.type == 'meta' else torch.autocast(x.device.type, enabled=False)
    )


def precise(method: Callable[..., Any]) -> Callable[..., Any]:
    """A head's `forward`, `forward_with_loss` or `attention`, without autocast and with
    descriptors, and tensors of numbers given by keyword, in float32 or better; what it gives goes
    back to the dtype that the descriptors came in, but for the loss."""

    @functools.wraps(method)
    def call(head: Any, x: Tensor, **context: Any) -> Any:
        dtype = at_least_float32(x.dtype)
        for key, value in context.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                context[key] = value.to(dtype)
        with without_autocast(x):
            result = method(head, x.to(dtype), **context)
        if isinstance(result, Tensor):
            return result.to(x.dtype)
        pooled, loss = result
        return pooled.to(x.dtype), loss

    return call


def unit_length(x: Tensor) -> Tensor:
    """Each descriptor of `[..., N, C]`, float32 or better, divided by its length.

    The length has a floor, 1e-4 of the longest descriptor of the image, so that near-zero ones
    stay short and have a bounded gradient.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    longest = length.detach().amax(-2, keepdim=True)
    return x / torch.maximum(length, torch.where(longest > 0, 1e-4 * longest, 1.0))


class Linear(nn.Linear):
    """Linear map that computes in the dtype of its input, whatever that of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def call_in_dtype(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)` in the dtype of its input, whatever that of its parameters; for a layer of timm's
    or PyTorch's that has no buffers."""
    parameters = dict(module.named_parameters())
    if all(parameter.dtype == x.dtype for parameter in parameters.values()):
        return cast(Tensor, module(x))
    raised = {name: parameter.to(x.dtype) for name, parameter in parameters.items()}
    return cast(Tensor, functional_call(module, raised, (x,)))


class LinearNorm(nn.Module):
    """`Linear` without bias, then batch norm, in the dtype of the input too: a 1 x 1 convolution
    and its norm, on descriptors `[..., in_features]`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = Linear(in_features, out_features, bias=False)
        self.norm = nn.BatchNorm1d(out_features)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return self._normalize(y.flatten(0, -2)).view_as(y)

    def _normalize(self, x: Tensor) -> Tensor:
        norm = self.norm
        if norm.weight.dtype == x.dtype:
            return cast(Tensor, norm(x))
        state = {key: value.to(x.dtype) for key, value in norm.named_parameters()}
        buffers = {key: getattr(norm, key).to(x.dtype) for key in ('running_mean', 'running_var')}
        out = cast(Tensor, functional_call(norm, {**state, **buffers}, (x,)))
        if norm.training:
            for key, value in buffers.items():
                getattr(norm, key).copy_(value)
        return out


class Triangle(nn.Module):
    """Reads the upper, or the lower, triangle of symmetric matrices `[B, d, d]`, diagonal included,
    row by row: `[B, d (d + 1) / 2]`."""

    def __init__(self, size: int, *, lower: bool = False) -> None:
        super().__init__()
        self.size = size
        self.lower = lower
        self.length = size * (size + 1) // 2
        # Positions in a flattened matrix.
        self.index = nn.Buffer(torch.empty(self.length, dtype=torch.long), persistent=False)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Fill in the positions, as timm's layers do."""
        indices = torch.tril_indices if self.lower else torch.triu_indices
        rows, columns = indices(self.size, self.size, device=self.index.device)
        self.index.copy_(rows * self.size + columns)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).index_select(1, self.index)


def covariance_root(x: Tensor, iterations: int, eps: float = 0.0) -> Tensor:
    """Square roots `[B, d, d]` of covariances of descriptors, by Newton-Schulz iterations.

    The covariance S, plus `eps` I, is divided by its trace, iterated, and multiplied by the root
    of the trace. Five iterations stop short of the true root, as the papers mean them to.

    Every iterate is a polynomial p in S, and `p(X X^T) X = X p(X^T X)`: with fewer descriptors
    than channels the N x N Gram matrix is iterated instead, for (N / d)^3 of the work.

    Args:
        x: descriptors `[B, N, d]`, float32 or better.
        iterations: 1 or more.
        eps: added to the diagonal of the covariance.

    Source: Li et al., CVPR 2018 (iSQRT-COV), eqs. 4 to 7.
    """
    n, d = x.shape[1:]
    x = (x - x.mean(1, keepdim=True)) * n**-0.5
    return gram_root(x, iterations, eps) if n < d else matrix_root(x, iterations, eps)


def matrix_root(x: Tensor, iterations: int, eps: float) -> Tensor:
    """`covariance_root` by way of the d x d covariance `x^T x` of `[B, N, d]`."""
    covariance = x.transpose(1, 2) @ x
    if eps:
        covariance = covariance + eps * torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
    trace = safe_trace(covariance.diagonal(dim1=1, dim2=2).sum(1))
    a = covariance / trace
    return newton_schulz(a, iterations) @ (a * trace.sqrt())


def gram_root(x: Tensor, iterations: int, eps: float) -> Tensor:
    """`covariance_root` by way of the N x N Gram matrix `x x^T` of `[B, N, d]`."""
    d = x.shape[2]
    gram = x @ x.transpose(1, 2)
    trace = safe_trace(gram.diagonal(dim1=1, dim2=2).sum(1) + eps * d)
    if not eps:
        return x.transpose(1, 2) @ (newton_schulz(gram / trace, iterations) / trace.sqrt()) @ x
    constant, inner = shifted_root(gram / trace, eps / trace, iterations)
    root = x.transpose(1, 2) @ (inner / trace.sqrt()) @ x
    # In place: the d x d result is by far the largest tensor here. And on a strided view:
    # `diagonal().add_` is what torch.onnx cannot translate.
    root.view(-1, d * d)[:, :: d + 1].add_((constant * trace.sqrt())[:, 0])
    return root


def shifted_root(g: Tensor, e: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The Newton-Schulz iterate near the root of `A = e I + X^T X`, exactly, from `G = X X^T`.

    Every polynomial in A is `c I + X^T M X`, a pair of a number and an N x N matrix, and pairs
    multiply as `(c1, M1) (c2, M2) = (c1 c2, c1 M2 + M1 (c2 I + G M2))`. The bracket is the same
    polynomial of `e I + G`, so it is carried along. One iteration is `P = (3 I - W) / 2`,
    `Y <- Y P`, `W <- W P P`, from `Y = W = A`: 4 products of N x N matrices, where 3 are needed
    without e. For G `[B, N, N]` and e `[B, 1, 1]` gives c `[B, 1, 1]` and M `[B, N, N]`.
    """
    identity = torch.eye(g.shape[1], dtype=g.dtype, device=g.device)
    y, w = e, e  # c of Y and of W
    of_w = identity  # M of W
    value = g + e * identity  # W of e I + G
    p, factor = 1.5 - 0.5 * w, 1.5 * identity - 0.5 * value  # P, as a number and of e I + G
    of_y = factor - 0.5 * y * identity  # M of Y
    for iteration in range(1, iterations):
        product = factor @ value
        step = p * p * identity - 0.5 * (product + p * value)
        of_w = step if iteration == 1 else of_w @ step
        value = factor @ product
        y, w = p * y, p * p * w
        p, factor = 1.5 - 0.5 * w, 1.5 * identity - 0.5 * value
        of_y = torch.baddbmm(-0.5 * y * of_w, of_y, factor)
    return p * y, of_y


def newton_schulz(a: Tensor, iterations: int) -> Tensor:
    """The iterate `Z = p(A)` of coupled Newton-Schulz iterations, near `A^(-1/2)`, of symmetric
    matrices A `[B, n, n]` with eigenvalues in [0, 1]; `A Z` is near the root."""
    identity = torch.eye(a.shape[1], dtype=a.dtype, device=a.device).expand_as(a)
    z = 1.5 * identity - 0.5 * a
    y = a @ z
    for iteration in range(1, iterations):
        p = torch.baddbmm(identity, z, y, beta=1.5, alpha=-0.5)
        z = p @ z
        if iteration < iterations - 1:
            y = y @ p
    return z


def safe_trace(trace: Tensor) -> Tensor:
    """`[B]` -> `[B, 1, 1]`, 1 where it is zero, or where the dtype cannot hold its rounding errors:
    that is at lengths below 3e-16 in float32."""
    info = torch.finfo(trace.dtype)
    return torch.where(trace > info.tiny / info.eps, trace, 1.0)[:, None, None]
