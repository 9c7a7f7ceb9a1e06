"""loftq-init --verify: what was written is read again and held against the solver's figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.command import invoke

MakeCheckpoint = Callable[..., Path]
ADAPTER = Path("loftq_init") / "adapter_model.safetensors"


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--double-quant", "--dtype", "bfloat16"),
        ("--bits", 3, "--adapter-dtype", "bfloat16", "--alpha", 8),
        ("--save-format", "dense", "--rslora", "--quantize-rest", "--target-modules", "q_proj"),
        ("--target-modules", "embed_tokens,q_proj", "--bits", 2),
        ("--together",),
    ],
)
def test_verify_reads_what_was_written(
    tmp_path: Path, make_checkpoint: MakeCheckpoint, options: tuple[object, ...]
) -> None:
    result = invoke(make_checkpoint("llama", tie=False), tmp_path / "out", "--rank", 4, "--verify", *options)
    assert result.code == 0, result.err
    layers = len(json.loads((tmp_path / "out" / "report.json").read_text())["layers"])
    assert f"Verified: {layers} layers read again" in result.out


def test_verify_of_transposed_layers_as_json(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    result = invoke(make_checkpoint("gpt2"), tmp_path / "out", "--rank", 4, "--verify", "--json")
    last = json.loads(result.out.splitlines()[-1])
    assert last["event"] == "verified"
    assert last["layers"] == 8
    assert last["difference"] < 1e-4


def _change(path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith(name))
    tensors[key] = change(tensors[key])
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("file", "tensor", "change", "message"),
    [
        ("model.safetensors", "0.mlp.up_proj.weight", lambda t: t ^ 16, "not those of the fingerprint"),
        (str(ADAPTER), "q_proj.lora_B.weight", lambda t: t * 1.5, "the report says 0.0"),
        (str(ADAPTER), "q_proj.lora_A.weight", lambda t: t * torch.nan, "its error is nan"),
        ("model.safetensors", "norm.weight", lambda t: t + 1, "norm.weight' is not the original"),
    ],
)
def test_verify_finds_what_was_changed(
    tmp_path: Path,
    make_checkpoint: MakeCheckpoint,
    file: str,
    tensor: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    message: str,
) -> None:
    arguments = (make_checkpoint("llama"), tmp_path / "out", "--rank", 4)
    assert invoke(*arguments).code == 0
    _change(tmp_path / "out" / file, tensor, change)
    assert invoke(*arguments, "--resume", "--quiet").code == 0
    error = invoke(*arguments, "--resume", "--quiet", "--verify").error()
    assert message in error
    assert error.endswith("write it again with --overwrite")


def test_verify_misses_files(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    arguments = (make_checkpoint("llama"), tmp_path / "out", "--rank", 4, "--quiet")
    assert invoke(*arguments).code == 0
    (tmp_path / "out" / ADAPTER).unlink()
    assert "has no adapter_model.safetensors" in invoke(*arguments, "--resume", "--verify").error()
