"""Triton kernels for float8 products: rows of activations and packed weights as float8_e4m3fn with scales."""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.backends.triton_common import interpreted, on_device, scale_of
from quant.backends.triton_tile import GROUPS, Fields, layout, weight_tile
from quant.formats import Format
from quant.tables import tables

_ROWS, _COLUMNS = 32, 128
_BLOCK = 1024


@triton.jit
def _to_float8(v, INTERPRETED: tl.constexpr):
    """float32 to float8_e4m3fn, to nearest even: the hardware's cast, which the interpreter gets wrong.

    There the value is rounded to float8's grid in float32 first; the cast then has nothing to round.
    """
    if INTERPRETED:
        bits = v.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000  # three bits after the leading one
        normal = bits.to(tl.float32, bitcast=True)
        small = (tl.abs(v) + 16384.0) - 16384.0  # a float32 near 2^14 has float8's least step, 2^-9
        v = tl.where(tl.abs(v) < 0.015625, tl.where(v < 0, -small, small), normal)
    return v.to(tl.float8e4nv)


@triton.jit
def _row_scales_kernel(
    out_ptr,
    scales_ptr,
    zeros_ptr,
    nested_scales_ptr,
    nested_offset_ptr,
    nested_map_ptr,
    low,
    high,
    n_columns,
    most_blocks,
    largest,
    tiny,
    BITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    AFFINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = row * n_columns // BLOCK_SIZE
    last = ((row + 1) * n_columns - 1) // BLOCK_SIZE
    bound = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, most_blocks, BLOCK):
        block = first + start + tl.arange(0, BLOCK)
        known = block <= last
        scale = scale_of(
            block, known, scales_ptr, nested_scales_ptr, nested_offset_ptr, nested_map_ptr, NESTED
        )
        reach = tl.maximum(tl.abs(low), tl.abs(high)) + tl.zeros((BLOCK,), tl.float32)
        if AFFINE:
            zero = tl.load(zeros_ptr + block, mask=known, other=0).to(tl.float32) * (1.0 / (1 << (8 - BITS)))
            reach = tl.maximum(tl.abs(low - zero), tl.abs(high - zero))
        bound = tl.maximum(bound, tl.where(known, tl.abs(scale) * reach, 0.0))
    tl.store(out_ptr + row, tl.maximum(tl.max(bound, 0) / largest, tiny))


@triton.jit
def _decode_kernel(
    out_ptr,
    row_scales_ptr,
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
    TRANSPOSED: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_column = tl.program_id(1) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    tile = weight_tile(
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
        BITS,
        BLOCK_SIZE,
        NESTED,
        AFFINE,
        GROUP,
        ONE_SCALE,
        ROWS,
        COLUMNS,
    )
    scale = tl.load(row_scales_ptr + row, mask=row < n_rows, other=1.0)
    tile = _to_float8(tile / scale[:, None], INTERPRETED)
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    if TRANSPOSED:
        place = column.to(tl.int64)[:, None] * n_rows + row[None, :]
        tl.store(out_ptr + place, tl.trans(tile), mask=tl.trans(inside))
    else:
        tl.store(out_ptr + row[:, None] * n_columns + column[None, :], tile, mask=inside)


def row_scales(
    fields: Fields, shape: tuple[int, int], fmt: Format, block_size: int, largest: float, tiny: float
) -> Tensor:
    """Of each row of a packed weight, a bound of its values divided by ``largest``: float32 (rows,)."""
    _, scales, zeros, nested_scales, offset, mapping = fields
    rows, columns = shape
    out = torch.empty(rows, dtype=torch.float32, device=scales.device)
    most_blocks = -(-columns // block_size) + 1
    with on_device(scales.device):
        _row_scales_kernel[(rows,)](
            out,
            scales,
            scales if zeros is None else zeros,
            scales if nested_scales is None else nested_scales,
            scales if offset is None else offset,
            scales if mapping is None else mapping,
            min(fmt.levels),
            max(fmt.levels),
            columns,
            most_blocks,
            largest,
            tiny,
            BITS=fmt.bits,
            BLOCK_SIZE=block_size,
            NESTED=nested_scales is not None,
            AFFINE=fmt.affine,
            BLOCK=min(_BLOCK, triton.next_power_of_2(most_blocks)),
            enable_fp_fusion=False,
        )
    return out


def decode(
    fields: Fields,
    shape: tuple[int, int],
    fmt: Format,
    block_size: int,
    scales: Tensor,
    out: Tensor,
    *,
    transposed: bool,
) -> Tensor:
    """Values of a packed weight over ``scales`` (rows,), into ``out``: float8_e4m3fn, contiguous.

    (rows, columns), or with ``transposed`` (columns, rows).
    """
    codes, blocks, zeros, nested_scales, offset, mapping = fields
    rows, columns = shape
    group = GROUPS[fmt.bits] if columns % GROUPS[fmt.bits] == 0 else 1
    with on_device(codes.device):
        _decode_kernel[(triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))](
            out,
            scales,
            codes,
            blocks,
            blocks if zeros is None else zeros,
            blocks if nested_scales is None else nested_scales,
            blocks if offset is None else offset,
            blocks if mapping is None else mapping,
            tables(fmt, codes.device).levels,
            rows,
            columns,
            codes.numel(),
            TRANSPOSED=transposed,
            INTERPRETED=interpreted(),
            **layout(fmt, block_size, columns, group, _ROWS, _COLUMNS, nested_scales is not None),
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    factor_ptr,
    out_ptr,
    scales_ptr,
    n_columns,
    stride,
    largest,
    tiny,
    FACTOR: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    top = tl.zeros((BLOCK,), tl.float32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride + column, mask=column < n_columns, other=0.0).to(tl.float32)
        if FACTOR:
            x = x * tl.load(factor_ptr + column, mask=column < n_columns, other=0.0)
        top = tl.maximum(top, tl.abs(x))
        bad |= (x != x).to(tl.int32)  # a maximum may drop NaN
    scale = tl.maximum(tl.max(top, 0) / largest, tiny)
    scale = tl.where(tl.max(bad, 0) > 0, float("nan"), scale)
    tl.store(scales_ptr + row, scale)
    for start in range(0, n_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride + column, mask=column < n_columns, other=0.0).to(tl.float32)
        if FACTOR:
            x = x * tl.load(factor_ptr + column, mask=column < n_columns, other=0.0)
        x8 = _to_float8(x / scale, INTERPRETED)
        tl.store(out_ptr + row * n_columns + column, x8, mask=column < n_columns)


def quantize_rows(x: Tensor, factor: Tensor | None, largest: float, tiny: float) -> tuple[Tensor, Tensor]:
    """Rows of ``x * factor`` as float8_e4m3fn and their float32 scales, in one launch.

    Args:
        x: (rows, columns), float; the last dimension contiguous.
        factor: float32 (columns,) or None.
        largest: What the largest of a row becomes.
        tiny: Least scale.
    """
    rows, columns = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    with on_device(x.device):
        _quantize_rows_kernel[(rows,)](
            x,
            x if factor is None else factor,
            out,
            scales,
            columns,
            x.stride(0),
            largest,
            tiny,
            FACTOR=factor is not None,
            INTERPRETED=interpreted(),
            BLOCK=min(2048, triton.next_power_of_2(columns)),
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out, scales
