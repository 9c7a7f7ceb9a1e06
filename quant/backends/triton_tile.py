"""A tile of a packed weight, decoded in a Triton kernel's registers; what float8 products decode with.

Multiplying such tiles at once, without a decoded weight in memory, was tried for 1 to 64 tokens and dropped:
see benchmarks/NOTES.md.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from quant.backends.triton_common import scale_of, value_of
from quant.formats import Format

GROUPS = {2: 4, 3: 8, 4: 2, 8: 1}  # codes of the smallest whole number of bytes, by bits
Fields = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@triton.jit
def weight_tile(
    row,
    first_column,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    nested_scales_ptr,
    nested_offset_ptr,
    nested_map_ptr,
    levels_ptr,
    n_rows,
    n_columns,
    n_bytes,
    BITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    AFFINE: tl.constexpr,
    GROUP: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Values of rows ``row`` (ROWS,) int64 and COLUMNS columns, float32; beyond the edge: finite values.

    GROUP: codes that are read together, 1 where rows do not begin on a byte. ONE_SCALE: a row of the tile
    lies in one block.
    """
    column = first_column + tl.arange(0, COLUMNS // GROUP) * GROUP
    at = row[:, None] * n_columns + column[None, :]  # flat index of a group's first element, (ROWS, groups)
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    if ONE_SCALE:
        block = ((row * n_columns + first_column) // BLOCK_SIZE)[:, None]
        known = (row < n_rows)[:, None]
    else:
        block = at // BLOCK_SIZE
        known = inside
    scale = scale_of(block, known, scales_ptr, nested_scales_ptr, nested_offset_ptr, nested_map_ptr, NESTED)
    zero = 0.0
    if AFFINE:
        zero = tl.load(zeros_ptr + block, mask=known, other=0).to(tl.float32) * (1.0 / (1 << (8 - BITS)))
    if GROUP == 1:
        bit = at * BITS
        byte = bit // 8
        word = tl.load(codes_ptr + byte, mask=inside, other=0).to(tl.int32) << 8
        word |= tl.load(codes_ptr + byte + 1, mask=inside & (byte + 1 < n_bytes), other=0).to(tl.int32)
        code = (word >> (16 - BITS - (bit % 8).to(tl.int32))) & ((1 << BITS) - 1)
        values = value_of(code, zero, scale, levels_ptr, AFFINE)
    elif BITS == 3:
        byte = at // 8 * 3
        word = tl.load(codes_ptr + byte, mask=inside, other=0).to(tl.int32) << 16
        word |= tl.load(codes_ptr + byte + 1, mask=inside & (byte + 1 < n_bytes), other=0).to(tl.int32) << 8
        word |= tl.load(codes_ptr + byte + 2, mask=inside & (byte + 2 < n_bytes), other=0).to(tl.int32)
        v0 = value_of((word >> 21) & 7, zero, scale, levels_ptr, AFFINE)
        v1 = value_of((word >> 18) & 7, zero, scale, levels_ptr, AFFINE)
        v2 = value_of((word >> 15) & 7, zero, scale, levels_ptr, AFFINE)
        v3 = value_of((word >> 12) & 7, zero, scale, levels_ptr, AFFINE)
        v4 = value_of((word >> 9) & 7, zero, scale, levels_ptr, AFFINE)
        v5 = value_of((word >> 6) & 7, zero, scale, levels_ptr, AFFINE)
        v6 = value_of((word >> 3) & 7, zero, scale, levels_ptr, AFFINE)
        v7 = value_of(word & 7, zero, scale, levels_ptr, AFFINE)
        # the axis joined last varies fastest, so pairs are joined four apart first
        even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
        values = tl.join(even, tl.join(tl.join(v1, v5), tl.join(v3, v7)))
    else:
        word = tl.load(codes_ptr + at * BITS // 8, mask=inside, other=0).to(tl.int32)
        if BITS == 8:
            values = value_of(word, zero, scale, levels_ptr, AFFINE)
        elif BITS == 4:
            v0 = value_of(word >> 4, zero, scale, levels_ptr, AFFINE)
            values = tl.join(v0, value_of(word & 15, zero, scale, levels_ptr, AFFINE))
        else:
            v0 = value_of(word >> 6, zero, scale, levels_ptr, AFFINE)
            v1 = value_of((word >> 4) & 3, zero, scale, levels_ptr, AFFINE)
            v2 = value_of((word >> 2) & 3, zero, scale, levels_ptr, AFFINE)
            v3 = value_of(word & 3, zero, scale, levels_ptr, AFFINE)
            values = tl.join(tl.join(v0, v2), tl.join(v1, v3))
    return tl.reshape(values, (ROWS, COLUMNS))


def layout(
    fmt: Format, block_size: int, columns: int, group: int, tile_rows: int, tile_columns: int, nested: bool
) -> dict[str, Any]:
    """The compile-time arguments of ``weight_tile``."""
    return {
        "BITS": fmt.bits,
        "BLOCK_SIZE": block_size,
        "NESTED": nested,
        "AFFINE": fmt.affine,
        "GROUP": group,
        "ONE_SCALE": columns % block_size == 0 and block_size % tile_columns == 0,
        "ROWS": tile_rows,
        "COLUMNS": tile_columns,
    }
