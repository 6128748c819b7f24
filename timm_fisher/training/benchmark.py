"""Benchmarks: time and memory of a function, and reports of them."""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch

from timm_fisher.files import write

LEAST_SECONDS = 0.2  # for each function, on average, whatever the number of repetitions
Row = dict[str, Any]
Sections = Iterable[tuple[str, str, list[Row]]]  # title, Markdown, the rows that it is about
T = TypeVar('T')


def report(
    parts: Mapping[Any, Callable[[], Sections]],
    path: Path,
    settings: Mapping[str, Any],
    **about: object,
) -> list[Row]:
    """All rows of a benchmark, with the `part` that each is from; the parts' text is printed too,
    and both are left in files.

    Args:
        parts: by name; each gives sections.
        path: of the files, without `.md` and `.json`.
        settings: of the benchmark, with `device` and `threads` (None for as many as PyTorch takes);
            those that are paths are not kept.
        **about: what results depend on besides the machine.

    Raises:
        ValueError: there is no such device.
    """
    device = settings['device']
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from PyTorch without CUDA
        raise ValueError(f'--device {device}: {error}') from error
    if settings['threads']:
        torch.set_num_threads(settings['threads'])
    torch.manual_seed(0)
    environment = {
        'torch': torch.__version__,
        'timm': timm.__version__,
        'device': processor(device),
        'threads': torch.get_num_threads(),
        'load before': load(),
        **about,
    }
    print(_conditions(environment), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {k: v for k, v in settings.items() if not isinstance(v, Path)}
    tables: list[tuple[str, str]] = []
    rows: list[Row] = []
    measured = ((name, section) for name, part in parts.items() for section in part())
    for name, (title, text, of_section) in measured:
        tables.append((title, text))
        print(f'\n{_section(title, text)}', flush=True)
        rows += [{'part': name, **row} for row in of_section]
        environment['load after'] = load()
        record = dict(environment=environment, options=options, tables=tables, results=rows)
        write(path.with_suffix('.json'), json.dumps(record, indent=1, default=str) + '\n')
        write(path.with_suffix('.md'), benchmark_tables(record))
    print(f'\n{_conditions(environment)}\n\nAll of it is in {path.parent}.')
    return rows


def benchmark_tables(record: Mapping[str, Any]) -> str:
    """Markdown of what a `.json` file of `report` holds: its tables, and what measured them."""
    tables = [_section(title, text) for title, text in record['tables']]
    return '\n\n'.join([*tables, _conditions(record['environment'])]) + '\n'


def _section(title: str, text: str) -> str:
    return f'**{title}**\n\n{text}'


def _conditions(environment: Mapping[str, Any]) -> str:
    return f'Measured with {", ".join(f"{key} {value}" for key, value in environment.items())}.'


def median_times(*runs: Callable[[], object], device: str, repetitions: int) -> list[float]:
    """Median seconds of each function, after a warm-up, over this many repetitions, or more while
    they take less than `LEAST_SECONDS`. They take turns: a busy machine slows all of them alike."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    end = time.perf_counter() + LEAST_SECONDS * len(runs)
    while len(times[0]) < repetitions or time.perf_counter() < end:
        for run, taken in zip(runs, times, strict=True):
            taken.append(timed(run, device)[0])
    return [statistics.median(taken) for taken in times]


def timed(run: Callable[[], T], device: str = 'cpu') -> tuple[float, T]:
    """Seconds that a function takes, until its device is done, and what it returns."""
    wait = torch.cuda.synchronize if torch.device(device).type == 'cuda' else (lambda device: None)
    wait(device)
    start = time.perf_counter()
    result = run()
    wait(device)
    return time.perf_counter() - start, result


def peak_memory(run: Callable[[], object], device: str) -> int:
    """Most bytes that PyTorch's allocator holds at a time during `run`, beyond those before it; on
    a CPU without the scratch memory of BLAS, oneDNN and the like."""
    if torch.device(device).type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # or it reports that there is no GPU
    with torch.autograd.profiler.profile(use_cpu=True, profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.kineto_results.events() if e.name() == '[memory]']
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    peak: int = max(itertools.accumulate(changes, initial=0))
    return peak


def peak_resident() -> int:
    """Most bytes of memory that this process has held at a time so far; 0 on Windows."""
    if sys.platform == 'win32':
        return 0
    import resource

    unit = 1 if sys.platform == 'darwin' else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def processor(device: str) -> str:
    """Name of the CPU or GPU, as far as the system tells it."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.get_device_name(device)
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def load() -> float | None:
    """Processes that ran or waited in the last minute, on average; None on Windows."""
    return round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None
