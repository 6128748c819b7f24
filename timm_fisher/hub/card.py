"""The model card of a saved model, from one template (`card_template.md`), and what becomes of an
edited one."""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch.utils.flop_counter import FlopCounterMode

from timm_fisher.head import PoolingHead
from timm_fisher.registry import list_heads

TEMPLATE = Path(__file__).with_name('card_template.md')
# At the end of a card: digests of its parts when it was made, so that edits are recognised.
_SEAL = '<!-- made by timm_fisher: {} -->'
_SEALED = re.compile(rf'^{_SEAL.format("(.*)")}$', re.MULTILINE)
# Metadata that describe the model alone. Others, such as the licence, are also the user's.
_OF_THE_MODEL = ('base_model', 'base_model_relation', 'library_name', 'model-index', 'pipeline_tag')
METRICS = {'accuracy': 'Accuracy', 'balanced_accuracy': 'Balanced accuracy'}


def make_card(
    model: Any,
    stored_parameters: int,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    *,
    repo_id: str = 'USER/NAME',
    adapter: bool = False,
    description: str = '',
    dataset: str = '',
    dataset_id: str = '',
    license: str = '',
    commands: Sequence[str] = (),
    usage: str = '',
    limits: Sequence[str] = (),
) -> str:
    """The text of README.md, metadata included.

    Args:
        model: `PooledModel`.
        stored_parameters: numbers in model.safetensors.
        config: content of config.json.
        metrics: content of metrics.json, as recipes/train.py leaves it: a result (`accuracy`, ...)
            for 'test' or 'val', the `command`, `seed` and `versions` of the run, and `seeds`, the
            test accuracy of each seed, where several were run.
        repo_id: the Hub's repository.
        adapter: head and classifier alone are stored.
        description: what the model is, in a sentence or two.
        dataset: name of the data set that it was trained on; empty for that of the metrics.
        dataset_id: the Hub's repository of the data set.
        license: identifier, such as 'apache-2.0'; empty for that of the backbone's weights.
        commands: shell commands that repeat training or the figures, in order.
        usage: what a reader must know to load it, as Markdown.
        limits: what it is not good for, one sentence each.

    Raises:
        TypeError: `commands` or `limits` is one text.
    """
    for name, texts in (('commands', commands), ('limits', limits)):
        if isinstance(texts, str):
            raise TypeError(f"The card's {name} must be a list of texts, not {texts!r:.200}.")
    weights = model.backbone_weights or {}
    base = (weights.get('hf_hub_id') or '').partition('@')[0]
    split = next((name for name in ('test', 'val') if name in metrics), None)
    arguments = model._model_args
    if isinstance(arguments['head'], str):
        asked = [{'name': arguments['head'], **(arguments.get('head_kwargs') or {})}]
        heads = [model.head]
    else:
        asked, heads = arguments['head'], list(model.head)
    names = [each['name'] for each in asked]
    dataset = dataset or metrics.get('dataset', '')
    license = license or model.backbone.pretrained_cfg.get('license') or ''
    results = []
    if split and dataset:
        results = [
            EvalResult(
                task_type='image-classification',
                dataset_type=dataset_id or dataset.lower().replace(' ', '-'),
                dataset_name=dataset,
                dataset_split=split,
                metric_type=key,
                metric_name=METRICS[key],
                metric_value=round(100 * float(metrics[split][key]), 2),
            )
            for key in METRICS
            if key in metrics[split]
        ]
    data = ModelCardData(
        model_name=repo_id.rpartition('/')[2],
        library_name='timm',
        license=license or None,
        base_model=base or None,
        base_model_relation=('adapter' if adapter else 'finetune') if base else None,
        datasets=[dataset_id] if dataset_id else None,
        pipeline_tag='image-classification' if model.num_classes else 'image-feature-extraction',
        tags=['timm', 'timm_fisher', *names],
        eval_results=results or None,
    )
    size = config['pretrained_cfg']['input_size']
    classes = config.get('label_names') or config['pretrained_cfg'].get('label_names') or []
    text: str = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        description=description,
        adapter=adapter,
        backbone=model.backbone.pretrained_cfg['architecture'],
        base=base,
        digest=weights.get('sha256', ''),
        heads=[
            {'name': each['name'], 'arguments': each, 'method': method(head)}
            for each, head in zip(asked, heads, strict=True)
        ],
        stage=arguments.get('stage', -1),
        class_token=arguments.get('class_token', 'drop'),
        last_stride=arguments.get('last_stride'),
        classes=[' '.join(name.replace('|', '/').split()) for name in classes],
        num_classes=model.num_classes,
        input_size=' x '.join(map(str, size)),
        out_features=model.head_hidden_size,
        parameters=sum(each.numel() for each in model.parameters()),
        stored_parameters=stored_parameters,
        gmacs=count_macs(model, size) / 1e9,
        dataset=dataset,
        split=split,
        result=metrics.get(split, {}) if split else {},
        seeds=metrics.get('seeds') or {},
        seed=metrics.get('seed'),
        command=metrics.get('command', ''),
        best=(metrics.get('best') or {}) if split else {},
        commands=list(commands),
        usage=usage,
        limits=list(limits),
        versions=metrics.get('versions') or installed_versions(),
    ).content
    return text


def check_metrics(metrics: Any, model: Any) -> None:
    """Refuse metrics that a card cannot report, or that are not of this model.

    Raises:
        ValueError: a part is not of the form that recipes/train.py writes, or the run was of
            another model.
    """
    if not isinstance(metrics, Mapping):
        raise ValueError(f'metrics are {str(metrics)[:200]}, not a table of results.')
    tables = dict.fromkeys(('test', 'val'), METRICS) | {'seeds': metrics.get('seeds') or ()}
    for key, numbers in tables.items():
        table = metrics.get(key)
        if key not in metrics:
            continue
        if not isinstance(table, Mapping):
            raise ValueError(f"metrics['{key}'] is {str(table)[:200]}, not a table of numbers.")
        for name in numbers:
            value = table.get(name, 0.0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(
                    f"metrics['{key}']['{name}'] is {value!r:.200}, not a number from 0 to 1."
                )
        if key != 'seeds' and 'accuracy' not in table:
            raise ValueError(f"metrics['{key}'] has no 'accuracy', only {sorted(table)}.")
    if metrics and not {'test', 'val'} & set(metrics):
        raise ValueError(f"metrics have no 'test' and no 'val', only {sorted(metrics)}.")
    for key in ('versions', 'best'):
        if not isinstance(metrics.get(key) or {}, Mapping):
            raise ValueError(f"metrics['{key}'] is {str(metrics[key])[:200]}, not a table.")
    if not isinstance(metrics.get('dataset', ''), str):
        raise ValueError(f"metrics['dataset'] is {str(metrics['dataset'])[:200]}, not a text.")
    found = {
        'head': json.loads(json.dumps(model._model_args['head'])),
        'out_features': model.head_hidden_size,
        'parameters': sum(each.numel() for each in model.parameters()),
    }
    for key, value in found.items():
        if metrics.get(key, value) != value:
            raise ValueError(
                f'These metrics are of another model: {key} is {str(metrics[key])[:200]} there, '
                f'{str(value)[:200]} here.'
            )


@dataclass
class _Parts:
    """Of a card: metadata by their keys, and sections by their headings.

    `made` holds the digests of the parts as they were made, by the digests of their names: None
    for a card without seal.
    """

    metadata: dict[str, Any]
    sections: dict[str, str]
    made: dict[str, str] | None

    def digests(self) -> dict[str, str]:
        found = {key: json.dumps(each, default=str) for key, each in self.metadata.items()}
        return {_digest(name): _digest(text) for name, text in (found | self.sections).items()}

    def edited(self) -> set[str]:
        """Names of what somebody has written, or written anew."""
        now, made = self.digests(), self.made or {}
        names = (*self.metadata, *self.sections)
        return {name for name in names if made.get(_digest(name)) != now[_digest(name)]}

    def text(self) -> str:
        data = ModelCardData(**self.metadata, ignore_metadata_errors=True)
        made = ' '.join(map(':'.join, (self.made or {}).items()))
        seal = [] if self.made is None else [_SEAL.format(made)]
        body = '\n\n'.join([*self.sections.values(), *seal])
        return f'---\n{data}\n---\n\n{body}\n'


def _digest(text: str) -> str:
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:8]


def _parts(text: str) -> _Parts:
    card = ModelCard(text, ignore_metadata_errors=True)
    found = _SEALED.search(card.text)
    made = dict(re.findall(r'(\w+):(\w+)', found[1])) if found else None
    sections: dict[str, str] = {}
    for section in re.split(r'^(?=## )', _SEALED.sub('', card.text), flags=re.MULTILINE):
        if not section.strip():
            continue
        name = section.partition('\n')[0] if section.startswith('## ') else ''
        while name in sections:  # of one heading
            name += '#'
        sections[name] = section.strip()
    data: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    return _Parts(data, sections, made)


def seal(text: str) -> str:
    """A card as it was made, with a last line by which `merge_cards` recognises later edits."""
    parts = _parts(text)
    parts.made = parts.digests()
    return parts.text()


def merge_cards(new: str, old: bytes, where: str) -> str:
    """The card that takes the place of an old one, with what somebody had written there.

    Part by part, that is heading by heading, and for each field of the metadata: what was edited
    in the new card counts, then what was edited, added or taken out in the old one, then what was
    made for the new one. Fields that describe the model always come from the new card, tags from
    both. Of a card without seal all text is somebody's own, and stays alone.

    Args:
        new: sealed card.
        old: card that is there, in UTF-8.
        where: place of the old card, for messages.

    Raises:
        ValueError: the old card cannot be read.
    """
    mine = _parts(new)
    try:
        text = old.decode().replace('\r\n', '\n')
        theirs = _parts(text)
        tags = dict.fromkeys(theirs.metadata.get('tags') or [])
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f'{where} has text or metadata that cannot be read; mend or delete it there '
            f'({str(error).splitlines()[0]})'
        ) from error
    fresh, of_model = mine.digests(), {*_OF_THE_MODEL, 'tags'}
    if theirs.made is None and theirs.sections:
        # As if all sections had been made for it, and were taken out.
        theirs.made = {_digest(name): fresh[_digest(name)] for name in mine.sections}
        warnings.warn(
            f"{where} is somebody's own: its text stays, and results are added to its metadata "
            'alone. Without it, the whole card is written.',
            stacklevel=2,
        )
    made = theirs.made or {}
    kept = theirs.edited() - mine.edited() - of_model
    known = {name for name in (*mine.metadata, *mine.sections) if _digest(name) in made}
    removed = known - {*theirs.metadata, *theirs.sections} - mine.edited() - of_model

    metadata = {key: value for key, value in mine.metadata.items() if key not in removed}
    metadata |= {key: theirs.metadata[key] for key in theirs.metadata if key in kept}
    others = [tag for tag in tags if tag not in list_heads()]
    metadata['tags'] = list(dict.fromkeys([*others, *(mine.metadata.get('tags') or [])]))

    names = [name for name in mine.sections if name not in removed]
    place = int(names[:1] == [''])
    for name in theirs.sections:  # what somebody has added follows what it followed there
        if name not in names and name in kept:
            names.insert(place, name)
        place = names.index(name) + 1 if name in names else place
    sections = {name: (theirs if name in kept else mine).sections[name] for name in names}
    merged = _Parts(metadata, sections, mine.made)
    outdated = [
        name or 'the first lines'
        for name in names
        if name in kept
        and name in mine.sections
        and made.get(_digest(name)) != fresh[_digest(name)]
    ]
    if outdated:
        warnings.warn(
            f'{where} keeps the edited text of {", ".join(outdated)}: see whether it fits this '
            'model.',
            stacklevel=2,
        )
    return text if merged == theirs else merged.text()


def method(head: PoolingHead) -> str:
    """What the file of a head says of it: formulas, source, and where the paper is silent."""
    return inspect.getdoc(sys.modules[type(head).__module__]) or ''


def count_macs(model: Any, input_size: Sequence[int]) -> int:
    """Multiplications and additions, in pairs, of the matrix products and convolutions of a forward
    pass of one image."""
    like = next(model.parameters())
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.eval()(torch.zeros(1, *input_size, device=like.device, dtype=like.dtype))
    finally:
        for module, training in modes.items():
            module.training = training
    return int(counter.get_total_flops()) // 2


def installed_versions() -> dict[str, str]:
    """Versions of what computes the results."""
    packages = ('timm_fisher', 'timm', 'torch')
    return {'python': platform.python_version(), **{name: version(name) for name in packages}}
