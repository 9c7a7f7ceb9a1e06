"""Two GPUs: one process keeps to the one that it was given, two processes (NCCL) give what one gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .command import ROOT, files
from .test_finetune_distributed import torchrun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
STEPS = ("--max-steps", 5, "--max-length", 48, "--packing", "on", "--learning-rate", 0.01)


def alone(command: str, *arguments: Any) -> None:
    """One process, which sees all GPUs."""
    words = [sys.executable, "-m", f"qlora_engine.cli.{command}", *map(str, arguments)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def both(command: str, *arguments: Any) -> str:
    """Two processes; what they say."""
    process = torchrun(*arguments, command=command)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out + err


def log_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "training_log.json").read_text())


@pytest.fixture(scope="module")
def one(quantised: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("one") / "adapter"
    alone("finetune", quantised, "--data", rows, "--output", output, *STEPS, "--batch-size", 4)
    return output


def assert_same_curve(output: Path, one: Path) -> None:
    """bfloat16, and sums in another order."""
    losses, want = (torch.tensor(log_of(path)["losses"]) for path in (output, one))
    torch.testing.assert_close(losses, want, rtol=0, atol=0.02)
    assert len(log_of(one)["peak_bytes"]) == 1


def test_one_process_trains_on_the_gpu_that_was_named(
    quantised: Path, rows: Path, one: Path, tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    options = (*STEPS, "--batch-size", 4, "--device", "cuda:1")
    alone("finetune", quantised, "--data", rows, "--output", output, *options)
    assert_same_curve(output, one)
    assert "were replayed from CUDA graphs" in str(log_of(output)["notes"])


@pytest.mark.parametrize("how", [(), ("--cuda-graphs", "off"), ("--shard",)], ids=["graphs", "DDP", "shards"])
def test_two_processes_train_as_one(
    how: tuple[str, ...], quantised: Path, rows: Path, one: Path, tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    options = (*STEPS, "--batch-size", 2, *how)
    said = both("finetune", quantised, "--data", rows, "--output", output, *options)
    assert_same_curve(output, one)
    assert ("were replayed from CUDA graphs" in said) == (how == ())
    assert len(log_of(output)["peak_bytes"]) == 2
    mine, theirs = (load_file(path / "adapter_model.safetensors") for path in (output, one))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0.02)


def test_loftq_init_gives_the_bytes_of_one(make_checkpoint: Any, tmp_path: Path) -> None:
    model = make_checkpoint("llama", shard_size="60KB")
    options = ("--rank", 4, "--max-shard-size", "60KB", "--quiet")
    alone("loftq_init", model, tmp_path / "first", *options)
    alone("loftq_init", model, tmp_path / "second", *options, "--device", "cuda:1")
    both("loftq_init", model, tmp_path / "both", *options)
    weights = [
        {name: data for name, data in files(tmp_path / out).items() if name.endswith(".safetensors")}
        for out in ("first", "second", "both")
    ]
    assert len(weights[0]) > 3
    assert weights[0] == weights[1] == weights[2]
