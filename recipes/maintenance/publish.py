"""Push released models from hub_cards to the Hub, and check what can be downloaded from there.

    hf auth login
    python recipes/maintenance/publish.py --user USER                          # all of them
    python recipes/maintenance/publish.py trashnet-3g mnist-dbm-idfk --user USER

Each is downloaded into an empty cache by plain `timm.create_model`, and compared with the local
folder: its tensors, and its logits of an input. The exit status is 1 if one differs, or could not
be pushed or loaded.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch

import timm_fisher
from timm_fisher import push_folder
from timm_fisher.hub.load import CHECKOUT, HUB_USER
from timm_fisher.training.command_line import run
from timm_fisher.training.tables import table


@dataclass
class Settings:
    """Push released models, and check them.

    Args:
        names: released models; all if none is named.
        user: user or organisation on the Hub.
        private: whether repositories that are made are private.
        backbone: local-dir:FOLDER of the adapters' backbone; else it comes from the Hub.
        cards: folder of the models' folders.
    """

    names: list[str] = field(default_factory=timm_fisher.list_pretrained)
    user: str = HUB_USER
    private: bool = False
    backbone: str | None = None
    cards: Path = CHECKOUT

    def __post_init__(self) -> None:
        released = timm_fisher.list_pretrained()
        for name in self.names:
            if name not in released:
                raise ValueError(f"'{name}' is no released model. They are {', '.join(released)}.")


def main(settings: Settings) -> None:
    rows: list[tuple[str, str, str]] = []
    for name in settings.names:
        folder, repo_id = settings.cards / name, f'{settings.user}/{name}'
        try:
            url = push_folder(folder, repo_id, private=settings.private or None)
            rows.append((name, compare(folder, repo_id, settings.backbone), url))
        except Exception as error:  # whatever the Hub's client raises belongs in the table
            rows.append((name, 'failed', str(error).partition('\n')[0]))
    print(table(['model', 'on the Hub', 'commit'], rows))
    if any(verdict != 'same' for _, verdict, _ in rows):
        sys.exit(1)


@torch.no_grad()
def compare(folder: Path, repo_id: str, backbone: str | None) -> str:
    """'same', or what differs between a folder and the Hub's repository: tensors, or the logits of
    noise."""
    local = timm_fisher.from_pretrained(folder, backbone=backbone).eval()
    with tempfile.TemporaryDirectory() as cache:
        remote: Any = timm.create_model(
            f'hf-hub:{repo_id}', pretrained=True, cache_dir=cache, backbone=backbone
        )
    remote.eval()
    state = remote.state_dict()
    changed = [key for key, value in local.state_dict().items() if not value.equal(state[key])]
    if changed:
        return f'{len(changed)} tensors differ'
    size = timm.data.resolve_model_data_config(local)['input_size']
    x = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    difference = (local(x) - remote(x)).abs().max().item()
    return 'same' if difference == 0 else f'logits differ by {difference:.2g}'


if __name__ == '__main__':
    run(main, Settings, positional='names')
