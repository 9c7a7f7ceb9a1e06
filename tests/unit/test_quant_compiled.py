"""quant.backends.compiled: equal to the reference to the bit, refuses what it cannot do, never automatic."""

from __future__ import annotations

import shutil

import pytest
import torch

from quant import QuantSpec, backends, formats, quantize
from quant.backends import compiled

CPU = torch.device("cpu")
SERVED = [
    name
    for name in formats.names()
    if "whose levels" not in str(compiled.unavailable(CPU, formats.get(name), 64))
]
needs_compiler = pytest.mark.skipif(
    compiled.unavailable(CPU, formats.get("nf4"), 64) is not None, reason="no C++ compiler on this machine"
)


def check(spec: QuantSpec, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks and a remainder with a short last block, zeros, tiny and tied values."""
    monkeypatch.setattr(compiled, "_CHUNK", 1 << 13)
    compiled._loop.cache_clear()
    weight = torch.randn(2 * (1 << 13) + 5 * spec.block_size + 3).to(dtype)
    weight[: spec.block_size] = 0
    weight[spec.block_size : 2 * spec.block_size] = 1e-39
    levels = torch.tensor(spec.fmt.levels)
    ties = torch.cat([(levels[1:] + levels[:-1]) / 2, levels])
    weight[2 * spec.block_size :][: len(ties)] = ties.to(dtype)
    found, expected = (quantize(weight, spec, backend=name) for name in ("compiled", "reference"))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert torch.equal(found.dequantize(backend="compiled"), expected.dequantize(backend="reference"))


@needs_compiler
def test_compiled_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    check(QuantSpec("nf4", 64), torch.float32, monkeypatch)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [16, 256])
def test_compiled_equals_the_reference_in_every_format(
    dtype: torch.dtype, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in formats.names():
        if compiled.unavailable(CPU, formats.get(name), block_size) is None:
            check(QuantSpec(name, block_size, double_quant=block_size == 256), dtype, monkeypatch)


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("rest", [0, 7])
def test_the_loop_without_a_compiler_is_the_reference(
    name: str, rest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled, as it is written: pieces with and without something left over."""
    monkeypatch.setattr(shutil, "which", lambda program: program)
    monkeypatch.setattr(compiled, "_CHUNK", 1 << 10)
    monkeypatch.setattr(compiled, "_loop", lambda *_: compiled._quantize_blocks)
    weight = torch.randn(3 * (1 << 10) + rest)
    weight[:64] = 0
    found, expected = (quantize(weight, QuantSpec(name, 64), backend=b) for b in ("compiled", "reference"))
    for key, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor), key


def test_compiled_says_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    nf4 = formats.get("nf4")
    assert "for CPUs" in str(compiled.unavailable(torch.device("cuda"), nf4, 64))
    for name in ("fp4", "int8", "uint4", "nf3"):
        assert "whose levels ascend" in str(compiled.unavailable(CPU, formats.get(name), 64))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "needs a C++ compiler" in str(compiled.unavailable(CPU, nf4, 64))


def test_compiled_is_never_chosen_by_itself() -> None:
    assert "compiled" in backends.names()
    assert all(backends.select("cpu", name) != "compiled" for name in formats.names())
