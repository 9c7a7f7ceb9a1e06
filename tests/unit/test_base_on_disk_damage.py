"""A quantised base whose tensors do not belong together any more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_engine.architecture import read_architecture
from qlora_engine.base_on_disk import DiskBase
from qlora_engine.checkpoint import Checkpoint
from qlora_engine.errors import InputError
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
