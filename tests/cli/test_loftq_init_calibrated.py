"""``loftq-init`` with texts and with a budget: the methods, what is kept, what is refused."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_engine import PeftModel, calibrated_run, inits
from qlora_engine.loading import from_pretrained
from qlora_engine.report import RunReport

from .command import invoke


@pytest.fixture
def model(make_checkpoint: Any, tmp_path: Path) -> Path:
    """A tiny Llama that a test may change."""
    folder = tmp_path / "model"
    shutil.copytree(make_checkpoint("llama"), folder)
    return folder


CALIBRATED = [name for name in inits.names() if inits.get(name).quantizes and inits.get(name).needs_hessian]


@pytest.mark.parametrize("method", CALIBRATED)
def test_every_calibrated_method(method: str, model: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--bits", 3, "--rank", 4, "--window", 64, "--calibration", texts, "--method", method)
    assert invoke(model, out, *options).code == 0
    report = RunReport.read(out)
    assert not any(layer.note for layer in report.layers)
    assert any("calibrated on" in note for note in report.notes)
    for layer in report.layers:
        assert layer.output_error is not None
        assert layer.output_error_plain is not None
        assert layer.output_error < layer.output_error_plain
    assert not list(tmp_path.glob(".out*"))  # neither workspace nor calibration is left
    adapted = PeftModel.from_pretrained(from_pretrained(out), str(out / "loftq_init"))
    with torch.no_grad():
        assert torch.isfinite(adapted(input_ids=torch.arange(9)[None]).logits).all()


def test_recipe_is_the_default_with_texts_and_beats_loftq(model: Path, texts: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.safetensors"
    options = ("--bits", 2, "--rank", 4)
    saved = invoke(
        model, tmp_path / "a", *options, "--calibration", texts, "--window", 64, "--save-calibration", kept
    )
    assert saved.code == 0, saved.err
    assert kept.is_file()
    again = invoke(model, tmp_path / "b", *options, "--load-calibration", kept)
    assert again.code == 0, again.err
    a, b = RunReport.read(tmp_path / "a"), RunReport.read(tmp_path / "b")
    assert a.run["options"]["method"] == b.run["options"]["method"] == "recipe"
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    loftq = invoke(model, tmp_path / "c", *options, "--load-calibration", kept, "--method", "loftq")
    assert loftq.code == 0
    c = RunReport.read(tmp_path / "c")
    assert sum(ly.output_error or 0 for ly in a.layers) < 0.8 * sum(ly.output_error or 0 for ly in c.layers)


def test_what_memory_allows_decides_how_wide_a_moment_may_be(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert calibrated_run.widest_full_moment(16 << 30) >= 14336
    assert calibrated_run.widest_full_moment(8 << 30) < 14336
    monkeypatch.setattr(calibrated_run, "memory_of", lambda device: 2 * 9 * 4 * 80**2)
    done = invoke(model, tmp_path / "out", "--bits", 3, "--rank", 4, "--calibration", texts, "--window", 64)
    assert done.code == 0, done.err
    report = RunReport.read(tmp_path / "out")
    assert any("layers have more than 80 inputs" in note for note in report.notes)
    assert all((layer.output_error or 1) < (layer.output_error_plain or 0) for layer in report.layers)


def test_what_the_integer_solver_prints_reaches_no_one(capfd: pytest.CaptureFixture[str]) -> None:
    print("before")
    with calibrated_run._no_c_output():
        ctypes.CDLL(None).puts(b"a stray line")
        os.write(1, b"another\n")
    ctypes.CDLL(None).puts(b"after")
    ctypes.CDLL(None).fflush(None)
    out, err = capfd.readouterr()
    assert "stray" not in out + err
    assert "another" not in out + err
    assert "after" in out


def test_budget_is_kept_and_used(model: Path, texts: Path, tmp_path: Path) -> None:
    done = invoke(
        model, tmp_path / "out", "--budget", 3.3, "--rank", 4, "--calibration", texts, "--window", 64
    )
    assert done.code == 0, done.err
    report = RunReport.read(tmp_path / "out")
    assert any(note.startswith("budget of 3.3 bits a weight: 3.") for note in report.notes)
    widths = {layer.format for layer in report.layers}
    assert len(widths) > 1
    numel = sum(layer.numel for layer in report.layers)
    # small layers carry the nested map of 1 KB, which the budget counts like everything else
    bits = sum(layer.bits_per_weight * layer.numel for layer in report.layers) / numel
    assert bits <= 3.3 + 1e-9
    assert bits > 3.3 - 0.25  # the finest step between formats of the smallest model is coarse
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {values["format"] for values in [stored["spec"], *stored["modules"].values()]} >= widths
    assert from_pretrained(tmp_path / "out") is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "recipe"), "needs --calibration TEXTS"),
        (("--calibration", "nowhere.txt"), "no such file or folder: nowhere.txt"),
        (("--load-calibration", "nowhere.safetensors"), "no such file"),
        (("--calibration", "TEXTS", "--load-calibration", "TEXTS"), "give one of them"),
        (("--budget", "3", "--bits", "4"), "leave out --bits"),
        (("--budget", "1.5"), "take at least"),
        (("--save-calibration", "x.safetensors"), "needs --calibration"),
        (("--calibration", "TEXTS", "--save-calibration", "."), "--save-calibration . is a folder"),
        (("--calibration", "TEXTS", "--save-calibration", "no/where"), "there is no folder"),
        (("--calibration", "TEXTS", "--calibration-windows", "0"), "at least 1"),
        (("--calibration", "TEXTS", "--window", "1"), "at least 2 tokens"),
        (("--load-calibration", "TEXTS"), "texts.jsonl"),
    ],
)
def test_what_is_refused(
    options: tuple[str, ...], message: str, model: Path, texts: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    given = [str(texts) if option == "TEXTS" else option for option in options]
    assert message in invoke(model, tmp_path / "out", "--rank", 4, *given).error()
    assert sorted(tmp_path.iterdir()) == before
