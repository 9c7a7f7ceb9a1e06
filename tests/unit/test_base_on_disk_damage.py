"""A quantised base whose tensors do not belong together any more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_engine.architecture import read_architecture
from qlora_engine.base_on_disk import DiskBase
from qlora_engine.checkpoint import Checkpoint
from qlora_engine.errors import InputError
from qlora_engine.loading import from_pretrained
from tests.cli.command import invoke


def test_a_quant_state_under_another_name(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """One bit of a name in the header; found by flipping bits at random."""
    out = tmp_path / "out"
    assert invoke(make_checkpoint("llama"), out, "--rank", 2, "--quiet").code == 0
    file = out / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    weight = "model.layers.0.self_attn.q_proj.weight"
    key = next(name for name in header if name.startswith(f"{weight}.quant_state"))
    header[key.replace("quant_state", "quant_statu")] = header.pop(key)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    checkpoint = Checkpoint.open(out)
    with pytest.raises(InputError, match=r"has shape \(2048, 1\), LlamaForCausalLM has \(64, 64\)"):
        DiskBase.open(checkpoint, read_architecture(out, checkpoint.config))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "broken bitsandbytes quant_state: RecursionError"),
        (b'{"dtype": ' + b"9" * 5000 + b"}", "broken bitsandbytes quant_state"),
        (b'{"quant_type": "nf4", "blocksize": 64, "dtype": "int8", "shape": [64, 64]}', "'int8'"),
    ],
    ids=["deep", "digits", "dtype"],
)
def test_a_hostile_quant_state(
    make_checkpoint: Callable[..., Path], tmp_path: Path, text: bytes, message: str
) -> None:
    """Read for its format when a merge is planned, and whole when the weight is."""
    out = tmp_path / "out"
    assert invoke(make_checkpoint("llama"), out, "--rank", 2, "--quiet").code == 0
    weight = "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(out / "model.safetensors")
    key = next(name for name in tensors if name.startswith(f"{weight}.quant_state"))
    tensors[key] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint.open(out)
    architecture = read_architecture(out, checkpoint.config)
    with pytest.raises(InputError, match=message):
        DiskBase.open(checkpoint, architecture).weights[weight].read()
    with pytest.raises(InputError, match=message):
        from_pretrained(out)
