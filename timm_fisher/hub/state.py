"""What a saved model would lose: state of a head, or of a layer, that is not in its state dict."""

from __future__ import annotations

import json
import reprlib
from typing import Any

import torch
from torch import Tensor, nn

from timm_fisher.errors import LoadError
from timm_fisher.head import PoolingHead, example, in_evaluation_mode
from timm_fisher.model import PooledModel
from timm_fisher.registry import title
from timm_fisher.specification import HeadSpec, parse_heads


def rebuild_derived_buffers(model: nn.Module) -> None:
    """Give buffers that are not saved their values, as timm's layers do."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device='cpu'))
        rebuild: Any = getattr(module, 'init_non_persistent_buffers', None)
        if rebuild is not None:
            rebuild()


def check_rebuildable(model: PooledModel) -> None:
    """Refuse, by a LoadError, a model with tensors that neither its weights nor its modules bring
    back."""
    saved = model.state_dict().keys()
    for place, module in model.named_modules():
        names = [name for name, _ in module.named_buffers(recurse=False)]
        lost = [name for name in names if f'{place}.{name}'.lstrip('.') not in saved]
        if hasattr(module, 'init_non_persistent_buffers'):
            lost = []
        lost += [name for name, value in vars(module).items() if isinstance(value, Tensor)]
        if lost:
            raise LoadError(
                f"{_owner(model, module)}{type(module).__name__} has the tensor '{lost[0]}', which "
                'is not saved and could not be computed again. Use register_buffer, or write '
                'init_non_persistent_buffers().'
            )


def check_json(model: PooledModel) -> None:
    """TypeError for an argument of a head that config.json cannot hold."""
    for name, _, arguments in _specifications(model):
        for key, value in arguments.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f'{title(name)} was given {key}={reprlib.repr(value)}, which cannot be saved '
                    f'as JSON: {error}. Its arguments must be numbers, texts, lists or dicts.'
                ) from error


def check_state(model: PooledModel, again: PooledModel) -> None:
    """Refuse, by a ValueError, a model with a head that pools in another way than its twin in
    `again`, the same model on the meta device, once that has its state dict: it keeps something
    else, such as a number that its fit has found."""
    for (head, _), (twin, _) in zip(model.heads, again.heads, strict=True):
        if _pools_otherwise(head, twin):
            raise ValueError(
                f'The model cannot be saved: {_owner(model, head)}{type(head).__name__} made again '
                'from its arguments and its state_dict() pools in another way. Keep all that a fit '
                'or a step changes in parameters or persistent buffers.'
            )


@torch.no_grad()
def _pools_otherwise(head: PoolingHead, twin: PoolingHead) -> bool:
    """On random descriptors. False also if the two cannot be compared: a head that draws random
    numbers, or wants other descriptors."""
    try:
        with torch.random.fork_rng([]), in_evaluation_mode(head):
            x, context = example(head)
            twin.load_state_dict(head.state_dict(), assign=True)
            rebuild_derived_buffers(twin)
            twin.to(x.device).eval()
            pooled, repeated, expected = (call(x, **context) for call in (head, head, twin))
        return _close(pooled, repeated) and not _close(pooled, expected)
    except Exception:
        return False


def _close(a: Tensor, b: Tensor) -> bool:
    # Up to what half precision and the order of sums leave.
    scale = a.nan_to_num(posinf=0.0, neginf=0.0).abs().max().item()
    return torch.allclose(a, b, rtol=1e-2, atol=1e-2 * scale, equal_nan=True)


def _specifications(model: PooledModel) -> list[HeadSpec]:
    given = model._model_args
    return parse_heads(given['head'], given.get('head_kwargs'))


def _owner(model: PooledModel, module: nn.Module) -> str:
    """`Head 'x' of the distribution 'y': ` for a head and what is in it, else nothing."""
    for (name, _, _), (head, _) in zip(_specifications(model), model.heads, strict=True):
        if module in head.modules():
            return f'{title(name)}: '
    return ''
