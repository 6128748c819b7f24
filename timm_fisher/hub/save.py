"""Saving a model as a folder that plain `timm.create_model` loads."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import timm
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import Tensor, nn

from timm_fisher.errors import LoadError, explain_errors
from timm_fisher.hub import readme
from timm_fisher.hub.card import make_card
from timm_fisher.hub.config import check_file, check_images
from timm_fisher.hub.metrics import check_metrics, read_metrics
from timm_fisher.hub.replace import replace_files
from timm_fisher.hub.text import LONGEST_LABEL, MOST_LABELS, problem
from timm_fisher.hub.weights import WEIGHTS, digest, read_shapes
from timm_fisher.model import PooledModel
from timm_fisher.registry import check_arguments, nearest

HUB_USER = 'timm-fisher'
RELEASED = (
    'mnist-dbm-idfk',
    'trashnet-3g',
    'trashnet-dbm-idfk',
    'trashnet-gmm-fisher',
    'trashnet-gsnmf',
    'trashnet-isqrt-cov',
    'trashnet-sparse-fisher',
)
FILES = ('config.json', WEIGHTS, 'README.md', 'metrics.json')
CHECKOUT = Path(__file__).parent.parent.parent / 'hub_cards'
_NOT_OF_THE_CARD = ('model', 'stored_parameters', 'config', 'metrics', 'adapter')


def list_pretrained() -> list[str]:
    """Short names of the released models, for `from_pretrained`."""
    return list(RELEASED)


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    backbone: str | None = None,
    any_backbone: bool = False,
    **arguments: Any,
) -> PooledModel:
    """Load a saved model, everything that was saved.

    ```python
    from_pretrained('trashnet-sparse-fisher', num_classes=3)
    ```

    Args:
        name: short name of a released model, which comes from the folder hub_cards where the
            package runs from its checkout, else from the Hub; a folder, or 'local-dir:FOLDER'; or
            USER/NAME on the Hub, or 'hf-hub:USER/NAME'.
        revision: branch, tag or commit on the Hub.
        backbone: where an adapter's backbone comes from instead of the Hub: a name that
            `timm.create_model` takes, such as 'local-dir:FOLDER'.
        any_backbone: take other weights of the backbone than an adapter was trained with.
        **arguments: those of `timm.create_model`, such as `num_classes`, `in_chans`, `cache_dir`.

    Raises:
        ValueError: a name that is none of these.
        TypeError: an unknown argument.
        LoadError: what was saved is damaged, not of this model, or refused; or the Hub cannot be
            reached.
    """
    name = str(name)
    reserved = ('backbone', 'pretrained', 'pretrained_cfg_overlay')
    check_arguments('from_pretrained', PooledModel, arguments, given=reserved)
    source = _find(name, revision)
    try:
        check_file(source, arguments.get('cache_dir'))
    except LoadError as error:
        if source != f'hf-hub:{name}':
            raise
        raise LoadError(f"{error} There is no folder '{name}' here.") from None
    if backbone is not None:
        arguments['backbone'] = backbone
    if any_backbone:
        arguments['any_backbone'] = True
    try:
        with explain_errors(f"Loading '{name}'"):
            model = timm.create_model(source, pretrained=True, **arguments)
    except LoadError:
        raise
    except Exception as error:  # timm reads config.json before we do
        raise LoadError(
            f"'{name}' cannot be loaded by its config.json: {type(error).__name__}: {error}"
        ) from error
    return cast(PooledModel, model)


def _find(name: str, revision: str | None) -> str:
    """The name by which timm knows a model."""
    if name.startswith('hf-hub:'):
        return name + (f'@{revision}' if revision else '')
    name = name.removeprefix('local-dir:')
    folder = CHECKOUT / name if name in RELEASED else Path(name)
    if name and folder.is_dir():
        if revision is not None and name not in RELEASED:
            raise ValueError(f"{revision=} is for the Hub, but '{name}' is a folder.")
        if revision is None:
            return f'local-dir:{folder}'
    if folder.is_file():
        raise ValueError(f"'{name}' is a file. Give the folder that holds it.")
    repo_id = f'{HUB_USER}/{name}' if name in RELEASED else name
    if repo_id.count('/') != 1 or repo_id.startswith(('.', '/')):
        raise ValueError(
            f"'{name}' is no released model, no folder, and no USER/NAME on the Hub."
            f'{nearest(name, RELEASED)} timm_fisher.list_pretrained() lists the released models.'
        )
    return f'hf-hub:{repo_id}' + (f'@{revision}' if revision else '')


def save_pretrained(
    model: PooledModel,
    folder: str | Path,
    *,
    metrics: str | Path | Mapping[str, Any] | None = None,
    label_names: Sequence[str] | None = None,
    data_config: dict[str, Any] | None = None,
    adapter: bool | None = None,
    backbone_id: str | None = None,
    float16: Collection[str] = (),
    card: Mapping[str, Any] | None = None,
) -> None:
    """Write a complete repository: config.json, model.safetensors, README.md and metrics.json.

    All files are written beside and then renamed: an error, such as a full disk, leaves what was
    there before. A process that is killed between two renames leaves a folder that is not loaded.
    Of a README.md that is there already, the generated part is replaced, see
    `timm_fisher.hub.readme.update`. Of local paths in the metrics the last name alone is written.

    Args:
        model: what to save.
        folder: made if it does not exist.
        metrics: what the card reports: metrics.json of this model's run, or its content.
        label_names: names of the classes, by index; None for those it was loaded with, if any.
        data_config: preprocessing, as `timm.data.resolve_input_data_config` gives it; None for
            the backbone's own, or what it was loaded with.
        adapter: store head and classifier alone; None for where that is possible, that is where
            the backbone has the weights that it was loaded with, from a known repository.
        backbone_id: that repository, for a backbone that was loaded from a folder.
        float16: names of tensors that are stored in half precision.
        card: what else the card says, see `timm_fisher.hub.card.make_card`.

    Raises:
        ValueError: `adapter` is asked for and not possible, label names that are not one text for
            each class, or not fit to be shown; a `data_config` that cannot be loaded, an unknown
            tensor or one too large for half precision, a `backbone_id` that cannot be right;
            metrics that are not of this model or not as training leaves them; or a README.md that
            is a link or cannot be read.
        TypeError: not a `PooledModel`, or an unknown or wrong field of the card.
    """
    _check(model, label_names)
    card = dict(card or {})
    check_arguments('card', make_card, card, given=_NOT_OF_THE_CARD)
    reported = read_metrics(metrics or {})
    check_metrics(reported, model)
    folder = Path(folder)
    for name in FILES:
        readme.check_regular(folder / name)
    old = folder / 'README.md'
    old_text = readme.read(old) if old.exists() else None
    if backbone_id is not None:
        _name_backbone(model, backbone_id)
    if adapter is not False:
        obstacle = _why_no_adapter(model)
        if obstacle and adapter:
            raise ValueError(f'No adapter can be saved: {obstacle}. Give adapter=False.')
        adapter = not obstacle

    def write(beside: Path) -> None:
        config = _write_model(
            model, beside, label_names, data_config, adapter=adapter, float16=float16
        )
        text = make_card(
            model,
            sum(map(math.prod, read_shapes(beside / WEIGHTS, str(folder)).values())),
            config,
            reported,
            adapter=bool(adapter),
            **card,
        )
        if old_text is not None:
            text = readme.update(text, old_text, f"'{old}'")
        (beside / 'README.md').write_bytes(text.encode())
        (beside / 'metrics.json').write_text(json.dumps(reported, indent=2) + '\n')

    replace_files(folder, write)


def save_model(
    model: PooledModel,
    folder: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    data_config: dict[str, Any] | None = None,
) -> None:
    """Write config.json and model.safetensors alone, with all weights, as training does.

    metrics.json of an earlier model in the folder is deleted: it is not of these weights.

    Args and errors as those of `save_pretrained`.
    """
    _check(model, label_names)
    replace_files(
        Path(folder),
        lambda beside: _write_model(model, beside, label_names, data_config),
        remove=['metrics.json'],
    )


def _name_backbone(model: PooledModel, repo_id: str) -> None:
    """Note the repository that the weights of a backbone from a folder come from."""
    validate_repo_id(repo_id.partition('@')[0])
    if model.backbone_weights is None:
        raise ValueError(
            f"backbone_id='{repo_id}' is for a backbone with pretrained weights; this one has none."
        )
    user, _, name = repo_id.partition('/')
    architecture = model.backbone.pretrained_cfg['architecture']
    if user == 'timm' and timm.models.get_arch_name(name) != architecture:
        raise ValueError(f"backbone_id='{repo_id}' is not of this backbone, {architecture}.")
    model.backbone_weights['hf_hub_id'] = repo_id


def _why_no_adapter(model: PooledModel) -> str:
    """What stands against storing head and classifier alone, or an empty string."""
    weights = model.backbone_weights
    if weights is None:
        return 'the backbone was not loaded with pretrained weights'
    if weights['sha256'] is None:
        return (
            "the backbone's weights were adapted to other images than they came for, or came from "
            'a repository without safetensors'
        )
    if weights['hf_hub_id'] is None:
        return (
            'the backbone did not come from the Hub; backbone_id names the repository of the same '
            'weights'
        )
    if digest(model.backbone.state_dict()) != weights['sha256']:
        return f"the backbone's weights are no longer those of '{weights['hf_hub_id']}'"
    return ''


def _check(model: PooledModel, label_names: Sequence[str] | None) -> None:
    if not isinstance(model, PooledModel):
        raise TypeError(
            f'{type(model).__name__} is not a PooledModel. Of a wrapped model give the inner one, '
            'such as accelerator.unwrap_model(model).'
        )
    if label_names is not None:
        if isinstance(label_names, str | Mapping) or not all(
            isinstance(name, str) for name in label_names
        ):
            raise ValueError(
                f'label_names must be a list of texts, not {str(label_names)[:200]!r}.'
            )
        if len(label_names) != model.num_classes:
            raise ValueError(
                f'{len(label_names)} label names were given for {model.num_classes} classes.'
            )
    names = label_names or model.pretrained_cfg.get('label_names') or ()
    if len(names) > MOST_LABELS:
        raise ValueError(f'There are {len(names)} label names; at most {MOST_LABELS} are allowed.')
    for i, name in enumerate(names):
        if wrong := problem(name, LONGEST_LABEL):
            raise ValueError(f'The label name of class {i} {wrong}.')


def _write_model(
    model: PooledModel,
    folder: Path,
    label_names: Sequence[str] | None,
    data_config: dict[str, Any] | None,
    *,
    adapter: bool = False,
    float16: Collection[str] = (),
) -> dict[str, Any]:
    """config.json and model.safetensors, in timm's own form; gives the content of the first."""
    unknown = sorted(set(float16) - set(model.state_dict()))
    if unknown:
        raise ValueError(f"The model has no tensor '{unknown[0]}' to be stored in float16.")

    def arrange(
        module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]
    ) -> None:
        if module is not model:
            return
        for key in list(state):
            if adapter and key.startswith('backbone.'):
                del state[key]
            else:
                # safetensors refuses other memory formats, such as that of a channels-last model.
                state[key] = state[key].contiguous()
                if key in float16:
                    state[key] = _halve(key, state[key])

    config = {} if label_names is None else {'label_names': list(label_names)}
    # For the time of saving only: timm's EMA writes into the tensors of a state dict.
    hook = model.register_state_dict_post_hook
    with hook(arrange):  # type: ignore[no-untyped-call]
        timm.models.save_for_hf(
            model,
            str(folder),
            model_config=config,
            safe_serialization=True,
            data_config=data_config,
        )
    written: dict[str, Any] = json.loads((folder / 'config.json').read_text())
    place = {'source': 'local-dir', 'file': str(folder.parent)}
    try:
        check_images(written['pretrained_cfg'] | place, written['model_args'], str(folder.parent))
    except LoadError as error:  # what cannot be loaded is not saved
        raise ValueError(str(error)) from None
    # safetensors makes its file private; the umask of the config is what the user wants.
    shutil.copymode(folder / 'config.json', folder / WEIGHTS)
    return written


def _halve(name: str, value: Tensor) -> Tensor:
    half = value.half()
    if half.isinf().any():
        raise ValueError(f"The tensor '{name}' holds numbers that are too large for float16.")
    return half
