"""What every benchmark shares: timing with warm-up, what it ran on, tables and JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "triton", "numpy", "scipy")


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 20th and 80th percentile over ``runs``."""

    median: float
    p20: float
    p80: float
    runs: int

    def __str__(self) -> str:
        return f"{self.median * 1e3:.2f} ms ({self.p20 * 1e3:.2f}-{self.p80 * 1e3:.2f})"


def time_each(
    calls: Mapping[str, Callable[..., object]],
    *,
    warmup: int = 2,
    repeats: int = 10,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time several calls side by side: round after round, one call of each.

    Interleaving gives all of them the same noise, so that their ratios hold on a machine that others use.
    On a GPU the clock is read after a synchronisation. ``clock=time.process_time`` counts CPU seconds.
    """

    def read() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return clock()

    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name, call in calls.items():
            start = read()
            call()
            elapsed = read() - start
            if turn >= warmup:
                samples[name].append(elapsed)
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Timing:
    if len(values) == 1:
        return Timing(values[0], values[0], values[0], 1)
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(statistics.median(values), fifths[0], fifths[3], len(values))


def environment() -> dict[str, Any]:
    """Versions, processor, threads and commit: what a number needs beside it to mean something."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        **versions,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str] | None = None) -> str:
    """The rows as a Markdown table; floats get four significant digits, a missing value an empty cell."""
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [
        max(len(c), *(len(line[i]) for line in cells)) if cells else len(c) for i, c in enumerate(columns)
    ]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def save(path: Path, *, command: Sequence[str], rows: Sequence[Any]) -> None:
    """Write the rows (dicts or dataclasses) with the environment and the command that made them, as JSON.

    The command is kept as someone else would repeat it: as a module, without the folders of this machine.
    """
    plain = [row if isinstance(row, dict) else asdict(row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"command": _repeatable(command), "environment": environment(), "rows": plain}
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(values, indent=1) + "\n")
    unfinished.replace(path)


def _repeatable(command: Sequence[str]) -> str:
    words = [word for word in command if word not in ("python", "-m")]
    program = words[0].removesuffix(".py").replace("/", ".")
    program = "benchmarks." + program.rpartition("benchmarks.")[2]
    kept, position = [], 1
    while position < len(words):
        if words[position] == "--json":
            position += 2
            continue
        word = words[position]
        kept.append(Path(word).name if Path(word).is_absolute() else word)
        position += 1
    return shlex.join(["python", "-m", program, *kept])
