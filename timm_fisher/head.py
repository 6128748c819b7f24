"""The contract that every pooling head keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from timm_fisher.fitting.stream import DescriptorStream


class PoolingHead(nn.Module):
    """A set of local descriptors `[B, N, C]` -> one vector `[B, out_features]`.

    A subclass sets `in_features` and `out_features` in `__init__` and writes `forward`; the rest
    is optional. Its constructor takes `in_features` first, then keyword-only hyper-parameters
    with JSON values: the signature is the configuration that is saved and checked. It also runs on
    the meta device, where a saved model is built first to be held against its weights.

    Whatever is fitted is a parameter or a persistent buffer, so that `state_dict()` is the head.
    A head sees tensors and a `DescriptorStream`; it never imports timm, accelerate or
    `torch.distributed`.

    Attributes:
        in_features: channels C of one descriptor.
        out_features: length of the pooled vector.
    """

    in_features: int
    out_features: int

    def forward(self, x: Tensor) -> Tensor:
        """Pool descriptors.

        Args:
            x: local descriptors `[B, N, C]`; N is free and their order does not matter.

        Returns:
            Pooled vectors `[B, out_features]`, in the dtype of `x`.
        """
        raise NotImplementedError(f'{type(self).__name__} must define forward().')

    def forward_with_loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pool descriptors, and give the head's own unsupervised loss.

        Args:
            x: local descriptors `[B, N, C]`.

        Returns:
            Pooled vectors `[B, out_features]` and a scalar loss, averaged over the batch; zero
            for a head that has none.
        """
        return self(x), x.new_zeros(())

    def fit(self, stream: DescriptorStream) -> None:
        """Start the parameters from data; a head without a data-driven start does nothing.

        Args:
            stream: the training set's descriptors. Reduce over ranks with `stream.sum`, so that
                a fit on two ranks equals the fit on one.
        """

    def partial_fit(self, stream: DescriptorStream) -> None:
        """One round of the head's own update rule on a mini-batch, in place; a head that learns by
        gradients alone does nothing. Unsupervised stages call it before each step.

        Args:
            stream: the mini-batch: `batches()` gives this rank's part of it, `sum` adds over ranks.
        """

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must not pull towards zero, as timm's models have
        it; vectors and biases are spared anyway."""
        return set()

    def project_(self) -> None:
        """Bring the parameters back to their feasible set, in place, after an optimizer step."""
