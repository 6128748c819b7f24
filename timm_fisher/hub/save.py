"""Saving a model as a folder that plain `timm.create_model` loads, and sharing it on the Hub."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import Tensor, nn

from timm_fisher.backbone import WEIGHTS, digest
from timm_fisher.errors import PushError, clear_errors
from timm_fisher.hub.card import check_metrics, make_card, merge_cards, seal
from timm_fisher.hub.config import check_config
from timm_fisher.hub.replace import SAVING, abandoned, check_whole, half_replaced
from timm_fisher.hub.weights import read_header
from timm_fisher.model import PooledModel
from timm_fisher.registry import check_arguments

FILES = ('config.json', WEIGHTS, 'README.md', 'metrics.json')
_NOT_OF_THE_CARD = ('model', 'stored_parameters', 'config', 'metrics', 'adapter')


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
    What was edited in a README.md that is there already stays, see `merge_cards`.

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
            each class, a `data_config` that cannot be loaded, an unknown tensor or one too large
            for half precision, a `backbone_id` that cannot be right, or metrics that are not of
            this model or not as recipes/train.py leaves them.
        TypeError: not a `PooledModel`, or an unknown or wrong field of the card.
    """
    _check(model, label_names)
    card = dict(card or {})
    check_arguments('card', make_card, card, given=_NOT_OF_THE_CARD)
    reported = _read_metrics(metrics) if isinstance(metrics, str | Path) else metrics or {}
    check_metrics(reported, model)
    if backbone_id is not None:
        _name_backbone(model, backbone_id)
    if adapter is not False:
        problem = _why_no_adapter(model)
        if problem and adapter:
            raise ValueError(f'No adapter can be saved: {problem}. Give adapter=False.')
        adapter = not problem

    def write(beside: Path) -> None:
        config = _write_model(
            model, beside, label_names, data_config, adapter=adapter, float16=float16
        )
        header = read_header(beside / WEIGHTS, str(folder))
        text = make_card(
            model,
            sum(math.prod(shape) for _, shape in header.tensors.values()),
            config,
            reported,
            adapter=bool(adapter),
            **card,
        )
        text, old = seal(text), Path(folder, 'README.md')
        if old.exists():
            text = merge_cards(text, old.read_bytes(), f"'{old}'")
        (beside / 'README.md').write_text(text, encoding='utf-8')
        (beside / 'metrics.json').write_text(json.dumps(reported, indent=2) + '\n')

    _replace_files(Path(folder), write)


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
    _replace_files(
        Path(folder), lambda beside: _write_model(model, beside, label_names, data_config)
    )
    Path(folder, 'metrics.json').unlink(missing_ok=True)


def push_to_hub(
    model: PooledModel,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str = 'Add model',
    **arguments: Any,
) -> str:
    """Save a model and push it, in one commit; see `push_folder`.

    ```python
    push_to_hub(model, 'USER/NAME', metrics='runs/x/metrics.json', label_names=names)
    ```

    Args:
        model: what to push.
        repo_id: USER/NAME; made if it does not exist.
        private: whether only you see the repository; one that exists must be so already.
        revision: branch, made if it does not exist.
        create_pr: open a pull request instead.
        token: None for HF_TOKEN, or the one that `hf auth login` stored.
        commit_message: first line of the commit's message.
        **arguments: those of `save_pretrained`.

    Returns:
        URL of the commit, or of the last one if nothing has changed.

    Raises:
        ValueError, TypeError: as `save_pretrained`.
        PushError: the Hub refused, or cannot be reached, and no file has changed there; or the
            connection broke after the Hub had taken the commit. Pushing again does no harm.
    """
    check_arguments('push_to_hub', save_pretrained, arguments, given=('model', 'folder'))
    arguments['card'] = {'repo_id': repo_id, **(arguments.get('card') or {})}
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, **arguments)
        return push_folder(
            folder,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            token=token,
            commit_message=commit_message,
        )


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str = 'Add model',
) -> str:
    """Push a folder that `save_pretrained` wrote, in one commit.

    An unchanged folder makes no commit. What a user wrote into the card on the Hub stays there, see
    `timm_fisher.hub.card.merge_cards`.

    Args, returns and errors as those of `push_to_hub`; and LoadError, where saving into the folder
    was cut off.
    """
    folder = Path(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"'{folder}' lacks {', '.join(missing)}. Write it by timm_fisher.save_pretrained."
        )
    check_whole(folder)
    api = HfApi(token=token, library_name='timm_fisher', library_version=version('timm_fisher'))
    with clear_errors(f"Pushing to '{repo_id}'", PushError):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private is not None and api.repo_info(repo_id).private != private:
            now, wanted = ('public', 'private') if private else ('private', 'public')
            raise PushError(f'it is {now}, not {wanted}. Change that in its settings first.')
        if revision is not None and not revision.startswith('refs/'):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        text = (folder / 'README.md').read_text(encoding='utf-8')
        if api.file_exists(repo_id, 'README.md', revision=revision):
            with tempfile.TemporaryDirectory() as fresh:
                old = api.hf_hub_download(repo_id, 'README.md', revision=revision, cache_dir=fresh)
                text = merge_cards(text, Path(old).read_bytes(), 'the README.md on the Hub')
        operations = [
            CommitOperationAdd(name, text.encode() if name == 'README.md' else str(folder / name))
            for name in FILES
        ]
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return str(commit.pr_url or commit.commit_url)


def _read_metrics(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"'{path}' is not readable JSON: {error}.") from error


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
    if label_names is None:
        return
    wrong = isinstance(label_names, str | Mapping)
    if wrong or not all(isinstance(name, str) for name in label_names):
        raise ValueError(f'label_names must be a list of texts, not {label_names!r:.200}.')
    if len(label_names) != model.num_classes:
        raise ValueError(
            f'{len(label_names)} label names were given for {model.num_classes} classes.'
        )


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
    try:
        check_config(written)
    except ValueError as error:  # what cannot be loaded is not saved
        raise ValueError(f'The model cannot be saved: {error}.') from None
    # safetensors makes its file private; the umask of the config is what the user wants.
    shutil.copymode(folder / 'config.json', folder / WEIGHTS)
    return written


def _halve(name: str, value: Tensor) -> Tensor:
    half = value.half()
    if half.isinf().any():
        raise ValueError(f"The tensor '{name}' holds numbers that are too large for float16.")
    return half


def _replace_files(folder: Path, write: Callable[[Path], Any]) -> None:
    """Let a function write files into a folder beside, then move all of them, or none.

    Killed in between, it leaves what `check_whole` finds, and the next call deletes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stale = [*half_replaced(folder), *abandoned(folder)]
    with tempfile.TemporaryDirectory(dir=folder, prefix=SAVING) as temporary:
        beside = Path(temporary)
        shutil.copymode(folder, beside)  # others, too, must see whether files are being replaced
        write(beside)
        with contextlib.ExitStack() as undo:
            paths = sorted(beside.iterdir(), reverse=True)
            for path in paths:
                with open(path, 'rb') as file:
                    os.fsync(file.fileno())
            for path in paths:
                target, kept = folder / path.name, beside / f'{path.name}.old'
                if target.exists():
                    _link_or_copy(target, kept)
                    undo.callback(os.replace, kept, target)
                else:
                    undo.callback(target.unlink, missing_ok=True)
                os.replace(path, target)
            undo.pop_all()
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
