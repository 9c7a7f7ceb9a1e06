"""Timing on a GPU: events around replays of a captured graph, so that launching costs nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GpuTiming:
    """Milliseconds of one call, median and 20th and 80th percentile; MiB above what was allocated before."""

    median: float
    p20: float
    p80: float
    peak_mib: float


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def capture(call: Callable[[], object], calls: int = 1) -> Callable[[], None]:
    """A graph of ``calls`` calls, ready to be replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph.replay


def measure(
    call: Callable[[], object], *, graph: bool = True, calls: int = 1, repeats: int = 20
) -> GpuTiming:
    """Time one call; on a machine without a GPU by the clock, to see that it runs.

    Args:
        call: What to time; must be capturable when ``graph``.
        graph: Replay a captured graph instead of launching from Python.
        calls: Calls in one graph, for calls of microseconds.
        repeats: Timed replays.
    """
    if not torch.cuda.is_available():
        call()
        began = time.perf_counter()
        call()
        elapsed = (time.perf_counter() - began) * 1e3
        return GpuTiming(elapsed, elapsed, elapsed, 0.0)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    run = capture(call, calls) if graph else call
    per_run = calls if graph else 1
    times = []
    for _ in range(3 + repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / per_run)
    kept = times[3:]
    fifths = statistics.quantiles(kept, n=5, method="inclusive")
    return GpuTiming(statistics.median(kept), fifths[0], fifths[3], peak)
