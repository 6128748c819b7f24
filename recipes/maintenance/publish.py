"""Push released models from hub_cards to the Hub, and check what can be downloaded from there.

    hf auth login
    python recipes/publish.py --user USER                          # all of them
    python recipes/publish.py trashnet-3g mnist-dbm-idfk --user USER

Each is downloaded into an empty cache by plain `timm.create_model`, and compared with the local
folder: its tensors, and its logits of an input. The exit status is 1 if one differs, or could not
be pushed or loaded.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import timm
import torch
from predict import lite0_backbone

import timm_fisher
from timm_fisher.errors import LoadError, PushError, clear_errors
from timm_fisher.hub.card import seal
from timm_fisher.hub.save import CHECKOUT, HUB_USER, push_folder


def main() -> None:
    released = timm_fisher.list_pretrained()
    parser = argparse.ArgumentParser(description='Push released models, and check them.')
    parser.add_argument('names', nargs='*', help='released models; all if none is named')
    parser.add_argument('--user', default=HUB_USER, help='user or organisation on the Hub')
    parser.add_argument('--private', action='store_true', help='of repositories that are made')
    parser.add_argument('--backbone', help="local-dir:FOLDER of the adapters' backbone")
    parser.add_argument('--cards', type=Path, default=CHECKOUT, help='folder of the models')
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(released))
    if unknown:
        parser.error(f"'{unknown[0]}' is no released model. They are {', '.join(released)}.")

    rows = []
    for name in args.names or released:
        folder, repo_id = args.cards / name, f'{args.user}/{name}'
        try:
            url = push(folder, repo_id, private=args.private or None)
            verdict = compare(folder, repo_id, args.backbone or lite0_backbone(str(folder)))
            rows.append((name, verdict, url))
        except (LoadError, PushError, ValueError) as error:
            rows.append((name, 'failed', str(error)))
    width = max(len(name) for name, *_ in rows)
    print(f'\n{"model":<{width}}  {"on the Hub":<24}  commit')
    for name, verdict, text in rows:
        print(f'{name:<{width}}  {verdict:<24}  {text}')
    sys.exit(any(verdict != 'same' for _, verdict, _ in rows))


def push(folder: Path, repo_id: str, *, private: bool | None) -> str:
    """Push a folder under another name than its card's, if need be; URL of the commit."""
    if not folder.is_dir():
        raise ValueError(f"'{folder}' does not exist. Make it by recipes/release.py.")
    with tempfile.TemporaryDirectory() as temporary:
        renamed = Path(temporary, folder.name)
        shutil.copytree(folder, renamed)
        card = renamed / 'README.md'
        text = card.read_text(encoding='utf-8')
        own = f'{HUB_USER}/{folder.name}'
        if repo_id != own:
            card.write_text(seal(text.replace(own, repo_id)), encoding='utf-8')
        return push_folder(renamed, repo_id, private=private)


@torch.no_grad()
def compare(folder: Path, repo_id: str, backbone: str | None) -> str:
    """'same', or what differs between a folder and the Hub's repository: tensors, or the logits of
    two images of noise, always the same."""
    other = {'backbone': backbone} if backbone else {}
    local = timm_fisher.from_pretrained(str(folder), backbone=backbone).eval()
    with tempfile.TemporaryDirectory() as cache, clear_errors(f"Loading '{repo_id}'"):
        remote = timm.create_model(
            f'hf-hub:{repo_id}', pretrained=True, cache_dir=cache, **other
        ).eval()
    found = remote.state_dict()
    changed = [key for key, value in local.state_dict().items() if not value.equal(found[key])]
    if changed:
        return f'{len(changed)} tensors differ'
    size = timm.data.resolve_model_data_config(local)['input_size']
    x = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    difference = (local(x) - remote(x)).abs().max().item()
    return 'same' if difference == 0 else f'logits differ by {difference:.2g}'


if __name__ == '__main__':
    main()
