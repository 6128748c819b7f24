"""Images of a stream: shards of webdataset, or a data set that 🤗 datasets streams.

Nobody knows where an image lies, or, perhaps, how many there are: they are read as they come. Each
rank, and each process that loads for it, reads shards of its own.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from timm_fisher.images import convert
from timm_fisher.training.config import Config
from timm_fisher.training.data import Gives, Transform, create_transforms

BUFFER = 2048  # images, undecoded, of which training draws one at random
IMAGES = ('image', 'jpg', 'jpeg', 'png', 'webp')  # usual names of columns


@dataclass
class Stream:
    """This rank's share of a split, undecoded.

    Attributes:
        rows: a `datasets.IterableDataset`.
        image: name of their column.
        label: likewise; empty where no label is read.
        classes: names.
        number: of images, over all ranks.
        is_local: images may lie beside the rows.
    """

    rows: Any
    image: str
    label: str
    classes: list[str]
    number: int
    is_local: bool


@dataclass(eq=False)
class StreamImages(IterableDataset[Any]):
    """A stream through a transform, once: images and labels, or, to `named`, names as well, where
    rows have them. An image that cannot be decoded is an error that names it.

    Attributes:
        batches: of an epoch of training on this rank; None for all images, once.
    """

    gives: ClassVar[Gives] = 'images'
    stream: Stream
    transform: Transform
    mode: Literal['L', 'RGB']
    named: bool = False
    batches: int | None = None

    def __len__(self) -> int:
        """Images over all ranks."""
        return self.stream.number

    def __iter__(self) -> Iterator[Any]:
        return map(self._item, self.stream.rows)

    def set_epoch(self, epoch: int) -> None:
        """Another order, if it is a random one."""
        self.stream.rows.set_epoch(epoch)

    def name(self, i: int) -> str:
        """Of an image, for messages."""
        return f'number {i} of the stream'

    def _item(self, row: dict[str, Any]) -> tuple[Any, ...]:
        content, name = row[self.stream.image] or {}, row.get('__key__')
        try:
            with _open(content, self.stream.is_local) as file:
                image = convert(Image.open(file), self.mode)
        except Exception as error:  # Pillow's decoders raise what they like
            shown = name or content.get('path') or 'without a name'
            raise ValueError(f"Image '{shown}' cannot be decoded ({error}). Remove it.") from error
        item = self.transform(image), self._label(row)
        return (*item, name) if self.named and name is not None else item

    def _label(self, row: dict[str, Any]) -> int:
        classes, label = self.stream.classes, row.get(self.stream.label)
        if not self.stream.label:
            return 0
        if isinstance(label, str) and label in classes:
            return classes.index(label)
        if isinstance(label, int) and 0 <= label < len(classes):
            return label
        raise ValueError(
            f"'{self.stream.label}' is {label!r}; give a number below {len(classes)} or one of "
            f'{classes}.'
        )


def load_streams(config: Config) -> tuple[dict[str, Stream], list[str]]:
    """The splits 'train', 'val' and, if there is one, 'test', this rank's share of each; and the
    names of the classes.

    Raises:
        ValueError: settings that ask for more than a stream can do, no shards, no classes, or
            columns that are not there.
        ModuleNotFoundError: 🤗 datasets is not installed.
    """
    needs_index = {
        'val_split null; name a split': config.val_split is None,
        'max_train': config.max_train is not None,
        'max_test': config.max_test is not None,
        'cache true': config.cache,
        'per_class': any(stage.per_class for stage in config.stages.values()),
    }
    for name in (name for name, wanted in needs_index.items() if wanted):
        raise ValueError(f"'{config.dataset}' is read as it comes, which does not allow {name}.")
    names = {'train': config.train_split, 'val': config.val_split, 'test': config.test_split}
    streams = {role: _share(config, role, name) for role, name in names.items() if name}
    return streams, streams['train'].classes


def create_streams(
    config: Config, streams: dict[str, Stream], data_config: dict[str, Any]
) -> dict[str, StreamImages]:
    """Data sets by split name, preprocessed by timm's `data_config`; and 'augmented', the training
    split in random order, as `config.augment` says: on each rank the same number of whole batches.
    ValueError if there is none."""
    plain, augmenting, mode = create_transforms(config, data_config)
    world_size = PartialState().num_processes
    of_ranks = config.batch_size * world_size * config.grad_accum_steps
    batches = streams['train'].number // of_ranks * config.grad_accum_steps
    if not batches:
        raise ValueError(
            f'{streams["train"].number} training images do not fill a batch of {of_ranks} over all '
            'ranks and accumulated steps. Give a smaller batch_size.'
        )
    datasets = {role: StreamImages(stream, plain, mode) for role, stream in streams.items()}
    shards = max(1, streams['train'].rows.num_shards // max(1, config.workers))
    rows = streams['train'].rows.shuffle(
        seed=config.seed, buffer_size=BUFFER, max_buffer_input_shards=min(10, shards)
    )
    shuffled = replace(streams['train'], rows=rows)
    datasets['augmented'] = StreamImages(shuffled, augmenting or plain, mode, batches=batches)
    return datasets


class StreamLoader:
    """Batches of a stream on this rank's device: all images, once; or, of training, the whole
    batches of an epoch, for which they begin again where they end."""

    def __init__(self, dataset: StreamImages, batch_size: int, workers: int) -> None:
        self.dataset, self.batch_size = dataset, batch_size
        workers = min(workers, dataset.stream.rows.num_shards)
        self.loader = DataLoader(dataset, batch_size, num_workers=workers)

    def __len__(self) -> int:
        return len(self.loader) if self.dataset.batches is None else self.dataset.batches

    def set_epoch(self, epoch: int) -> None:
        """Another order."""
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        batches: Iterable[Any] = self.loader
        if self.dataset.batches is not None:
            batches = islice(_whole_batches(self.loader, self.batch_size), self.dataset.batches)
        for batch in batches:
            yield send_to_device(batch, PartialState().device)


def _whole_batches(loader: Iterable[Any], size: int) -> Iterator[Any]:
    """Batches of images and labels of a loader, again and again, each of so many: those that it
    leaves incomplete, at the end of each of its processes, are put together."""
    left: list[Any] = []
    for _ in repeat(None):
        seen = False
        for x, y in loader:
            seen = True
            left.append((x, y))
            if sum(len(y) for _, y in left) >= size:
                x, y = left[0] if len(left) == 1 else map(torch.cat, zip(*left, strict=True))
                left = [(x[size:], y[size:])] if len(y) > size else []
                yield x[:size], y[:size]
        if not seen:
            raise ValueError(
                f'Process {PartialState().process_index} has no images: there are too few shards '
                'for so many processes. Give fewer.'
            )


def _share(config: Config, role: str, split: str) -> Stream:
    """This rank's share of a split."""
    try:
        import datasets
        from datasets.distributed import split_dataset_by_node
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f'\'{config.dataset}\' needs pip install "timm_fisher[hfds]".'
        ) from None
    kind, _, name = config.dataset.partition('/')
    if kind == 'wds':
        info = _info(config.data_dir)
        files = {role: _shards(config.data_dir, split, info)}
        rows: Any = datasets.load_dataset(
            'webdataset', data_files=files, split=role, streaming=True
        )
        number = info.get('splits', {}).get(split, {}).get('num_samples')
    else:
        cache_dir = config.data_dir or None
        rows = datasets.load_dataset(name, split=split, streaming=True, cache_dir=cache_dir)
        number = getattr((rows.info.splits or {}).get(split), 'num_examples', None)
    columns = list(rows.features)
    images = [name for name in columns if isinstance(rows.features[name], datasets.Image)]
    image = _column('input_key', config.input_key, images, IMAGES)
    label, classes = '', list[str]()
    if not config.unsupervised:
        label = _column('target_key', config.target_key, columns, ('cls', 'label'))
        classes = list(config.classes or getattr(rows.features[label], 'names', []))
        if len(classes) < 2:
            raise ValueError(
                f"The column '{label}' of '{config.dataset}' names {len(classes)} classes. Give "
                '--classes, a list of two or more names.'
            )
    rows = rows.cast_column(image, datasets.Image(decode=False))
    state = PartialState()
    # With fewer shards than ranks, each rank reads all of them and takes images in turn.
    strategy = 'shards' if rows.num_shards >= state.num_processes else 'auto'
    rows = split_dataset_by_node(
        rows, rank=state.process_index, world_size=state.num_processes, strategy=strategy
    )
    given = config.train_samples if role == 'train' else None
    number = given or number or _count(rows, f'count {split}')
    is_local = kind == 'wds' or Path(name).exists()
    return Stream(rows, image, label, classes, number, is_local)


def _open(content: dict[str, Any], is_local: bool) -> Any:
    """A file of what 🤗 datasets has of an image: its bytes, or where it lies. ValueError for a
    place that a data set of somebody else must not name."""
    if content.get('bytes') is not None:
        return io.BytesIO(content['bytes'])
    path = content.get('path')
    if not path or not (is_local or path.startswith('hf://')):
        raise ValueError('it holds no image')
    import fsspec  # type: ignore[import-untyped]  # which 🤗 datasets needs

    return fsspec.open(path, 'rb')


def _column(option: str, wanted: str | None, columns: list[str], usual: Sequence[str]) -> str:
    """The column that a configuration names, or the first usual one. ValueError if it is none."""
    for name in usual if wanted is None else [wanted]:
        if name in columns:
            return name
    raise ValueError(f'--{option} is {wanted or "not given"}; give one of {columns}.')


def _info(folder: str) -> dict[str, Any]:
    """What timm's file beside the shards says of them: for each split its files and images."""
    for path in (Path(folder, '_info.json'), Path(folder, 'info.json')):
        if path.is_file():
            content: dict[str, Any] = json.loads(path.read_text())
            return content
    return {}


def _shards(folder: str, split: str, info: dict[str, Any]) -> list[str]:
    """Files of a split: those that `info` lists, SPLIT*.tar, or SPLIT as a pattern such as
    train-{0000..0146}.tar. ValueError if there are none."""
    if split in info.get('splits', {}):
        names = [Path(name).name for name in info['splits'][split]['filenames']]
    else:
        names = _expand(split) if '.tar' in split else [f'{split}*.tar', f'{split}/*.tar']
    if '://' in folder:
        return [f'{folder.rstrip("/")}/{name}' for name in names]
    found = {name: [*Path(folder).glob(name)] for name in names}
    missing = [name for name in names if not found[name]]
    if missing and ('*' not in missing[0] or len(missing) == len(names)):
        raise ValueError(
            f"'{folder}' has no {' or '.join(missing[:2])}. Give the split's name, or a pattern "
            "such as 'train-{0000..0146}.tar'."
        )
    return sorted({str(path) for paths in found.values() for path in paths})


def _expand(pattern: str) -> list[str]:
    """`a-{08..10}.tar` is a-08.tar, a-09.tar, a-10.tar."""
    match = re.search(r'\{(\d+)\.\.(\d+)\}', pattern)
    if not match:
        return [pattern]
    numbers = range(int(match[1]), int(match[2]) + 1)
    before, after = pattern[: match.start()], pattern[match.end() :]
    names = (f'{before}{number:0{len(match[1])}}{after}' for number in numbers)
    return [*chain.from_iterable(map(_expand, names))]


def _count(rows: Any, title: str) -> int:
    """Images over all ranks, for which all are read once, undecoded."""
    own = sum(1 for _ in tqdm(rows, title, disable=PartialState().process_index > 0 or None))
    return sum(gather_object([own]))
