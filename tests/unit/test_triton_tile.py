"""Tiles of packed weights in Triton kernels, beyond what the float8 products' tests see of them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from quant import formats, packing
from quant.backends import triton_kernels, triton_tile
from quant.tables import tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _last_tile_kernel(  # type: ignore[no-untyped-def]
    out_ptr, codes_ptr, scales_ptr, levels_ptr, n_rows, n_columns, n_bytes, GROUP: tl.constexpr
):
    row = n_rows - 16 + tl.arange(0, 16).to(tl.int64)
    tile = triton_tile.weight_tile(
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
