"""`accelerate launch -m timm_fisher.training --config FILE`: train a pooling head, in stages."""

from __future__ import annotations

from collections.abc import Sequence

from timm_fisher.training.command_line import run
from timm_fisher.training.config import Config
from timm_fisher.training.run import train


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    run(train, Config, arguments=arguments)


if __name__ == '__main__':
    main()
