"""Every suite of benchmarks.speed runs, small and on a CPU: a GPU's minutes are not for typing errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import bench, common, gpu_suites, speed, speed_all
from qlora_engine import fused
from quant import fp8

QUICK = ("linear", "small", "fp8")


@pytest.mark.parametrize(
    "suite", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in speed.SUITES]
)
def test_a_suite_runs_at_small_sizes(suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if suite == "fp8" and (why := fp8.unavailable(torch.device("cpu"))) is not None:
        pytest.skip(why)
    path = tmp_path / "rows.json"
    assert speed.main(["--suite", suite, "--tiny", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert rows
    assert {row["suite"] for row in rows} == {suite}
    assert f"## {suite}" in capsys.readouterr().out
    timed = [row["ms"] for row in rows if "ms" in row]
    assert all(0 < value < 1e6 for value in timed)
    if suite in ("linear", "small"):
        assert all(row["x dense"] > 0 for row in rows if "dense" in row["what"])
    assert bench.SIZES is not bench.TINY
    assert fused.on_gpu(torch.zeros(1)) is False


def test_without_a_gpu_it_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert speed.main(["--suite", "mlp"]) == 2
    assert speed.main(["--suite", "step"]) == 2
    assert speed_all.main(["--out", "nowhere"]) == 2
    assert capsys.readouterr().err.count("needs a CUDA GPU") == 3


def test_a_peer_that_is_missing_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert not bench.peer("bitsandbytes")
    assert capsys.readouterr().err == "bitsandbytes is not installed: its rows are left out\n"


def test_all_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> list[bench.Row]:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(speed, "check", lambda: None)
    rows = [{"suite": "mlp", "what": "dense", "ms": 1.0}]
    monkeypatch.setattr(speed, "SUITES", {**dict.fromkeys(speed.SUITES, lambda: rows), "group": fails})
    outcome = speed_all.run_all(tmp_path, 100.0, tiny=True)
    assert set(outcome) == set(speed.SUITES) == set(speed_all.ESTIMATES)
    assert outcome["group"] == "failed: no kernel image"
    assert outcome["checkpoint"].startswith("left out: about 160 s, ")
    assert outcome["mlp"] == "done in 0 s"
    saved = json.loads((tmp_path / "gpu-mlp.json").read_text())
    assert saved["rows"] == rows
    assert saved["command"] == "python -m benchmarks.speed --suite mlp"
    assert not (tmp_path / "gpu-checkpoint.json").exists()
    assert common.table(saved["rows"])


def test_the_synthetic_checkpoint_is_one(tmp_path: Path) -> None:
    from qlora_engine import from_pretrained

    with bench.sized(True):
        size = gpu_suites.synthetic_checkpoint(tmp_path / "model", bench.SIZES)
    files = list((tmp_path / "model").glob("*.safetensors"))
    assert len(files) == bench.TINY.layers + 1
    assert size < sum(file.stat().st_size for file in files) < size + 5000 * len(files)
    model = from_pretrained(tmp_path / "model")
    assert model(input_ids=torch.arange(5)[None]).logits.isfinite().all()
