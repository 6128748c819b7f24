"""Sparse codes by unfolded iterations, and dictionaries."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 5  # on the codes, and on the dictionary, in a round of the fit


class SparseCoder(nn.Module):
    """A dictionary B `[d, m]` and the weights of LISTA, which start from it and then are free."""

    def __init__(self, d: int, code_dim: int, iterations: int, sparsity: float) -> None:
        super().__init__()
        self.iterations = iterations
        self.sparsity = sparsity
        self.dictionary = nn.Parameter(F.normalize(torch.randn(d, code_dim), dim=0))
        self.encoder = nn.Parameter(torch.empty(code_dim, d))
        self.lateral = nn.Parameter(torch.empty(code_dim, code_dim))
        self.log_threshold = nn.Parameter(torch.empty(code_dim))
        start_lista(self)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `[B, N, m]` and residuals `[B, N, d]` of descriptors `[B, N, d]`."""
        weights = (self.encoder, self.lateral, self.log_threshold, self.dictionary)
        encoder, lateral, log_threshold, dictionary = (w.to(y.dtype) for w in weights)
        code = lista(y, encoder, lateral, log_threshold.exp(), self.iterations)
        return code, y - F.linear(code, dictionary)

    @torch.no_grad()
    def start(self, dictionary: Tensor) -> None:
        """From a dictionary, for which the codes are those of plain ISTA."""
        self.dictionary.copy_(dictionary)
        start_lista(self)

    def project_(self) -> None:
        """Atoms longer than 1 are cut back to length 1."""
        shorten_atoms_(self.dictionary)


@torch.no_grad()
def start_lista(coder: Any) -> None:
    """Set the `encoder`, `lateral` and `log_threshold` of a module from its `dictionary` and
    `sparsity`, to what gives the codes of plain ISTA."""
    encoder, lateral, threshold = ista(coder.dictionary.double(), coder.sparsity)
    coder.encoder.copy_(encoder)
    coder.lateral.copy_(lateral)
    coder.log_threshold.copy_(threshold.log().expand_as(coder.log_threshold))


@torch.no_grad()
def shorten_atoms_(dictionary: Tensor) -> None:
    """Cut columns that are longer than 1 back to length 1, in place."""
    dictionary.div_(dictionary.norm(dim=0).clamp_min(1))


def lista(
    y: Tensor, encoder: Tensor, lateral: Tensor, threshold: Tensor, iterations: int
) -> Tensor:
    """Codes `[..., m]` of `[..., d]`: `u0 = T(W y)`, `uk = T(S u(k-1) + W y)`, with the soft
    threshold T, the encoder W `[m, d]` and the lateral weights S `[m, m]`."""
    drive = F.linear(y, encoder)
    code = soft_threshold(drive, threshold)
    for _ in range(iterations):
        code = soft_threshold(drive + F.linear(code, lateral), threshold)
    return code


def soft_threshold(v: Tensor, threshold: Tensor) -> Tensor:
    """`sign(v) max(|v| - threshold, 0)`."""
    return v - torch.clamp(v, -threshold, threshold)


def ista(dictionary: Tensor, sparsity: float) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices of one ISTA step on `|x - B u|^2 + sparsity |u|_1`, B `[d, m]` (section 3.2):
    `W = 2t B^T` `[m, d]`, `S = I - 2t B^T B` `[m, m]` and the threshold `sparsity * t` `[]`, for
    the step `t = 1 / (2 lambda_max(B^T B))`."""
    gram = dictionary.T @ dictionary
    step = 0.5 / torch.linalg.eigvalsh(gram)[-1]
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return 2 * step * dictionary.T, identity - 2 * step * gram, sparsity * step


def learn_dictionary(y: Tensor, code_dim: int, sparsity: float, *, rounds: int = 200) -> Tensor:
    """Unit-norm atoms B `[d, m]` that lower the mean of `|y - B u|^2 + sparsity |u|_1` over B and
    u, for descriptors `[M, d]`; all float64.

    Each round alternates ISTA steps on the codes, warm-started, with projected gradient steps on
    the dictionary. Neither raises the objective. An atom that no code uses is replaced by a
    descriptor that is badly represented, which does not change the objective either.
    """
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(y), generator=generator)[:code_dim]
    # The noise fills in for descriptors that are missing (M < m) or zero.
    noise = torch.randn(code_dim, y.shape[1], generator=generator, dtype=y.dtype).to(y.device)
    atoms = 1e-3 * noise
    atoms[: len(chosen)] += y[chosen.to(y.device)]
    dictionary = F.normalize(atoms, dim=1).T
    code = y.new_zeros(len(y), code_dim)
    for _ in range(rounds):
        encoder, lateral, threshold = ista(dictionary, sparsity)
        drive = y @ encoder.T
        for _ in range(STEPS):
            code = soft_threshold(drive + code @ lateral, threshold)

        gram, cross = code.T @ code, y.T @ code
        curvature = torch.linalg.eigvalsh(gram)[-1].clamp_min(torch.finfo(y.dtype).tiny)
        for _ in range(STEPS):
            dictionary = dictionary - (dictionary @ gram - cross) / curvature
            dictionary = dictionary / dictionary.norm(dim=0).clamp_min(1)

        unused = (gram.diagonal() == 0).nonzero().flatten()[: len(y)]
        residual = y - code @ dictionary.T
        worst = residual.square().sum(1).topk(len(unused)).indices
        dictionary[:, unused] = F.normalize(residual[worst] + 1e-3 * noise[unused], dim=1).T
    return F.normalize(dictionary, dim=0)
