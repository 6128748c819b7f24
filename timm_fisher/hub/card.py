"""The model card of a saved model, from one template (`card_template.md`)."""

from __future__ import annotations

import copy
import inspect
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import torch
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch.utils.flop_counter import FlopCounterMode

from timm_fisher.hub.metrics import MEASURES
from timm_fisher.hub.readme import REPOSITORY, generate
from timm_fisher.hub.text import code_block, escape_markdown, is_shown
from timm_fisher.lora import is_factor
from timm_fisher.specification import parse_heads

TEMPLATE = Path(__file__).with_name('card_template.md')
MOST_LABELS_SHOWN = 1000


def make_card(
    model: Any,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    *,
    repo_id: str = 'USER/NAME',
    adapter: bool = False,
    stored_bytes: int = 0,
    description: str = '',
    dataset: str = '',
    dataset_id: str = '',
    license: str = '',
    commands: Sequence[str] = (),
    usage: str = '',
    limits: Sequence[str] = (),
) -> str:
    """The text of README.md, metadata included.

    Names of classes, heads' arguments and what comes from `metrics` are shown as they are, whatever
    they hold. `description`, `usage` and `limits` are the caller's own Markdown.

    Args:
        model: `PooledModel`.
        config: content of config.json.
        metrics: content of metrics.json, checked by `check_metrics`: a result (`accuracy`, ...) for
            'test' or 'val', the run's `command`, `seed`, `versions`, and the accuracy of `seeds`.
        repo_id: the Hub's repository.
        adapter: head and classifier alone are stored, and factors of LoRA.
        stored_bytes: size of model.safetensors; 0 if it is not to be shown.
        description: what the model is, in a sentence or two.
        dataset: name of the data set that it was trained on; empty for that of the metrics.
        dataset_id: the Hub's repository of the data set.
        license: identifier, such as 'apache-2.0'; empty for that of the backbone's weights.
        commands: shell commands that repeat training or the figures, in order.
        usage: what a reader must know to load it, as Markdown.
        limits: what it is not good for, one sentence each.

    Raises:
        TypeError: `commands` or `limits` is one text.
        ValueError: the name of a repository that cannot be one.
    """
    for name, texts in (('commands', commands), ('limits', limits)):
        if isinstance(texts, str):
            raise TypeError(f"The card's {name} must be a list of texts, not {texts!r:.200}.")
    arguments = config['model_args']
    weights = arguments.get('backbone_weights') or {}
    base = (weights.get('hf_hub_id') or '').partition('@')[0]
    for repository in filter(None, (repo_id, dataset_id, base)):
        validate_repo_id(repository)
    split = next((key for key in ('test', 'val') if 'accuracy' in metrics.get(key, {})), '')
    result = metrics.get(split, {})
    dataset = dataset or metrics.get('dataset') or ''
    if weights:
        license = license or model.backbone.pretrained_cfg.get('license') or ''
    specs = parse_heads(arguments['head'], arguments.get('head_kwargs'), arguments.get('stage', -1))
    asked = [
        {'name': name, **({} if stage == -1 else {'stage': stage}), **options}
        for name, stage, options in specs
    ]
    metadata = {
        'base_model': base,
        'base_model_relation': base and ('adapter' if adapter else 'finetune'),
        'datasets': [dataset_id] if dataset_id else None,
        'library_name': 'timm',
        'license': license,
        'pipeline_tag': f'image-{"classification" if model.num_classes else "feature-extraction"}',
        'tags': list(dict.fromkeys(['timm', 'timm_fisher', *(head['name'] for head in asked)])),
    }
    if dataset and result:
        entry = {
            'task': {'type': 'image-classification'},
            'dataset': {
                'name': dataset,
                'type': dataset_id or dataset.lower().replace(' ', '-'),
                'split': split,
            },
            'metrics': [
                {'type': key, 'value': round(100 * float(result[key]), 2), 'name': name}
                for key, name in MEASURES.items()
                if key in result
            ],
        }
        metadata['model-index'] = [{'name': repo_id.rpartition('/')[2], 'results': [entry]}]
    size = config['pretrained_cfg']['input_size']
    labels = config.get('label_names') or config['pretrained_cfg'].get('label_names') or []
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {'plain': _plain, 'code_block': code_block}
    text = environment.from_string(TEMPLATE.read_text(encoding='utf-8')).render(
        repository=REPOSITORY.format(repo_id),
        repo_id=repo_id,
        description=description,
        adapter=adapter,
        model=model,
        base=base,
        weights=weights,
        arguments=arguments,
        heads=[
            # What the file of a head says of it: formulas, source, and where the paper is silent.
            (given, inspect.getdoc(sys.modules[type(head).__module__]) or '')
            for given, (head, _) in zip(asked, model.heads, strict=True)
        ],
        labels=labels,
        shown=MOST_LABELS_SHOWN,
        input_size=' x '.join(map(str, size)),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        stored_parameters=sum(
            value.numel()
            for key, value in model.state_dict().items()
            if not (adapter and key.startswith('backbone.') and not is_factor(key))
        ),
        stored_bytes=stored_bytes,
        macs=count_macs(model, size),
        dataset=dataset,
        split=split,
        result=result,
        metrics=metrics,
        commands=[str(metrics.get('command') or ''), *commands],
        usage=usage,
        limits=limits,
        versions=metrics.get('versions') or installed_versions(),
    )
    return generate({key: value for key, value in metadata.items() if value}, text)


def _plain(value: Any) -> str:
    """A value that stands in a line of Markdown as it is."""
    text = ' '.join(str(value).split())
    return escape_markdown(''.join(c if is_shown(c) else '\ufffd' for c in text))


def count_macs(model: Any, input_size: Sequence[int]) -> int | None:
    """Multiplications and additions, in pairs, of the matrix products and convolutions of a forward
    pass of one image of `input_size` (channels, height, width); None for a model whose pass depends
    on the values of its descriptors.

    It runs on the meta device, where an image of any size costs neither memory nor time.
    """
    dtype = next((value.dtype for value in model.parameters()), torch.float32)
    image = torch.empty(1, *input_size, device='meta', dtype=dtype)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            copy.deepcopy(model).to('meta').eval()(image)
    except (NotImplementedError, RuntimeError):
        return None
    return int(counter.get_total_flops()) // 2


def installed_versions() -> dict[str, str]:
    """Versions of what computes the results."""
    packages = ('timm_fisher', 'timm', 'torch')
    return {'python': platform.python_version(), **{name: version(name) for name in packages}}
