"""A command as a process of its own that dies, or finds its disk full, at a chosen moment.

The processes are forked from a fork server that has imported everything, so that a hundred of them take no
hundred imports of torch. Nothing else is shared: each is a process with its own memory, killed by SIGKILL.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import importlib
import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import qlora_engine.calibrated_run
import qlora_engine.cli.finetune
import qlora_engine.cli.loftq_init_run
import qlora_engine.cli.merge_run
import qlora_engine.cli.report
import qlora_engine.merge_pipeline
import qlora_engine.training.run  # noqa: F401 - imported for the children

MODULES = {
    "loftq-init": "qlora_engine.cli.loftq_init",
    "qlora-merge": "qlora_engine.cli.merge",
    "qlora-finetune": "qlora_engine.cli.finetune",
    "qlora-report": "qlora_engine.cli.report",
}
# Calls by which a run changes the disk; a kill between any two of them is a state to recover from.
CHANGES = ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir")


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a process.

    Attributes:
        kill_at: SIGKILL before that change of the disk.
        full_at: From that change on the disk is full: whatever needs space gets ENOSPC.
        full_after_bytes: The disk takes so many bytes more.
        pause_at: SIGSTOP before that change.
    """

    kill_at: int = -1
    full_at: int = -1
    full_after_bytes: int = -1
    pause_at: int = -1


@dataclass(frozen=True)
class Result:
    """What a command did: its status (-9: killed), output, and how often it changed the disk."""

    code: int
    out: str
    err: str
    changes: int
    seconds: float

    def error(self, program: str) -> str:
        """The last line on stderr; asserts that it is the only error and that the status says so."""
        assert self.code == 2, (self.code, self.err)
        lines = self.err.splitlines()
        assert lines[-1].startswith(f"{program}: error: "), self.err
        assert not any("Traceback" in line for line in lines), self.err
        return lines[-1].removeprefix(f"{program}: error: ")


class Process:
    """A started command."""

    def __init__(self, program: str, arguments: tuple[Any, ...], folder: Path, fault: Fault) -> None:
        # not in a folder that may be full
        self.log = folder.parent.parent / f".{folder.parent.name}.{folder.name}.log"
        self.began = time.monotonic()
        words = [str(argument) for argument in arguments]
        self._process = _context().Process(
            target=_child, args=(program, words, str(folder), str(self.log), fault), daemon=True
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def send(self, number: int) -> None:
        """A signal."""
        os.kill(self.pid, number)

    def finish(self, kill_after: float | None = None) -> Result:
        """Wait for its end; SIGKILL when it takes longer than ``kill_after`` seconds."""
        self._process.join(120 if kill_after is None else kill_after)
        if self._process.exitcode is None:
            assert kill_after is not None, f"hangs: {_text(self.log, 'err')}"
            self._process.kill()
            self._process.join()
        code = self._process.exitcode
        assert code is not None
        count = int(_text(self.log, "count") or -1)
        return Result(
            code, _text(self.log, "out"), _text(self.log, "err"), count, time.monotonic() - self.began
        )


def run(
    program: str, *arguments: Any, folder: Path, fault: Fault | None = None, kill_after: float | None = None
) -> Result:
    """Run a command in ``folder`` to its end, whatever that is."""
    return Process(program, arguments, folder, fault or Fault()).finish(kill_after)


def _text(log: Path, kind: str) -> str:
    path = Path(f"{log}.{kind}")
    return path.read_text() if path.exists() else ""


def _context() -> Any:
    os.environ["OMP_NUM_THREADS"] = "1"
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _child(program: str, arguments: list[str], folder: str, log: str, fault: Fault) -> None:
    for kind in ("out", "err", "count"):
        Path(f"{log}.{kind}").unlink(missing_ok=True)
    for number, kind in ((1, "out"), (2, "err")):
        handle = os.open(f"{log}.{kind}", os.O_WRONLY | os.O_CREAT, 0o666)
        os.dup2(handle, number)
        os.close(handle)
    os.chdir(folder)
    torch.set_num_threads(1)
    main = importlib.import_module(MODULES[program]).main
    with _injected(fault) as count:
        try:
            main(arguments)
        finally:
            Path(f"{log}.count").write_text(str(count[0]))


@contextlib.contextmanager
def _injected(fault: Fault) -> Iterator[list[int]]:
    """The fault, in this process for good; yields the count of changes."""
    count = [0]

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            here, count[0] = count[0], count[0] + 1
            if here == fault.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if here == fault.pause_at:
                os.kill(os.getpid(), signal.SIGSTOP)
            if 0 <= fault.full_at <= here and name in ("fsync", "mkdir"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **settings)

        return call

    for name in CHANGES:
        setattr(os, name, wrap(name, getattr(os, name)))
    if fault.full_after_bytes >= 0:
        _limit_writes(fault.full_after_bytes)
    yield count


def _limit_writes(room: int) -> None:
    """Python's file writes get ENOSPC once ``room`` bytes are taken, in the middle of a buffer if need be."""
    left = [room]

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            size = memoryview(data).nbytes
            if size and not left[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            taken = min(size, left[0])
            left[0] -= taken
            written: int = super().write(memoryview(data).cast("B")[:taken])
            return written

    real = builtins.open

    def limited(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **more: Any) -> Any:
        if not set(mode) & set("wax+") or str(file).endswith(".count"):
            return real(file, mode, buffering, *rest, **more)
        raw = Full(file, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, *rest, **more)

    builtins.open = io.open = limited  # type: ignore[assignment]
