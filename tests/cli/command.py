"""Running the commands in tests: in this process (fast) or as a process of its own (real)."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """The one line of an error; asserts that it is one, with status 2 and nothing on stdout."""
        assert self.code == 2, (self.code, self.err)
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("loftq-init: error: ")
        return lines[0].removeprefix("loftq-init: error: ")


def invoke(*arguments: Any) -> Result:
    """``loftq-init`` in this process."""
    from qlora_engine.cli import loftq_init

    out, err = io.StringIO(), io.StringIO()
    code = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            loftq_init.main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = exit_.code
    assert isinstance(code, int)
    return Result(code, out.getvalue(), err.getvalue())


def start(*arguments: Any, **popen: Any) -> subprocess.Popen[str]:
    """``loftq-init`` as a process of its own, one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **popen.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-m", "qlora_engine.cli.loftq_init", *map(str, arguments)],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **popen},
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen[str]) -> Result:
    """Wait for a started command."""
    out, err = process.communicate(timeout=300)
    return Result(process.returncode, out, err)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` that must not depend on time: the two reports hold seconds."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("report.json", "report.html")
    }
