"""quant.backends: selection and its errors, the operators, torch.compile, light imports."""

import subprocess
import sys

import pytest
import torch

from quant import backends, formats
from quant.spec import QuantSpec
from quant.tensor import quantize


def test_names_and_get():
    assert {"reference", "lookup", "bnb"} <= set(backends.names())
    assert backends.get("reference").__name__ == "quant.backends.reference"
    with pytest.raises(
        ValueError, match="unknown quant backend 'cudnn'; known backends: auto, reference, lookup"
    ):
        backends.get("cudnn")


def test_select_takes_the_lookup_on_a_cpu():
    for name in formats.names():
        assert backends.select("cpu", name) == "lookup"
        assert backends.select("cpu", name, 64, "reference") == "reference"


def test_select_refuses_a_named_backend_that_cannot_run():
    with pytest.raises(RuntimeError, match="quant backend 'bnb' cannot run int4 on device 'cpu'"):
        backends.select("cpu", "int4", 64, "bnb")
    with pytest.raises(ValueError, match="unknown quant backend"):
        backends.select("cpu", "nf4", 64, "cudnn")


def test_select_says_that_a_backend_is_not_installed(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named '{name}'")

    backends._select.cache_clear()
    monkeypatch.setattr(backends, "get", missing)
    try:
        with pytest.raises(RuntimeError, match=r"cannot run nf4 on device 'cpu': not installed \(No module"):
            backends.select("cpu", "nf4", 64, "bnb")
        with pytest.raises(
            RuntimeError, match=r"no quant backend for nf4 on device 'cpu' \(lookup: not installed"
        ):
            backends.select("cpu", "nf4")
    finally:
        backends._select.cache_clear()


def test_auto_falls_back_and_a_named_backend_does_not(monkeypatch):
    monkeypatch.setitem(backends._PREFERENCE, "cpu", ("bnb", "lookup"))
    backends._select.cache_clear()
    try:
        assert backends.select("cpu", "int4") == "lookup"  # bitsandbytes has no int4
        with pytest.raises(RuntimeError, match="'bnb' cannot run int4"):
            quantize(torch.randn(64, 64), QuantSpec("int4"), backend="bnb")
    finally:
        backends._select.cache_clear()


@pytest.mark.parametrize("name", formats.names())
@pytest.mark.parametrize("double_quant", [False, True])
def test_operators_pass_opcheck(name, double_quant):
    w = torch.randn(6, 50)
    spec = QuantSpec(name, 16, double_quant)
    q = quantize(w, spec)
    parts = (q.codes, q.scales, q.zeros, q.nested_scales, q.nested_offset, q.nested_map, name, 16)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.quant.quantize, (w, name, 16, "auto"), test_utils=checks)
    torch.library.opcheck(
        torch.ops.quant.dequantize, (*parts, 0, [6, 50], torch.float32, "auto"), test_utils=checks
    )
    torch.library.opcheck(
        torch.ops.quant.dequantize_into, (torch.empty(6, 50), *parts, 0, "auto"), test_utils=checks
    )


@pytest.mark.parametrize("spec", [QuantSpec("nf4"), QuantSpec("nf4", 64, True), QuantSpec("uint3", 32)])
def test_compile_takes_the_operators_in_one_graph(spec):
    q = quantize(torch.randn(48, 96), spec)
    x = torch.randn(3, 96)

    def product(x, out):
        q.dequantize(out=out)
        return x @ q.dequantize(torch.float32).T + x @ out.T + x[:, :0] @ q.dequantize_rows(0, 48)[:, :0].T

    workspace = torch.empty(48, 96)
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, workspace), product(x, torch.empty(48, 96)))
    assert torch.equal(workspace, q.dequantize())


def test_compile_quantises_in_one_graph():
    def both(w):
        return torch.ops.quant.quantize(w * 2, "nf4", 64, "auto")

    w = torch.randn(10, 70)
    for found, expected in zip(torch.compile(both, fullgraph=True, backend="aot_eager")(w), both(w)):
        assert torch.equal(found, expected)


def test_quantize_takes_a_weight_that_wants_gradients():
    q = quantize(torch.randn(8, 64, requires_grad=True), QuantSpec("nf4"))
    assert not any(tensor.requires_grad for tensor in q.state_dict().values())


def test_import_and_use_are_light():
    code = """
import sys, torch
before = set(sys.modules)
import quant, quant.bnb_format, quant.linear
for rule in ("absmax", "signed-mse"):
    quant.quantize(torch.randn(64, 64), quant.QuantSpec("nf4", 64, True), scales=rule).dequantize()
new = {name.split(".")[0] for name in set(sys.modules) - before}
heavy = {"triton", "bitsandbytes", "transformers", "peft", "scipy", "safetensors", "qlora_engine"}
print(sorted(new & heavy))
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert found.strip() == "[]"
