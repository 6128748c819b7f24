"""The contract that every pooling head keeps."""

from __future__ import annotations

import inspect
import reprlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

if TYPE_CHECKING:
    from timm_fisher.fitting.stream import DescriptorStream

MOST_FEATURES = 65_536  # of a size that an argument sets: dimensions, components, units
MOST_ITERATIONS = 1000
MOST_STEPS = 20  # of Newton-Schulz: more blow up what rounding makes of zero eigenvalues in float32
CONTEXT = ('grid', 'class_token')  # what `forward` may ask for beside the descriptors


@register_notrace_module  # a leaf of torch.fx's graphs, as timm makes them
class PoolingHead(nn.Module):
    """A set of local descriptors `[B, N, C]` -> one vector `[B, out_features]`.

    A subclass sets `in_features` and `out_features` in `__init__` and writes `forward`; the rest
    is optional. Its constructor takes `in_features` first, then keyword-only hyper-parameters
    with JSON values and no `**kwargs`: the signature is the configuration that is saved and that an
    unknown argument is checked against. A downloaded config chooses these values, so a constructor
    that builds or computes as much as they say refuses what is out of range (`check_range`). It
    also runs on the meta device, where a saved model is built first to be held against its weights.

    Whatever is fitted is a parameter or a persistent buffer, so that `state_dict()` is the head.
    A buffer that is derived from the arguments, such as an index, is not persistent; a method
    `init_non_persistent_buffers()` fills it again, as timm's layers have it.

    A head that needs more than the descriptors names it as a keyword of `forward` (and of its own
    `forward_with_loss`): `grid: tuple[int, int]`, rows and columns of the descriptors, which come
    row by row; `class_token: Tensor`, `[B, C]`. With the default None it takes what there is;
    without one, a backbone that cannot give it is refused.

    A head that weighs descriptors may have a method `attention(x)`, for pictures: for descriptors
    `[B, N, C]` it gives Q weights of each, `[B, Q, N]`, not negative, in their dtype.

    A head sees tensors and a `DescriptorStream`; it imports neither accelerate nor
    `torch.distributed`, and of timm only `timm.layers`. Second-order and log-probability
    mathematics run in float32 or better, with autocast off (`numerics.linalg`).

    Attributes:
        in_features: channels C of one descriptor.
        out_features: length of the pooled vector.
        asks_for: keywords of `forward` beside the descriptors, and whether it cannot do without.
        least_descriptors: fewest descriptors N of an image that the head can pool. A head that
            needs more than one sets it in `__init__`, and its `forward` refuses fewer with an
            error that names both numbers.
    """

    in_features: int
    out_features: int
    least_descriptors: int = 1
    asks_for: ClassVar[dict[str, bool]] = {}

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        parameters = inspect.signature(cls.forward).parameters
        empty = inspect.Parameter.empty
        cls.asks_for = {
            name: parameters[name].default is empty for name in CONTEXT if name in parameters
        }

    def forward(self, x: Tensor) -> Tensor:
        """Pooled vectors `[B, out_features]` of local descriptors `[B, N, C]`, in their dtype; N is
        free, and their order does not matter."""
        raise NotImplementedError(f'{type(self).__name__} must define forward().')

    def forward_with_loss(self, x: Tensor, **context: Any) -> tuple[Tensor, Tensor]:
        """As `forward`, and the head's unsupervised loss, a scalar, averaged over the batch; zero
        for a head that has none. Keywords are those that `forward` asks for."""
        return self(x, **context), x.new_zeros(())

    def fit(self, stream: DescriptorStream) -> None:
        """Start the parameters from data; a head without a data-driven start does nothing.

        Args:
            stream: the training set's descriptors. Reduce over ranks with `stream.sum`, so that
                a fit on two ranks equals the fit on one.
        """

    def partial_fit(self, stream: DescriptorStream) -> None:
        """One round of an update rule that the head brings, on a mini-batch, in place; a head that
        learns by gradients alone does nothing. Unsupervised stages call it before each step.

        Args:
            stream: the mini-batch: `batches()` gives this rank's part of it, `sum` adds over ranks.
        """

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must not pull towards zero, as timm's models have
        it; vectors and biases are spared anyway."""
        return set()

    def project_(self) -> None:
        """Bring the parameters back to their feasible set, in place, after an optimizer step."""

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` takes in the head's place: the head traced, for TorchScript does
        not know all of Python. For inference: it does what the head does in evaluation mode."""
        if self.asks_for:
            raise ValueError(
                f'torch.jit.script does not take {type(self).__name__} alone, which asks for '
                f'{" and ".join(self.asks_for)}. Script the whole model.'
            )
        return nn.Sequential(trace(self, example(self)[0]))

    def extra_repr(self) -> str:
        """Sizes, and the arguments that the head keeps under their names."""
        names = [name for name in inspect.signature(type(self)).parameters if name in vars(self)]
        settings = [f'{name}={vars(self)[name]!r}' for name in names if name != 'in_features']
        return ', '.join([f'{self.in_features} -> {self.out_features}', *settings])


def example(head: PoolingHead) -> tuple[Tensor, dict[str, Any]]:
    """Random descriptors to try a head on, 100 of each of two images or as many as it needs, and
    what else its `forward` asks for; the same each time."""
    rows = max(10, -(-head.least_descriptors // 10))
    size = (2, 10 * rows + 1, head.in_features)
    where = like(head)
    if where['device'].type == 'meta':  # which costs nothing, however large
        x = torch.empty(size, **where)
    else:
        x = torch.randn(size, generator=torch.Generator('cpu').manual_seed(0), device='cpu')
        x = x.to(**where)
    context = {'grid': (rows, 10), 'class_token': x[:, 0]}
    return x[:, 1:], {name: context[name] for name in head.asks_for}


def trace(
    module: nn.Module, example: Tensor | Sequence[Tensor], method: str = 'forward'
) -> torch.jit.ScriptModule:
    """A module as TorchScript, by what a method of one argument does with an example of it. Other
    numbers of images and descriptors give what the module gives, too."""
    with in_evaluation_mode(module), warnings.catch_warnings():
        # Of sizes that become constants, such as C.
        warnings.simplefilter('ignore')
        traced: torch.jit.ScriptModule = torch.jit.trace_module(
            module, {method: (example,)}, check_trace=False
        )
    return traced


@contextmanager
def in_evaluation_mode(module: nn.Module) -> Iterator[None]:
    """A module and all in it in evaluation mode, and afterwards each in the mode that it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def like(module: nn.Module) -> dict[str, Any]:
    """Device and type of a module's tensors, for a tensor that it takes."""
    tensors = [*module.parameters(), *module.buffers(), torch.empty(0)]
    tensor = next(filter(Tensor.is_floating_point, tensors))
    return {'device': tensor.device, 'dtype': tensor.dtype}


def cast_like(x: Tensor, where: dict[str, Any]) -> Tensor:
    """On the device of `like`, and, if it is of floating point, in its type."""
    return x.to(**where) if x.is_floating_point() else x.to(where['device'])


def check_range(
    head: str, /, **arguments: tuple[Any, float, float] | tuple[Any, float, float, None]
) -> None:
    """Refuse arguments of a head that are not numbers, or outside their range (ValueError).

    ```python
    check_range('3g', blocks=(blocks, 0, 64), reduce_dim=(reduce_dim, 1, MOST_FEATURES, None))
    ```

    Args:
        head: name of the head, to begin the error with.
        **arguments: for each argument its value, the least and the most that is allowed, and None
            where that is allowed too. Limits that are whole numbers ask for a whole number.
    """
    for name, (value, least, most, *others) in arguments.items():
        whole = isinstance(least, int) and isinstance(most, int)
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not (number and least <= value <= most) and not (value is None and others):
            kind = ' (whole numbers)' if whole and not number else ''
            raise ValueError(
                f'{head} takes {name} from {least:g} to {most:g}{kind}{" or None" * bool(others)}, '
                f'got {reprlib.repr(value)}.'
            )


class Unpooled(PoolingHead):
    """Stands where the head of a model was taken out: descriptors `[B, N, C]` as they are."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.in_features = self.out_features = in_features

    def forward(self, x: Tensor) -> Tensor:
        return x
