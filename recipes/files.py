"""Files that are either old or new, never half written: for all recipes."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure


def write(path: Path, text: str) -> None:
    """Write beside, then rename."""
    beside = path.with_name(f'.{path.name}.partial')
    beside.write_text(text)
    os.replace(beside, path)


def save_png(figure: Figure, path: Path) -> None:
    """Save beside, then rename; the figure is closed."""
    beside = path.with_name(f'.{path.name}')
    figure.savefig(beside, format='png', dpi=120)
    plt.close(figure)
    os.replace(beside, path)
