"""The model card of a saved model, from one template (`card_template.md`)."""

from __future__ import annotations

import inspect
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch.utils.flop_counter import FlopCounterMode

from timm_fisher.head import PoolingHead

TEMPLATE = Path(__file__).with_name('card_template.md')
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
        limits: what it is not good for, one sentence each.
    """
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
        commands=list(commands),
        limits=list(limits),
        versions=metrics.get('versions') or installed_versions(),
        license=license,
    ).content
    return text


def check_metrics(metrics: Any) -> None:
    """Refuse metrics that a card cannot report.

    Raises:
        ValueError: a part is not of the form that recipes/train.py writes.
    """
    if not isinstance(metrics, Mapping):
        raise ValueError(f'metrics are {str(metrics)[:200]}, not a table of results.')
    tables = dict.fromkeys(('test', 'val'), METRICS) | {'seeds': metrics.get('seeds') or ()}
    for key, numbers in tables.items():
        table = metrics.get(key)
        if table is None:
            continue
        if not isinstance(table, Mapping):
            raise ValueError(f"metrics['{key}'] is {str(table)[:200]}, not a table of numbers.")
        for name in numbers:
            value = table.get(name, 0.0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(
                    f"metrics['{key}']['{name}'] is {str(value)[:200]}, not a number from 0 to 1."
                )
    if not isinstance(metrics.get('versions') or {}, Mapping):
        raise ValueError(
            f"metrics['versions'] is {str(metrics['versions'])[:200]}, not a table of packages."
        )


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
