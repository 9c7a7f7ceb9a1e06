"""The product with packed weights at few tokens against the reference: interpreted on a CPU."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

import triton
import triton.language as tl

from quant import QuantizedTensor, QuantSpec, formats, packing, quantize
from quant.backends import triton_kernels, triton_product
from quant.backends.triton_product import Tile, product
from quant.tables import tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Triton's interpreter truncates the decoded weights and the output to bfloat16 instead of rounding them
EPS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2 if DEVICE == "cpu" else 5e-3}


def fields(q: QuantizedTensor) -> triton_product.Fields:
    return (q.codes, q.scales, q.zeros, q.nested_scales, q.nested_offset, q.nested_map)


def check(
    spec: QuantSpec,
    shape: tuple[int, int],
    tokens: int,
    dtype: torch.dtype,
    transposed: bool,
    bias: bool = False,
    tile: Tile | None = None,
) -> None:
    """The product in a poisoned output against float64 products with the reference's weight."""
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    q = quantize(torch.randn(shape, generator=generator), spec, backend="reference").to(DEVICE)
    rows, columns = shape
    inner, outputs = (rows, columns) if transposed else (columns, rows)
    x = torch.randn(tokens, inner, generator=generator).to(DEVICE, dtype)
    b = torch.randn(rows, generator=generator).to(DEVICE) if bias and not transposed else None
    dense = q.dequantize(dtype, backend="reference").double()
    exact = x.double() @ (dense if transposed else dense.t()) + (0.0 if b is None else b.double())
    storage = torch.full((tokens + 2, outputs + 5), float("nan"), device=DEVICE, dtype=dtype)
    out = storage[1:-1, 3:-2]
    got = product(
        x, fields(q), shape, spec.fmt, spec.block_size, bias=b, transposed=transposed, out=out, tile=tile
    )
    assert got.data_ptr() == out.data_ptr()
    assert (got.double() - exact).norm() <= EPS[dtype] * exact.norm()
    assert storage.isnan().sum() == storage.numel() - out.numel()  # nothing beside the output was touched


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", formats.names())
def test_every_format(name: str, nested: bool, transposed: bool) -> None:
    # rows of whole blocks, rows of whole bytes, rows of neither
    for shape, block_size, dtype in zip([(40, 256), (33, 136), (17, 75)], (64, 16, 32), DTYPES, strict=True):
        check(QuantSpec(name, block_size, nested), shape, 3, dtype, transposed, bias=True)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 17, 64])
def test_tokens(tokens: int, transposed: bool) -> None:
    check(QuantSpec("nf4", 64, True), (48, 192), tokens, torch.float16, transposed, bias=True)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tile", [Tile(16, 32), Tile(64, 64), Tile(16, 16, 2, 3), Tile(32, 128, 8, 100)])
def test_tiles_and_split_sums(tile: Tile, transposed: bool) -> None:
    for spec in (QuantSpec("nf4", 128), QuantSpec("int3", 4096, True)):
        check(spec, (40, 272), 5, torch.float32, transposed, bias=True, tile=tile)


@settings(max_examples=25)
@given(
    name=st.sampled_from(formats.names()),
    block_size=st.sampled_from([16, 64, 256]),
    nested=st.booleans(),
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    tokens=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
)
def test_any_shape(
    name: str,
    block_size: int,
    nested: bool,
    rows: int,
    columns: int,
    tokens: int,
    dtype: torch.dtype,
    transposed: bool,
) -> None:
    check(QuantSpec(name, block_size, nested), (rows, columns), tokens, dtype, transposed)


def test_strided_inputs_and_nothing_to_do() -> None:
    spec = QuantSpec()
    q = quantize(torch.randn(32, 64), spec).to(DEVICE)
    dense = q.dequantize(torch.float32)

    def run(x: Tensor, transposed: bool = False) -> Tensor:
        return product(x, fields(q), (32, 64), spec.fmt, 64, transposed=transposed)

    wide = torch.randn(4, 200, device=DEVICE)
    torch.testing.assert_close(run(wide[:, 50:114]), wide[:, 50:114] @ dense.t(), rtol=1e-5, atol=1e-4)
    turned = torch.randn(64, 4, device=DEVICE).t()
    torch.testing.assert_close(run(turned), turned @ dense.t(), rtol=1e-5, atol=1e-4)
    assert run(torch.empty(0, 64, device=DEVICE)).shape == (0, 32)
    for x, transposed in ((torch.randn(65, 64), False), (torch.randn(3, 64), True), (torch.randn(64), False)):
        with pytest.raises(ValueError, match="expected"):
            run(x.to(DEVICE), transposed)
    with pytest.raises(ValueError, match="no bias"):
        product(torch.randn(2, 32), fields(q), (32, 64), spec.fmt, 64, bias=torch.zeros(32), transposed=True)
    with pytest.raises(ValueError, match="out is"):
        product(torch.randn(2, 64), fields(q), (32, 64), spec.fmt, 64, out=torch.empty(2, 31))


@triton.jit
def _last_tile_kernel(  # type: ignore[no-untyped-def]
    out_ptr, codes_ptr, scales_ptr, levels_ptr, n_rows, n_columns, n_bytes, GROUP: tl.constexpr
):
    row = n_rows - 16 + tl.arange(0, 16).to(tl.int64)
    tile = triton_product.weight_tile(
        row,
        n_columns - 16,
        codes_ptr,
        scales_ptr,
        scales_ptr,
        scales_ptr,
        scales_ptr,
        scales_ptr,
        levels_ptr,
        n_rows,
        n_columns,
        n_bytes,
        2,
        4096,
        False,
        False,
        GROUP,
        False,
        16,
        16,
    )
    tl.store(out_ptr + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :], tile)


@pytest.mark.parametrize("group", [1, 4])
def test_offsets_beyond_32_bits(group: int) -> None:
    """The last elements of a weight of 5e9 at 2 bits; untouched pages of its codes are never backed."""
    fmt, rows, columns = formats.get("nf2"), 76_294, 65_536
    codes = torch.empty(rows * columns // 4, dtype=torch.uint8, device=DEVICE)
    scales = torch.ones(rows * columns // 4096, device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randint(4, (16, 16), generator=generator, dtype=torch.uint8)
    whole = codes.view(rows, -1)
    whole[-16:, -4:] = packing.pack(wanted, 2).view(16, 4).to(DEVICE)
    out = torch.full((16, 16), float("nan"), device=DEVICE)
    levels = tables(fmt, torch.device(DEVICE)).levels
    _last_tile_kernel[(1,)](out, codes, scales, levels, rows, columns, codes.numel(), GROUP=group)
    assert torch.equal(out, levels[wanted.long().to(DEVICE)])
    # and the decoder, whose range begins beyond 2**32
    tail = torch.full((16,), float("nan"), device=DEVICE)
    triton_kernels.dequantize(codes, scales, None, fmt, 4096, rows * columns - 16, tail)
    assert torch.equal(tail, levels[wanted[-1].long().to(DEVICE)])
