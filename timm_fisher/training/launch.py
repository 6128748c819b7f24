"""Training runs, each in a process of its own: for recipes that compare or release models."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from timm_fisher.training.checkpoint import check_settings
from timm_fisher.training.command_line import parse
from timm_fisher.training.config import Config

# Forked from one process that has imported the packages once, where there is such a thing.
_FORKS = 'forkserver' in multiprocessing.get_all_start_methods()
_PROCESSES: Any = multiprocessing.get_context('forkserver' if _FORKS else 'spawn')
if _FORKS:
    _PROCESSES.set_forkserver_preload(['timm_fisher.training.run'])


def launch(options: Mapping[str, Any], output: Path, *, log: Path | None = None) -> dict[str, Any]:
    """Metrics of one training run, from before if it has been run with these options; a run that
    was interrupted goes on.

    Args:
        options: of `timm_fisher.training`, without `output`.
        output: folder of the run.
        log: file to which is added what the run prints; None for this process's own output.

    Raises:
        ValueError: the folder holds the metrics of a run with other options.
        ChildProcessError: the run failed; the message has the end of its log.
    """
    settings = {**options, 'output': str(output)}
    arguments = ['--config', yaml.safe_dump(settings, sort_keys=False)]  # stages have an order
    if (output / 'config.yaml').exists():
        arguments += ['--resume', 'true']
    metrics = output / 'metrics.json'
    if metrics.exists():
        check_settings(output, parse(Config, arguments=arguments))
    else:
        output.parent.mkdir(parents=True, exist_ok=True)  # of the log, which is beside
        process = _PROCESSES.Process(target=_train, args=(arguments, log))
        process.start()
        try:
            process.join()
        except BaseException:
            # Ctrl-C has reached the run as well, which then ends at its next step; SIGTERM reaches
            # this process alone.
            process.join(10)
            process.terminate()
            process.join()
            raise
        if process.exitcode:
            said = f', see {log}:\n{log.read_text()[-3000:]}' if log else '.'
            raise ChildProcessError(f'The run in {output} failed{said}')
    content: dict[str, Any] = json.loads(metrics.read_text())
    return content


def combinations(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations of the values of dotted options."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def run_folder(output: Path, name: str, settings: Mapping[str, Any], seed: int) -> Path:
    """Folder of a run of a comparison: by the name of what is compared, settings and seed."""
    words = [f'{key.split(".")[-1]}{value}' for key, value in settings.items()]
    return output / file_name(name) / '-'.join([*words, f's{seed}'])


def file_name(name: str) -> str:
    """The name of a row of a table as one of a file."""
    return name.replace(' ', '').replace('/', '-')


def _train(arguments: list[str], log: Path | None) -> None:
    if log is not None:
        with open(log, 'a') as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    from timm_fisher.training.__main__ import main

    main(arguments)
