"""What the suites of ``benchmarks.speed`` share: sizes, peers, rows."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu import GpuTiming, synchronize
from quant.spec import QuantSpec

RANK = 16
SPEC = QuantSpec("nf4", 64, True)
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are Llama-3-8B's."""

    hidden: int = 4096
    width: int = 14336
    kv: int = 1024
    head: int = 128
    layers: int = 32
    vocabulary: int = 128256
    tokens: tuple[int, ...] = (512, 2048, 8192)
    small_shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (14336, 4096))
    solver_shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
    solver_rank: int = 64
    group: int = 8


TINY = Sizes(
    hidden=64,
    width=96,
    kv=32,
    head=32,
    layers=2,
    vocabulary=128,
    tokens=(8, 16, 32),
    small_shapes=((64, 128),),
    solver_shapes=((96, 128),),
    solver_rank=4,
    group=3,
)
SIZES = Sizes()


def device() -> str:
    """Where the suites run: on a GPU, or with ``--tiny`` on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def peer(name: str) -> bool:
    """Whether a peer is measured: it is installed, and this is no tiny run."""
    return SIZES is not TINY and installed(name)


def installed(name: str) -> bool:
    """Whether a peer can be measured; says so on stderr where not."""
    found = importlib.util.find_spec(name) is not None
    if not found:
        print(f"{name} is not installed: its rows are left out", file=sys.stderr)
    return found


def row(suite: str, what: str, timing: GpuTiming, **more: Any) -> Row:
    """One line of the table."""
    return {
        "suite": suite,
        "what": what,
        **more,
        "ms": timing.median,
        "p20": timing.p20,
        "p80": timing.p80,
        "MiB": round(timing.peak_mib),
    }


def against(rows: list[Row], bound: str) -> None:
    """Add to each row its time as a multiple of the dense row called ``bound``, of the same case."""
    for line in rows:
        base = [r for r in rows if r["what"] == bound and r.get("tokens") == line.get("tokens")]
        if base:
            line["x dense"] = line["ms"] / base[0]["ms"]


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median of so many calls; a single one, of a call of seconds, is not warmed up."""
    if repeats > 1:
        call()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


@contextlib.contextmanager
def sized(tiny: bool) -> Iterator[None]:
    """Inside, the suites have Llama-3-8B's sizes, or tiny ones and, on a CPU, the fused functions too."""
    from qlora_engine import fused

    global SIZES
    before, on_gpu = SIZES, fused.on_gpu
    if tiny:
        SIZES = TINY
        if device() == "cpu":
            os.environ.setdefault("TRITON_INTERPRET", "1")
            fused.on_gpu = lambda x: True
    try:
        yield
    finally:
        SIZES, fused.on_gpu = before, on_gpu
