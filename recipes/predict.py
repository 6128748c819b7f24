"""The classes of images by a saved or released model, and which parts of the images decided.

    python recipes/predict.py photo.jpg folder/of/images --model NAME_OR_FOLDER_OR_HUB_ID

Prints the top classes and leaves them in `--output`, in predictions.csv; and, where the model pools
local descriptors, overlays/IMAGE.png: the image as the model sees it, and over it what each of its
parts adds to the logit of the winning class. The exit status is 1 if an image cannot be read, or
the output for it is NaN.

Images are read as training and evaluation read them, by timm: not turned upright by their EXIF.
Cells of predictions.csv that a spreadsheet would take for a formula begin with an apostrophe.
"""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from tqdm.auto import tqdm

from timm_fisher.device import to_device
from timm_fisher.explain import attention, class_names, explain, overlay
from timm_fisher.files import save_png, write
from timm_fisher.hub.pypi import from_pretrained_or_pypi
from timm_fisher.hub.text import csv_cell, shown
from timm_fisher.images import endings, read_image
from timm_fisher.training.command_line import run

BATCH = 8  # images


@dataclass
class Settings:
    """Classify images, and show which of their parts decided.

    Args:
        images: image files, or folders of them.
        model: released name, folder or Hub id USER/NAME.
        topk: classes to show.
        output: folder of results.
        backbone: source of an adapter's backbone, such as local-dir:FOLDER.
        overlay: draw the overlays; false for classes only.
    """

    images: list[str]  # a Path would have to be UTF-8 on the command line
    model: str
    topk: int = 3
    output: Path = Path('runs/predict')
    backbone: str | None = None
    overlay: bool = True

    def __post_init__(self) -> None:
        if self.topk < 1:
            raise ValueError(f'--topk is {self.topk}; give 1 or more.')


def main(settings: Settings) -> None:
    given = [Path(image) for image in settings.images]
    overlays = find_images(given, settings.output / 'overlays')
    paths = list(overlays)
    model = from_pretrained_or_pypi(settings.model, settings.backbone)
    names = class_names(model)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    to_device(model, device).eval().requires_grad_(False)
    data = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**data)

    explained = settings.overlay
    table, lines, skipped = [('image', 'rank', 'class', 'probability')], [], False
    for start in tqdm(range(0, len(paths), BATCH), 'predict', disable=None):
        images = {}
        for path in paths[start : start + BATCH]:
            try:
                images[path] = transform(read_image(path, data['input_size'][0]))
            except ValueError as error:
                tqdm.write(f'Skipped: {shown(error)}', file=sys.stderr)
                skipped = True
        if not images:
            continue
        x = torch.stack([*images.values()]).to(device)
        if explained:
            try:
                logits, heat = explain(model, x)
                weights = attention(model, x)
            except ValueError as error:
                tqdm.write(f'No overlays: {error}')
                explained = False
        if not explained:
            with torch.inference_mode():
                logits = model(x)
        top = logits.float().softmax(1).cpu().topk(min(settings.topk, len(names)))
        for i, path in enumerate(images):
            if not logits[i].isfinite().all():
                reason = f"the model's output is NaN or infinite for '{path}'."
                tqdm.write(f'Skipped: {shown(reason)}', file=sys.stderr)
                skipped = True
                continue
            best = [(names[k], p) for k, p in zip(top.indices[i], top.values[i], strict=True)]
            lines += [shown(path), *(f'  {p:7.2%}  {name}' for name, p in best)]
            for rank, (name, p) in enumerate(best, 1):
                table.append((csv_cell(shown(path)), str(rank), csv_cell(name), f'{p:.6f}'))
            if explained:
                title = f'{best[0][0]}, {best[0][1]:.1%}'
                overlays[path].parent.mkdir(parents=True, exist_ok=True)
                seen = None if weights is None else weights[i]
                figure = overlay(model, x[i], heat[i], weights=seen, title=title)
                save_png(figure, overlays[path])

    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(table)
    settings.output.mkdir(parents=True, exist_ok=True)
    write(settings.output / 'predictions.csv', text.getvalue())
    print(*lines, f'-> {shown(settings.output)}', sep='\n')
    if skipped:
        sys.exit(1)


def find_images(given: Sequence[Path], overlays: Path) -> dict[Path, Path]:
    """The files that were given, and all images in the folders, sorted; each of them once, and
    without the overlays of an earlier call. For each the path of its overlay: as it is below the
    folder that all images are in."""
    known = endings()
    images: list[Path] = []
    for path in given:
        if not path.exists():
            raise ValueError(f"'{shown(path)}' is neither a file nor a folder.")
        files = [path]
        if path.is_dir():
            files = [p for p in sorted(path.rglob('*')) if p.suffix.lower() in known]
            drawn = Path(os.path.realpath(overlays))
            # Unlike Path.resolve(), realpath takes a link to itself.
            real = [Path(os.path.realpath(p)) for p in files]
            pairs = zip(files, real, strict=True)
            files = [p for p, place in pairs if not p.is_dir() and drawn not in place.parents]
            if not files:
                raise ValueError(f"'{shown(path)}' holds no image ({' '.join(known)}).")
        images += files
    once = {os.path.abspath(path): path for path in images}
    above = os.path.commonpath([os.path.dirname(full) for full in once])
    return {path: overlays / f'{os.path.relpath(full, above)}.png' for full, path in once.items()}


if __name__ == '__main__':
    run(main, Settings, positional='images')
