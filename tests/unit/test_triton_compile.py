"""Triton kernels compiled for GPUs that need not be there: Turing, the oldest supported, and Hopper."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
FLOAT8 = {"_decode_kernel", "_row_scales_kernel", "_quantize_rows_kernel"}  # from compute capability 8.9 on


@pytest.mark.parametrize("capability", [75, 90])
def test_every_kernel_compiles(capability: int, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, script, str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    sources = "".join(path.read_text() for path in (ROOT / "quant" / "backends").glob("triton_*.py"))
    known = set(re.findall(r"@triton\.jit(?:\(.*\))?\ndef (\w+_kernel)\(", sources))
    assert len(known) > 10
    assert set(done.stdout.split()) == (known if capability >= 89 else known - FLOAT8)
