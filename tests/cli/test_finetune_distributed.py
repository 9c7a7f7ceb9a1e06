"""``torchrun ... qlora-finetune``: two gloo processes with copies (DDP) or shards (FSDP2) train as one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.parity.releases import since
from tests.torchrun import finish, launch

from .test_finetune import invoke, losses

STEPS = ("--max-steps", 4, "--max-length", 48, "--packing", "off", "--learning-rate", 0.01)
SHARDS = since("2.12", "FSDP2 takes no packed weights", "torch")
EVERY = ("--save-every", 2, "--evaluate-every", 2)


def torchrun(
    *arguments: Any, command: str = "finetune", processes: int = 2, **popen: Any
) -> subprocess.Popen[str]:
    """A command in two processes, or more, of one thread each."""
    return launch("-m", f"qlora_engine.cli.{command}", *arguments, processes=processes, **popen)


def errors(text: str, program: str = "qlora-finetune") -> list[str]:
    """The program's own lines of error."""
    return [line for line in text.splitlines() if line.startswith(f"{program}: ")]


@pytest.fixture(scope="module")
def alone(quantised: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process with the same global batch."""
    output = tmp_path_factory.mktemp("alone") / "adapter"
    status, _, err = invoke(quantised, "--data", rows, "--output", output, *STEPS, *EVERY, "--batch-size", 4)
    assert status == 0, err
    return output


@pytest.mark.parametrize(
    "how",
    [
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(("--shard",), marks=[SHARDS, pytest.mark.slow]),
        pytest.param(("--shard", "--offload", "embedding,activations"), marks=SHARDS),
    ],
    ids=["copies", "shards", "shards with offload"],
)
def test_two_processes_train_as_one(
    how: tuple[str, ...],
    quantised: Path,
    rows: Path,
    alone: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "adapter"
    options = (*STEPS, *EVERY, "--batch-size", 2, "--recompute", 1, "--sample", "3 plus one is", *how)
    status, out, err = finish(torchrun(quantised, "--data", rows, "--output", output, *options))
    assert status == 0, err
    assert out == ""
    assert err.count("next: qlora-merge") == 1  # one process prints
    assert err.count("step 1/4") == 1
    log, want = (json.loads((path / "training_log.json").read_text()) for path in (output, alone))
    assert [step for step, _ in log["losses"]] == [1, 2, 3, 4]
    for kind in ("losses", "evaluations"):
        torch.testing.assert_close(torch.tensor(log[kind]), torch.tensor(want[kind]), rtol=1e-5, atol=1e-5)
    mine, theirs = (load_file(path / "adapter_model.safetensors") for path in (output, alone))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-4)
    fingerprints = [
        json.loads((path / "quantization_fingerprint.json").read_text()) for path in (output, alone)
    ]
    assert fingerprints[0]["codes_sha256"] == fingerprints[1]["codes_sha256"]


REPLAYED = """
import sys
import torch
from qlora_engine.cli import finetune
from qlora_engine.training import graphs
from tests.unit.test_training_graphs import capture

def enable(model, wanted, why_not=None):
    assert why_not == "rows that are not packed differ in length", why_not  # they are filled up to one
    return graphs.GraphedLayers(model, capture)

def wrapped(*args, **kwargs):
    raise AssertionError("gradients of replayed layers do not reach DistributedDataParallel")

graphs.enable, torch.nn.parallel.DistributedDataParallel.__init__ = enable, wrapped
finetune.main(sys.argv[1:])
"""


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_as_one_with_layers_replayed(
    accumulate: int, quantised: Path, rows: Path, alone: Path, tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    options = (*STEPS, *EVERY, "--batch-size", 2 // accumulate, "--accumulate", accumulate, "--recompute", 1)
    (script := tmp_path / "script.py").write_text(REPLAYED)
    status, _, err = finish(launch(script, quantised, "--data", rows, "--output", output, *options))
    assert status == 0, err
    assert "2 decoder layers were replayed from CUDA graphs" in err
    log, want = (json.loads((path / "training_log.json").read_text()) for path in (output, alone))
    for kind in ("losses", "evaluations"):
        torch.testing.assert_close(torch.tensor(log[kind]), torch.tensor(want[kind]), rtol=1e-5, atol=1e-5)
    mine, theirs = (load_file(path / "adapter_model.safetensors") for path in (output, alone))
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("how", [(), pytest.param(("--shard",), marks=SHARDS)], ids=["copies", "shards"])
def test_one_killed_process_ends_all_and_the_run_goes_on(
    how: tuple[str, ...],
    quantised: Path,
    rows: Path,
    tmp_path: Path,
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ("--data", rows, *STEPS, *EVERY, "--max-steps", 12, "--batch-size", 2, *how)
    status, _, err = finish(torchrun(quantised, "--output", whole, *options))
    assert status == 0, err
    process = torchrun(quantised, "--output", cut, *options, start_new_session=True)
    marker = cut / "checkpoints" / "checkpoint-2" / "complete.json"
    for _ in range(2400):
        if marker.exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    status, _, err = finish(process)
    assert marker.exists(), err
    assert status != 0
    assert len(errors(err)) == 1, err
    assert "another process of this run has ended" in errors(err)[0]
    assert not (cut / "adapter_config.json").exists()
    alone = invoke(quantised, "--output", cut, *options[: len(options) - len(how)], "--resume")
    assert alone[0] == 2
    assert "processes was 2, is 1" in alone[2] or "shard was True, is False" in alone[2]
    status, _, err = finish(torchrun(quantised, "--output", cut, *options, "--resume"))
    assert status == 0, err
    assert losses(cut) == losses(whole)
    assert load_file(cut / "adapter_model.safetensors").keys()
    assert (cut / "adapter_model.safetensors").read_bytes() == (
        whole / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_an_error_is_told_once(quantised: Path, tmp_path: Path) -> None:
    status, out, err = finish(
        torchrun(quantised, "--data", "nowhere.jsonl", "--output", tmp_path / "adapter")
    )
    assert status != 0
    assert out == ""
    assert errors(err) == ["qlora-finetune: error: no such file: nowhere.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [(), pytest.param(("--shard",), marks=SHARDS)], ids=["copies", "shards"])
def test_four_processes_train_as_one(
    how: tuple[str, ...], quantised: Path, rows: Path, alone: Path, tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    options = (*STEPS, *EVERY, "--batch-size", 1, *how)
    status, _, err = finish(torchrun(quantised, "--data", rows, "--output", output, *options, processes=4))
    assert status == 0, err
    for kind in ("losses", "evaluations"):
        found, want = (json.loads((path / "training_log.json").read_text())[kind] for path in (output, alone))
        torch.testing.assert_close(torch.tensor(found), torch.tensor(want), rtol=1e-5, atol=1e-5)
    mine, theirs = (load_file(path / "adapter_model.safetensors") for path in (output, alone))
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-4)


@SHARDS
def test_sharding_needs_processes(quantised: Path, rows: Path, tmp_path: Path) -> None:
    status, _, err = invoke(quantised, "--data", rows, "--output", tmp_path / "adapter", "--shard")
    assert status == 2
    assert "start it with torchrun" in err
