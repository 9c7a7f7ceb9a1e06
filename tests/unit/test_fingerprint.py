"""The fingerprint tells one quantised base from another, whatever stored or loaded it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_engine.fingerprint import FINGERPRINT_FILE, Fingerprint, dense_digest, module_digest
from quant import QuantSpec, quantize
from quant.bnb_format import from_bnb, to_bnb
from quant.linear import QuantLinear

SPECS = [QuantSpec(), QuantSpec("nf3", 32, True), QuantSpec("uint4"), QuantSpec("int8", 64, True)]


@pytest.mark.parametrize("spec", SPECS)
def test_module_digest_is_of_codes_and_scales(spec: QuantSpec) -> None:
    W = torch.randn(32, 64)
    q = quantize(W, spec)
    digest = module_digest(q)
    assert len(digest) == 16
    assert module_digest(quantize(W, spec)) == digest
    assert module_digest(dataclasses.replace(q, dtype=torch.float16)) == digest
    assert module_digest(QuantLinear.from_quantized(q).quantized()) == digest
    for name, tensor in q.state_dict().items():
        if name != "nested_map":
            changed = tensor.clone().reshape(-1)
            changed[-1] += 1
            other = dataclasses.replace(q, **{name: changed.reshape(tensor.shape)})
            assert module_digest(other) != digest, name
    assert module_digest(quantize(W.reshape(64, 32), spec)) != digest


def test_module_digest_survives_bitsandbytes_layout() -> None:
    q = quantize(torch.randn(32, 64), QuantSpec(double_quant=True))
    assert module_digest(from_bnb("w", to_bnb("w", q))) == module_digest(q)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dense_digest_knows_a_dequantised_weight_in_every_dtype(dtype: torch.dtype) -> None:
    W = torch.randn(32, 64)
    weight = quantize(W, QuantSpec()).dequantize(torch.float16)
    digest = dense_digest(weight)
    assert dense_digest(weight.to(dtype)) == digest
    others = [W, weight.T, weight.reshape(64, 32), quantize(W, QuantSpec("nf3")).dequantize()]
    others += [quantize(W, QuantSpec(block_size=32)).dequantize(), -weight]
    assert digest not in [dense_digest(other) for other in others]


def some() -> Fingerprint:
    specs = {"a": QuantSpec(), "b": QuantSpec("int8", 128)}
    return Fingerprint(specs, {"a": "0" * 16, "b": "1" * 16}, "bfloat16")


def test_written_and_read(tmp_path: Path) -> None:
    assert Fingerprint.read(tmp_path) is None
    some().write(tmp_path)
    assert Fingerprint.read(tmp_path) == some()
    values = json.loads((tmp_path / FINGERPRINT_FILE).read_text())
    assert values["codes_sha256"] == some().codes_sha256
    dense = dataclasses.replace(some(), dense=True)
    dense.write(tmp_path)
    assert Fingerprint.read(tmp_path) == dense
    assert values["modules"]["b"]["format"] == "int8"


def test_differences() -> None:
    made = some()
    assert made.differences(some()) == []
    other = dataclasses.replace(made, digests={**made.digests, "a": "2" * 16})
    assert made.differences(other) == ["a has other codes or scales"]
    assert other.codes_sha256 != made.codes_sha256
    other = dataclasses.replace(made, specs={**made.specs, "b": QuantSpec()}, compute_dtype="float16")
    assert made.differences(other) == ["b is nf4/64 here, was int8/128"]
    # The same codes may be computed with in any dtype.
    assert made.differences(dataclasses.replace(made, compute_dtype="float16")) == []
    fewer = Fingerprint({"a": made.specs["a"]}, {"a": made.digests["a"]}, "bfloat16")
    assert made.differences(fewer) == ["b is dense in this base"]
    assert fewer.differences(made) == ["b is quantised in this base"]
    many = Fingerprint({str(i): QuantSpec() for i in range(99)}, {str(i): "" for i in range(99)}, "bfloat16")
    assert len(many.differences(made)) == 5


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"version": 2},
        {"version": 1},
        {"version": 1, "modules": [], "compute_dtype": "x"},
        {"version": 1, "compute_dtype": "x", "modules": {"a": {"format": "nf4"}}},
        {"version": 1, "compute_dtype": "x", "modules": {"a": {"format": "no", "digest": ""}}},
    ],
)
def test_from_dict_refuses(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Fingerprint.from_dict(values)
