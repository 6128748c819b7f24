"""Whether every installed head compiles and exports, as a Markdown table.

    python recipes/maintenance/check_export.py                                  # some minutes
    python recipes/maintenance/check_export.py 3g gem --ways '[onnx]' --backbone resnet18

Each head is tried inside a small model with random weights, and what comes out is compared with the
model itself. `export` and `onnx` trace one number of images, and are compared with another;
`compile` needs a C++ compiler on a CPU, `onnx` needs `pip install "timm_fisher[export]"`. A cell
says `ok` and the largest difference, relative to the largest entry, or the reason why not. The exit
status is 1 if a head with its default arguments fails, unless ONNX lacks an operation it needs.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import timm_fisher
from timm_fisher import get_head, list_heads
from timm_fisher.training.command_line import run
from timm_fisher.training.tables import table

# Options that take another way through a head's mathematics.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    '3g': [{'shrinkage': 0.5}, {'reduce_dim': 16}],  # eigh; fewer dimensions than descriptors
    'avg': [{'normalize': True}],
    'compact_bilinear': [{'sketch_dim': 16}],  # FFT; the default sketches second moments here
    'gmm_fisher': [{'l2_descriptors': False}],
    'mpn_cov': [{'log': True}],
    'sparse_fisher': [{'tied': True}],
}
# Heads that need what ONNX, or PyTorch's exporter to it, does not have.
WITHOUT_ONNX = {'mpn_cov'}  # the eigendecomposition
Way = Literal['compile', 'export', 'onnx']
SHAPES = ({0: torch.export.Dim('batch')},)


@dataclass
class Settings:
    """Whether every installed head compiles and exports, as a Markdown table.

    Args:
        heads: names; all that are installed if none is given.
        ways: that are tried.
        backbone: any timm architecture.
        tolerance: largest relative difference that is ok.
    """

    heads: list[str] = field(default_factory=list_heads)
    ways: list[Way] = field(default_factory=lambda: ['compile', 'export', 'onnx'])
    backbone: str = 'test_vit'  # has a class token, and descriptors enough for every head
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        for name in self.heads:
            get_head(name)  # refuses an unknown one before minutes have passed


def main(settings: Settings) -> None:
    warnings.filterwarnings('ignore')
    logging.disable(logging.WARNING)
    rows, failed = [], False
    cases = [(name, options) for name in settings.heads for options in [{}, *OPTIONS.get(name, [])]]
    for name, options in tqdm(cases, disable=None):
        torch.manual_seed(0)
        model = timm_fisher.create_model(settings.backbone, head=name, num_classes=0, **options)
        images = torch.randn(5, *model.pretrained_cfg['input_size'])
        results = [check(way, model.eval(), images, settings.tolerance) for way in settings.ways]
        failed |= not options and not all(
            works or (way == 'onnx' and name in WITHOUT_ONNX)
            for way, (works, _) in zip(settings.ways, results, strict=True)
        )
        title = ', '.join([f'`{name}`', *(f'`{key}={value}`' for key, value in options.items())])
        rows.append([title, *(cell for _, cell in results)])
    print(table(['head', *settings.ways], rows))
    if failed:
        sys.exit(1)


def check(way: str, model: nn.Module, images: Tensor, tolerance: float) -> tuple[bool, str]:
    """Whether a model comes through unchanged, and the cell that says so."""
    try:
        expected = model(images)
        difference = (WAYS[way](model, images) - expected).abs().max() / expected.abs().max()
    except ModuleNotFoundError as error:
        return False, f'{error.name} is not installed: `pip install "timm_fisher[export]"`'
    except Exception as error:  # whatever a compiler or exporter raises belongs in the table
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        sentence = str(cause).strip().partition('\n')[0].partition('. ')[0]
        return False, f'{type(cause).__name__}: {sentence}'.replace('|', '/')[:120]
    if not difference <= tolerance:
        return False, f'differs by {difference:.0e}'
    return True, f'ok, {difference:.0e}'


def compiled(model: nn.Module, images: Tensor) -> Any:
    torch.compiler.reset()
    with torch.no_grad():
        return torch.compile(model, fullgraph=True)(images)


def exported(model: nn.Module, images: Tensor) -> Any:
    return torch.export.export(model, (images[:2],), dynamic_shapes=SHAPES).module()(images)


def onnx(model: nn.Module, images: Tensor) -> Any:
    program: Any = torch.onnx.export(
        model, (images[:2],), dynamo=True, dynamic_shapes=SHAPES, verbose=False
    )
    return program(images)[0]


WAYS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    'compile': compiled,
    'export': exported,
    'onnx': onnx,
}


if __name__ == '__main__':
    run(main, Settings, positional='heads')
