"""The peak that reports tell is the program's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qlora_engine import peak_memory

CHILD = "from qlora_engine.peak_memory import peak_memory; print(peak_memory())"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system has no /proc")
def test_a_large_parent_is_not_counted() -> None:
    held = bytearray(b"x") * (600 << 20)
    # a plain fork and exec, as subprocess does where it cannot use vfork
    told = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, check=True, preexec_fn=lambda: None
    )
    assert len(held) > 3 * int(told.stdout)


def test_what_was_held_is_counted() -> None:
    code = CHILD.replace("print", "held = bytearray(b'x') * (300 << 20); del held; print")
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(told.stdout) > 300 << 20


def test_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = peak_memory.peak_memory()
    monkeypatch.setattr(peak_memory, "_STATUS", tmp_path / "status")
    assert peak_memory.peak_memory() >= 0.9 * expected
