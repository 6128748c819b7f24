"""Vectors of all images of a folder, or of its shards, in Parquet files.

    accelerate launch recipes/embed.py --model NAME_OR_FOLDER_OR_HUB_ID --images FOLDER \\
        --output runs/embed
    python recipes/embed.py ... --engine ray --actors 8

The images, in subfolders, are taken `--part_size` at a time; or each shard of webdataset (*.tar) by
itself. A part becomes NAME.parquet: `key` (path, or key of webdataset), `label` (folder, or .cls)
and `vector`, float16, of unit length. What was interrupted goes on with the parts that are not
there; a part is made anew if its images, the model or the precision are others. The exit status is
1 if an image has no vector.

accelerate shares the parts out over its processes, Ray over actors, of this machine or of a cluster
whose machines all see the folders; it starts those that die again.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from tqdm.auto import tqdm

from timm_fisher.hub.text import shown
from timm_fisher.retrieval.extraction import Extractor, Part, list_parts
from timm_fisher.training.accelerator import use_all_cores
from timm_fisher.training.command_line import run
from timm_fisher.training.tables import three_digits


@dataclass
class Settings:
    """Write the vectors of all images of a folder.

    Args:
        model: released name, folder or Hub id USER/NAME.
        images: folder of images, with subfolders, or of shards.
        output: folder of the vectors.
        part_size: images in a file.
        engine: what shares the parts out.
        actors: of Ray.
        backbone: source of an adapter's backbone, such as local-dir:FOLDER.
        batch_size: images per step.
        workers: processes that load images, for each that embeds them.
        mixed_precision: null for what `accelerate launch` says.
    """

    model: str
    images: Path
    output: Path = Path('runs/embed')
    part_size: int = 10_000
    engine: Literal['accelerate', 'ray'] = 'accelerate'
    actors: int = 1
    backbone: str | None = None
    batch_size: int = 32
    workers: int = 2
    mixed_precision: Literal['no', 'fp16', 'bf16'] | None = None

    def __post_init__(self) -> None:
        for name in ('part_size', 'actors', 'batch_size'):
            if getattr(self, name) < 1:
                raise ValueError(f'--{name} is {getattr(self, name)}; give 1 or more.')


def main(settings: Settings) -> None:
    state = Accelerator(mixed_precision=settings.mixed_precision)
    use_all_cores(state)
    if settings.images.resolve() == settings.output.resolve():
        raise ValueError('--images and --output are the same folder. Give another for the vectors.')
    if settings.engine == 'ray' and state.num_processes > 1:
        raise ValueError('--engine ray needs one process: Ray starts the others.')
    parts = list_parts(settings.images, settings.part_size)
    others = {path.stem for path in settings.output.glob('*.parquet')} - {p.name for p in parts}
    if others:
        raise ValueError(
            f"'{shown(settings.output)}' holds '{min(others)}.parquet', which is no part of these "
            'images in parts of this size. Delete such files, or give another --output.'
        )
    options: dict[str, Any] = {
        'model': settings.model,
        'folder': settings.images.resolve(),
        'output': settings.output.resolve(),
        'backbone': settings.backbone,
        'batch_size': settings.batch_size,
        'workers': settings.workers,
        'mixed_precision': state.mixed_precision,
    }
    extractor = Extractor(**options)
    done = {part.name: extractor.problems(part) for part in parts}
    missing = [part for part in parts if done[part.name] is None]
    state.wait_for_everyone()  # before the first of them is written
    if state.is_main_process:
        print(f'{len(parts)} parts, {len(parts) - len(missing)} of them done')
    start = time.perf_counter()
    if settings.engine == 'ray':
        said = embed_by_ray(missing, options, settings.actors)
    else:
        own = missing[state.process_index :: state.num_processes]
        said = (extractor.extract(part) for part in own)
    # Processes do not wait for each other: the slowest may take hours more.
    rows = list(tqdm(said, unit='part', disable=not state.is_main_process or None))
    problems = [problem for row in rows for problem in row['problems']]
    if state.is_main_process:
        problems += [problem for known in done.values() for problem in known or ()]
    for problem in problems:
        print(f'Skipped: {shown(problem)}', file=sys.stderr)
    images, size = (sum(row[key] for row in rows) for key in ('images', 'bytes'))
    seconds = time.perf_counter() - start
    print(
        f'process {state.process_index}: {images} images in {seconds:.1f} s, '
        f'{three_digits(images / seconds)} a second; {three_digits(size / 2**20)} MiB '
        f'-> {shown(settings.output)}'
    )
    if problems:
        sys.exit(1)


def embed_by_ray(parts: list[Part], options: dict[str, Any], actors: int) -> Iterator[Any]:
    """What actors say of parts. ValueError if Ray is not installed."""
    if not parts:
        return
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
    try:
        import ray
    except ModuleNotFoundError:
        raise ValueError('--engine ray needs pip install "timm_fisher[ray]".') from None
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    on_gpu = ray.cluster_resources().get('GPU', 0) > 0
    # One block for each part: what is lost with an actor is one part.
    data = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=len(parts))
    yield from data.map_batches(
        Extractor,
        fn_constructor_kwargs=options,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_gpus=1 if on_gpu else 0,
    ).iter_rows()


if __name__ == '__main__':
    run(main, Settings)
