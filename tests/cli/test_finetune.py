"""``qlora-finetune`` on real files: a run, a killed and resumed one, a dense model, and what is refused."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .command import ROOT

STEPS = (
    "--max-steps",
    "8",
    "--batch-size",
    "2",
    "--max-length",
    "48",
    "--save-every",
    "2",
    "--evaluate-every",
    "4",
)


def invoke(*arguments: Any) -> tuple[int, str, str]:
    """Status, stdout and stderr of the command in this process."""
    from qlora_engine.cli import finetune

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        finetune.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0), out.getvalue(), err.getvalue()


def losses(output: Path) -> list[list[float]]:
    return json.loads((output / "training_log.json").read_text())["losses"]


def test_a_run(quantised: Path, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    options = (*STEPS, "--learning-rate", "0.02", "--sample", "3 plus one is", "--lora-plus", "2")
    status, out, err = invoke(quantised, "--data", rows, "--output", output, *options)
    assert status == 0, err
    assert out == ""
    assert "validation loss" in err
    assert "next: qlora-merge" in err
    curve = losses(output)
    assert [step for step, _ in curve] == list(range(1, 9))
    assert curve[-1][1] < curve[0][1]
    files = {path.name for path in output.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "training_log.json"} <= files
    assert ("loss.png" in files) == (importlib.util.find_spec("matplotlib") is not None)


def test_peft_reads_what_was_trained(quantised: Path, rows: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    assert invoke(quantised, "--data", rows, "--output", tmp_path / "adapter", "--max-steps", 1)[0] == 0
    model = AutoModelForCausalLM.from_pretrained(quantised)
    read = peft.get_peft_model_state_dict(peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")))
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name].float(), written[name]) for name in written)


def test_killed_and_resumed_gives_the_same_curve(quantised: Path, rows: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert invoke(quantised, "--data", rows, "--output", whole, *STEPS)[0] == 0
    command = [
        sys.executable,
        "-m",
        "qlora_engine.cli.finetune",
        quantised,
        "--data",
        rows,
        "--output",
        cut,
        *STEPS,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE, text=True)
    marker = cut / "checkpoints" / "checkpoint-2" / "complete.json"
    for _ in range(1200):
        if marker.exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    assert marker.exists(), process.communicate()[1]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (cut / "adapter_config.json").exists() or (cut / "training_log.json").exists()
    # what a kill within a checkpoint leaves is not trusted
    (cut / "checkpoints" / "checkpoint-999").mkdir()
    refused = invoke(quantised, "--data", rows, "--output", cut, *STEPS)
    assert refused[0] == 2
    assert "--resume goes on" in refused[2]
    status, _, err = invoke(quantised, "--data", rows, "--output", cut, *STEPS, "--resume")
    assert status == 0, err
    assert losses(cut) == losses(whole)
    weights = [(path / "adapter_model.safetensors").read_bytes() for path in (cut, whole)]
    assert weights[0] == weights[1]
    other = invoke(quantised, "--data", rows, "--output", cut, *STEPS, "--resume", "--learning-rate", "1")
    assert other[0] == 2
    assert "learning_rate was 0.0002, is 1.0" in other[2]
    (cut / "checkpoints" / "settings.json").write_text("{")
    damaged = invoke(quantised, "--data", rows, "--output", cut, *STEPS, "--resume")
    assert damaged[0] == 2
    assert "settings.json is not valid JSON" in damaged[2]


def test_a_dense_model_is_quantised_on_the_fly(make_checkpoint: Any, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    options = ("--bits", "3", "--rank", "4", "--max-steps", "2", "--max-length", "48", "--json")
    status, out, err = invoke(make_checkpoint("llama"), "--data", rows, "--output", output, *options)
    assert status == 0, err
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["kind"] for event in events][:2] == ["plan", "log"]
    assert events[-1]["kind"] == "outcome"
    assert events[-1]["steps"] == 2


def test_estimate_trains_nothing(quantised: Path, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    status, _, err = invoke(quantised, "--data", rows, "--output", output, "--estimate", "--recompute", "1")
    assert status == 0
    assert "1 of 2 layers recomputed" in err
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "nowhere.jsonl"), "no such file: nowhere.jsonl"),
        ((), "--data is needed"),
        (("--data", "DATA", "--batch-size", "0"), "batch_size=0; it must be at least 1"),
        (("--data", "DATA", "--packing", "maybe"), "packing='maybe'; allowed: auto, on, off"),
        (("--data", "DATA", "--recompute", "99"), "allowed: 0 to 2"),
        (("--data", "DATA", "--memory-limit", "0.00001"), "--batch-size or --max-length"),
        (("--data", "DATA", "--adapter", "nowhere"), "no folder named nowhere"),
        (("--data", "DATA", "--device", "cuda:7"), "CUDA"),
        (("--data", "DATA", "--resume"), "nothing to resume"),
        (("--data", "DATA", "--device", "mps"), "--device 'mps'; allowed: auto, cpu, cuda, cuda:N"),
        (("--data", "DATA", "--dropout", "1.5"), "--dropout 1.5; it must be in [0, 1)"),
        (("--data", "DATA", "--seed", "-1"), "seed=-1; it must be in [0, 2**32)"),
        (("--data", "DATA", "--sample", " "), "sample is empty"),
        (("--data", "DATA", "--rank", "8", "--alpha", "8"), "--rank, --alpha: "),
        (("--data", "DATA", "--bits", "3"), "--bits: only a dense model is quantised"),
    ],
)
def test_what_is_refused(
    options: tuple[str, ...], message: str, quantised: Path, rows: Path, tmp_path: Path
) -> None:
    given = [str(rows) if option == "DATA" else option for option in options]
    status, out, err = invoke(quantised, "--output", tmp_path / "adapter", *given)
    last = err.strip().splitlines()[-1]
    assert status == 2, err
    assert out == ""
    assert last.startswith("qlora-finetune: error: ")
    assert message in last
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()


def test_what_is_no_causal_language_model_is_refused(
    make_checkpoint: Any, rows: Path, tmp_path: Path
) -> None:
    for name, why in (("t5", "is an encoder-decoder"), ("bert", "BertModel predicts no tokens")):
        status, _, err = invoke(make_checkpoint(name), "--data", rows, "--output", tmp_path / name)
        assert status == 2
        assert why in err.splitlines()[-1]


def test_the_models_folder_is_no_output(quantised: Path, rows: Path) -> None:
    before = sorted(quantised.iterdir())
    status, _, err = invoke(quantised, "--data", rows, "--output", quantised / "." / ".")
    assert status == 2
    assert "is the model's own folder; what is trained needs another" in err
    assert sorted(quantised.iterdir()) == before


def test_json_lines_are_json_whatever_the_loss(capsys: pytest.CaptureFixture[str]) -> None:
    from qlora_engine.cli.finetune_display import Display

    log = {"step": 3, "steps": 9, "loss": float("nan"), "learning_rate": 0.1}
    Display(quiet=False, as_json=True).log(log)

    def refuse(name: str) -> None:
        raise ValueError(name)

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found == {**log, "kind": "log", "loss": None}


def test_the_time_left_is_of_this_session(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_engine.cli import finetune_display as module

    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    show = module.Display(quiet=False, as_json=False)
    for step in (51, 52):
        clock[0] += 10
        show.log({"step": step, "steps": 60, "loss": 1.0, "learning_rate": 0.1})
    left = [line.split("about ")[1] for line in capsys.readouterr().err.splitlines()]
    assert left == ["90 s left", "80 s left"]


def test_what_is_said_to_come_next_can_be_copied(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """On one line however long the paths are, and quoted; also of adapters on experts, which it merges."""
    from qlora_engine.cli.finetune_display import Display
    from qlora_engine.training.outcome import Outcome

    output = tmp_path / ("long " * 40).strip()
    outcome = Outcome(0, [], [], 1.0, 0.0, 0, "full")
    Display(quiet=False, as_json=False).outcome(outcome, output, "my base")
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("next: ")
    assert shlex.split(told.removeprefix("next: ")) == ["qlora-merge", "my base", str(output), "MERGED"]
