"""What is written for tensors that only change their dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_engine import serialise
from qlora_engine.errors import InputError
from qlora_engine.safetensors_io import DenseTensor, read_header, write_file
from qlora_engine.serialise import ConvertedTensor, round_to


@pytest.mark.parametrize(
    ("source", "target"), [("F32", "F16"), ("BF16", "F32"), ("F16", "BF16"), ("F64", "F32")]
)
def test_converted_tensor_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, target: str
) -> None:
    monkeypatch.setattr("qlora_engine.safetensors_io.COPY_BYTES", 64)
    weight = torch.randn(37, 11).to(serialise.TORCH_DTYPES[source])
    write_file(tmp_path / "a", [DenseTensor("w", weight)])
    entry = read_header(tmp_path / "a")[0]["w"]
    assert len(list(entry.chunks())) > 10
    write_file(tmp_path / "b", [ConvertedTensor(entry, target)])
    read = read_header(tmp_path / "b")[0]["w"].read()
    assert torch.equal(read, weight.to(serialise.TORCH_DTYPES[target]))


def test_round_to_refuses_overflow_only() -> None:
    assert round_to(torch.tensor([65504.0]), torch.float16, "w").item() == 65504
    assert torch.isinf(round_to(torch.tensor([float("inf")]), torch.float16, "w")).all()
    assert torch.isfinite(round_to(torch.tensor([1e30]), torch.bfloat16, "w")).all()
    with pytest.raises(InputError, match=r"'w' has values up to 7e\+04, beyond float16's 65504"):
        round_to(torch.tensor([1.0, -7e4]), torch.float16, "w")
