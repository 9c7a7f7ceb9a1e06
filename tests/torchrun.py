"""Starting several processes in tests, as ``torchrun`` does, of one thread each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def launch(*words: Any, processes: int = 2, **popen: Any) -> subprocess.Popen[str]:
    """``torchrun WORDS``: a script and its arguments, or ``-m`` and a module's."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*launcher, "--nproc-per-node", str(processes), *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **popen,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Status and output; nothing is left running."""
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def run_script(text: str, folder: Path, *arguments: Any) -> str:
    """What two processes of a script print; it is written into ``folder``, and must succeed."""
    script = folder / "script.py"
    script.write_text(text)
    status, out, err = finish(launch(script, *arguments))
    assert status == 0, err
    return out
