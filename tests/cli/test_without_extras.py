"""Without bitsandbytes, triton, peft and other extras the commands work, and say what is missing where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.command import ROOT

WITHOUT = (
    "bitsandbytes",
    "triton",
    "peft",
    "matplotlib",
    "tensorboard",
    "liger_kernel",
    "gguf",
    "trl",
    "pyarrow",
    "datasets",
)
BLOCKER = f"""
import sys
class Without:
    # Finds what a finder finds, but for packages that shall be as if they had not been installed.
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {WITHOUT!r} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
from importlib import metadata
real = metadata.version
def version(name):
    if name.replace("-", "_").lower() in {WITHOUT!r}:
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.version = version
"""
WORK = """
import contextlib, io, json, sys
from pathlib import Path
folder, model = Path(sys.argv[1]), sys.argv[2]
found = {}
def command(name, *arguments):
    module = __import__("qlora_engine.cli." + name, fromlist=["main"])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            module.main(list(map(str, arguments)))
        except SystemExit as ended:
            return ended.code, err.getvalue().strip()
text = folder / "text.txt"
text.write_text("one two three four five\\n\\n" * 60)
out = folder / "out"
found["init"] = command("loftq_init", model, out, "--rank", 2, "--quiet")
found["calibrated"] = command("loftq_init", model, folder / "c", "--rank", 2, "--bits", 3,
                              "--calibration", text, "--calibration-windows", 2, "--quiet")
found["merge"] = command("merge", out, out / "loftq_init", folder / "merged", "--quiet")
found["finetune"] = command("finetune", out, "--data", text, "--output", folder / "adapter", "--max-steps", 2,
                            "--max-length", 32, "--quiet")
found["report"] = command("report", out, "--html", folder / "page.html", "--csv", folder / "table.csv")
found["png"] = command("report", out, "--png", folder / "plot.png")
found["board"] = command("finetune", out, "--data", text, "--output", folder / "b", "--tensorboard")
found["optimizer"] = command("finetune", out, "--data", text, "--output", folder / "o", "--max-steps", 1,
                             "--optimizer", "adamw_8bit", "--quiet")
(folder / "rows.parquet").write_bytes(b"PAR1")
found["parquet"] = command("loftq_init", model, folder / "p", "--calibration", folder / "rows.parquet")

import torch
import qlora_engine as qe
loaded = qe.from_pretrained(out)
adapted = qe.PeftModel.from_pretrained(loaded, folder / "adapter")
ids = torch.arange(8)[None]
found["finite"] = bool(torch.isfinite(adapted(input_ids=ids).logits).all())
from quant import QuantSpec, quantize
for backend in ("bitsandbytes", "triton"):
    try:
        quantize(torch.randn(4, 64), QuantSpec("nf4"), backend=backend)
        found[backend] = "ran"
    except (RuntimeError, ValueError) as error:
        found[backend] = str(error)
found["loaded"] = sorted({name.split(".")[0] for name in sys.modules})
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, object]:
    """What each part did, in one process that lacks the extras."""
    folder = tmp_path_factory.mktemp("without")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKER + WORK, folder, make_checkpoint("llama")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_nothing_of_them_was_imported(found: dict[str, object]) -> None:
    assert not set(WITHOUT) & set(found["loaded"])


@pytest.mark.parametrize("part", ["init", "calibrated", "merge", "finetune", "report"])
def test_works(part: str, found: dict[str, object]) -> None:
    assert found[part][0] == 0, found[part]


def test_models_load_and_run(found: dict[str, object]) -> None:
    assert found["finite"]


@pytest.mark.parametrize(
    ("part", "missing"),
    [("png", "matplotlib"), ("board", "tensorboard"), ("optimizer", "bitsandbytes"), ("parquet", "pyarrow")],
)
def test_says_what_is_missing(part: str, missing: str, found: dict[str, object]) -> None:
    status, line = found[part]
    assert status == 2, line
    assert missing in line
    assert "error: " in line.splitlines()[-1]


@pytest.mark.parametrize("backend", ["bitsandbytes", "triton"])
def test_backends_say_what_is_missing(backend: str, found: dict[str, object]) -> None:
    assert backend in found[backend]
    assert found[backend] != "ran"
