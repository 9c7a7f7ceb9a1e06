"""How far a run over weights has come: JSON lines, a bar on a terminal, or a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qlora_engine.cli import common
from qlora_engine.report import dumps
from qlora_engine.report_table import human_seconds

LOG_SECONDS = 10.0  # between lines where there is no terminal


@contextmanager
def progress(
    total: int, describe: Callable[[Any], str], *, quiet: bool, as_json: bool
) -> Iterator[Callable[[Any, bool], None] | None]:
    """What to call after each weight with its record and whether it was finished by an earlier run.

    Args:
        total: Weights to come.
        describe: What a person is told of a record.
        quiet: Say nothing; there is nothing to call then, unless ``as_json``.
        as_json: A line of JSON on stdout for every record.
    """
    if as_json:
        yield lambda record, kept: common.emit(dumps({"event": "layer", "kept": kept} | record.to_json()))
    elif quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar(total, describe) as update:
            yield update
    else:
        yield _Log(total, describe).update


@contextmanager
def _bar(total: int, describe: Callable[[Any], str]) -> Iterator[Callable[[Any, bool], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=common.console(sys.stderr), transient=True) as bar:
        task = bar.add_task("reading", total=total)

        def update(record: Any, kept: bool) -> None:
            bar.update(task, advance=1, description=f"{describe(record)}{' (kept)' if kept else ''}")

        yield update


class _Log:
    """A line at most every few seconds, for log files."""

    def __init__(self, total: int, describe: Callable[[Any], str]) -> None:
        self.total, self.describe = total, describe
        self.done, self.kept = 0, 0
        self.began = self.last = time.monotonic()

    def update(self, record: Any, kept: bool) -> None:
        self.done += 1
        self.kept += kept
        now = time.monotonic()
        if now - self.last < LOG_SECONDS or kept:
            return
        self.last = now
        left = (now - self.began) / (self.done - self.kept) * (self.total - self.done)
        print(
            f"{self.done}/{self.total} {self.describe(record)}, about {human_seconds(left)} left",
            file=sys.stderr,
            flush=True,
        )


class CalibrationLog:
    """A line at most every few seconds while text runs through the model."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def update(self, done: int, total: int, what: str) -> None:
        """Called after each step; the last one is always told."""
        now = time.monotonic()
        if now - self.last >= LOG_SECONDS or done == total:
            self.last = now
            print(f"calibrating {done}/{total}: {what}", file=sys.stderr, flush=True)
