"""Time and memory of a function, for the benchmarks."""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch.profiler import ProfilerActivity, profile

LEAST_SECONDS = 0.2  # for each function, on average, whatever the number of repetitions


def environment(device: str) -> dict[str, Any]:
    """What times depend on, apart from the code: versions, processor, threads, other processes."""
    return {
        'versions': f'torch {torch.__version__}, timm {timm.__version__}',
        'device': processor(device),
        'threads': torch.get_num_threads(),
        'load before': load(),
    }


def median_times(*runs: Callable[[], object], device: str, repetitions: int) -> list[float]:
    """Median seconds of each function, after a warm-up.

    They take turns, so that a busy machine slows all of them alike.

    Args:
        runs: functions without arguments.
        device: where they compute.
        repetitions: at least this many, and more while that takes less than `LEAST_SECONDS`.
    """
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    end = time.perf_counter() + LEAST_SECONDS * len(runs)
    while len(times[0]) < repetitions or time.perf_counter() < end:
        for run, taken in zip(runs, times, strict=True):
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def peak_memory(run: Callable[[], object], device: str) -> int:
    """Most bytes that PyTorch's allocator holds at a time during `run`, beyond those before it.

    On a CPU they are those that the profiler sees, without the scratch memory of BLAS, oneDNN and
    the like.
    """
    if torch.device(device).type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # or it reports that there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    with tempfile.TemporaryDirectory() as folder:
        profiled.export_chrome_trace(f'{folder}/trace.json')
        events = json.loads(Path(folder, 'trace.json').read_text())['traceEvents']
    peak = now = 0
    for event in sorted((e for e in events if e['name'] == '[memory]'), key=lambda e: e['ts']):
        now += event['args']['Bytes']  # negative where memory is given back
        peak = max(peak, now)
    return peak


def synchronize(device: str) -> None:
    """Wait until a GPU is done."""
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)


def processor(device: str) -> str:
    """Name of the CPU or GPU, as far as the system tells it."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.get_device_name(device)
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def load() -> float | None:
    """Processes that ran or waited in the last minute, on average; None where the system does not
    tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None
