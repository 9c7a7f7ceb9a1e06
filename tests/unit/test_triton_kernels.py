"""Triton kernels against the reference, to the bit: interpreted on a CPU, compiled on a GPU.

bfloat16 outputs are left out on the CPU: Triton's interpreter truncates float32 to bfloat16, it does not
round.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from quant import formats, scales, search
from quant.backends import reference, triton_kernels
from quant.nested import double_dequantize, double_quantize
from quant.spec import QuantSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
SIZES = [1, 63, 100, 257 * 33, 8192]


def weights(numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Heavy-tailed values with zero, constant and one-sided blocks."""
    generator = torch.Generator().manual_seed(numel)
    w = torch.randn(numel, generator=generator) * torch.rand(numel, generator=generator)
    w[64:128] = 0.0
    w[:16] = 0.5
    w[128:192].abs_()
    return w.to(DEVICE, dtype)


@pytest.mark.parametrize("block_size", [16, 64, 4096])
@pytest.mark.parametrize("name", formats.names())
def test_quantize_equals_reference(name: str, block_size: int) -> None:
    fmt = formats.get(name)
    for numel in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            w = weights(numel, dtype)
            expected = reference.quantize(w.cpu(), fmt, block_size)
            got = triton_kernels.quantize(w, fmt, block_size)
            for want, have in zip(expected, got, strict=True):
                assert (want is None) == (have is None)
                assert want is None or torch.equal(want, have.cpu()), (numel, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 64, 4096])
@pytest.mark.parametrize("name", formats.names())
def test_dequantize_equals_reference(name: str, block_size: int, dtype: torch.dtype) -> None:
    fmt = formats.get(name)
    for numel in SIZES:
        codes, stored, zeros = reference.quantize(weights(numel), fmt, block_size)
        for start in {0, 13 if numel > 150 else 0, 64 if numel > 150 else 0}:
            out = torch.full((numel - start - start % 7,), float("nan"), dtype=dtype, device=DEVICE)
            expected = torch.empty_like(out)
            triton_kernels.dequantize(codes, stored, zeros, fmt, block_size, start, out)
            reference.dequantize(codes, stored, zeros, fmt, block_size, start, expected)
            assert torch.equal(out, expected), (numel, start)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", ["nf4", "int3", "uint2"])
def test_dequantize_nested_equals_reference(name: str, signed: bool) -> None:
    fmt = formats.get(name)
    numel = 64 * 700 + 5  # more than two groups of 256 scales
    codes, dense, zeros = reference.quantize(weights(numel), fmt, 64)
    stored, *nested = double_quantize(dense, signed=signed)
    out = torch.full((numel,), float("nan"), device=DEVICE)
    triton_kernels.dequantize_nested(codes, stored, zeros, tuple(nested), fmt, 64, 0, out)
    expected = torch.empty_like(out)
    reference.dequantize(codes, double_dequantize(stored, *nested), zeros, fmt, 64, 0, expected)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_quantize_shows_bad_weights_in_the_scale(bad: float) -> None:
    w = weights(8192)
    w[1000] = bad
    _, found, _ = triton_kernels.quantize(w, formats.get("nf4"), 64)
    assert not torch.isfinite(found[1000 // 64])
    assert torch.isfinite(found).sum() == found.numel() - 1


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", [name for name in formats.names() if not formats.get(name).affine])
def test_search_scales_finds_the_reference_error(name: str, weighted: bool) -> None:
    spec, w = QuantSpec(name, 64), weights(64 * 40 + 7)
    importance = (
        torch.rand(w.numel(), generator=torch.Generator().manual_seed(0)).to(DEVICE) if weighted else None
    )
    base, _ = reference.absmax_scales(w, spec.fmt, 64)
    grid = search.multipliers(spec.fmt, True)
    got = triton_kernels.search_scales(w, spec.fmt, 64, base, grid, importance)
    want, _ = scales.search_scales(w.cpu(), spec, True, None if importance is None else importance.cpu())
    # torch ranks the grid on a tabulated codebook and sums in another order: in a few blocks another of two
    # nearly equal candidates wins; at 8 bits, where every candidate explains all but 1e-5 of a block, in many
    assert ((got.cpu() - want).abs() > 1e-5 * want.abs()).float().mean() <= (0.1 if spec.bits < 8 else 0.5)

    def error(found: torch.Tensor) -> float:
        out = torch.empty_like(w)
        codes = reference.encode(w, spec.fmt, 64, found, None)
        reference.dequantize(codes, found, None, spec.fmt, 64, 0, out)
        return float(((w - out).square() * (1.0 if importance is None else importance)).sum())

    assert error(got) == pytest.approx(error(want.to(DEVICE)), rel=1e-3 if spec.bits < 8 else 5e-3)
    assert error(got) <= error(base)


def test_unavailable_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton_kernels.unavailable(torch.device("cpu"), formats.get("nf4"), 64) == "needs CUDA"
    assert triton_kernels.unavailable(torch.device("cuda"), formats.get("nf4"), 64) is None
