"""Sharing a saved model on the Hub."""

from __future__ import annotations

import inspect
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi

from timm_fisher.errors import PushError, explain_errors
from timm_fisher.hub import readme
from timm_fisher.hub.replace import check_whole
from timm_fisher.hub.save import FILES, check_regular, save_pretrained
from timm_fisher.model import PooledModel


def push_to_hub(model: PooledModel, repo_id: str, **arguments: Any) -> str:
    """Save a model and push it, in one commit.

    ```python
    push_to_hub(model, 'USER/NAME', metrics='runs/x/metrics.json', label_names=names)
    ```

    Args:
        model: what to push.
        repo_id: USER/NAME; made if it does not exist.
        **arguments: of `save_pretrained` and `push_folder`, which also say what it returns and
            raises.
    """
    pushing = inspect.signature(push_folder).parameters
    options = {name: arguments.pop(name) for name in [*arguments] if name in pushing}
    arguments['card'] = {'repo_id': repo_id, **(arguments.get('card') or {})}
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, **arguments)
        return push_folder(folder, repo_id, **options)


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

    An unchanged folder makes no commit. The card is adapted to the name of the repository. What a
    user wrote into the card on the Hub stays there, see `timm_fisher.hub.readme.update`.

    Args:
        folder: what to push.
        repo_id: USER/NAME; made if it does not exist.
        private: whether only you see the repository; one that exists must be so already.
        revision: branch, made if it does not exist.
        create_pr: open a pull request instead.
        token: None for HF_TOKEN, or the one that `hf auth login` stored.
        commit_message: first line of the commit's message.

    Returns:
        URL of the commit, or of the last one if nothing has changed.

    Raises:
        ValueError: a file is missing, or is a link; or README.md cannot be read.
        LoadError: saving into the folder was interrupted.
        PushError: the Hub refused, or cannot be reached, and the repository is unchanged; or the
            connection broke after the Hub had taken the commit. Pushing again does no harm.
    """
    folder = Path(folder)
    check_regular(folder)
    check_whole(folder)
    missing = [name for name in FILES if not (folder / name).exists()]
    if missing:
        raise ValueError(
            f"'{folder}' lacks {', '.join(missing)}. Write it by timm_fisher.save_pretrained."
        )
    text = readme.read(folder / 'README.md', f"'{folder}/README.md'")
    api = HfApi(token=token, library_name='timm_fisher', library_version=version('timm_fisher'))
    with explain_errors(f"Pushing to '{repo_id}'", PushError):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private is not None and api.repo_info(repo_id).private != private:
            now, wanted = ('public', 'private') if private else ('private', 'public')
            raise PushError(f'it is {now}, not {wanted}. Change that in its settings first.')
        if revision is not None and not revision.startswith('refs/'):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        text = readme.rename(text, repo_id)
        if api.file_exists(repo_id, 'README.md', revision=revision):
            with tempfile.TemporaryDirectory() as fresh:
                path = api.hf_hub_download(repo_id, 'README.md', revision=revision, cache_dir=fresh)
                where = 'the README.md on the Hub'
                text = readme.update(text, readme.read(Path(path), where), where)
        contents = {name: str(folder / name) for name in FILES} | {'README.md': text.encode()}
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in contents.items()],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return str(commit.pr_url or commit.commit_url)
