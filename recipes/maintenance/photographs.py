"""The photographs of recipes/photographs, chosen from TrashNet: what quickstart.py trains on.

    python recipes/maintenance/photographs.py TRASHNET recipes/photographs

TRASHNET has train/, val/ and test/CLASS/IMAGE. The choice depends on nothing but the names of the
files; test photographs come from its test split alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from timm_fisher.training.command_line import run

SHORT_SIDE = 256  # pixels


@dataclass
class Settings:
    """Choose photographs, and store them small.

    Args:
        folders: TrashNet, and where the photographs go.
        train: photographs of each class from the splits train and val.
        test: photographs of each class from the split test.
        quality: of the JPEG files.
    """

    folders: list[Path]
    train: int = 107
    test: int = 23
    quality: int = 75


def main(settings: Settings) -> None:
    if len(settings.folders) != 2:
        raise ValueError(f'Give two folders, TRASHNET and TARGET, not {len(settings.folders)}.')
    source, target = settings.folders
    size = 0
    for split, count in (('train', settings.train), ('test', settings.test)):
        parts = ['train', 'val'] if split == 'train' else ['test']
        for folder in sorted((source / 'train').iterdir()):
            paths = [path for part in parts for path in (source / part / folder.name).iterdir()]
            chosen = sorted(paths, key=lambda path: hashlib.sha256(path.name.encode()).digest())
            (target / split / folder.name).mkdir(parents=True, exist_ok=True)
            for path in chosen[:count]:
                small = target / split / folder.name / f'{path.stem}.jpg'
                image = Image.open(path).convert('RGB')
                scale = SHORT_SIDE / min(image.size)
                image = image.resize([round(side * scale) for side in image.size])
                image.save(small, quality=settings.quality, optimize=True, progressive=True)
                size += small.stat().st_size
    print(f'{size / 1e6:.2f} MB -> {target}')


if __name__ == '__main__':
    run(main, Settings, positional='folders')
