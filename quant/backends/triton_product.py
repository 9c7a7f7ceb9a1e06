"""Triton kernels for the product with a packed weight at 1 to 64 tokens: decoded in registers, never stored.

At few tokens a product costs what reading the weight costs, so decoding to memory first costs four times as
much again. The values multiplied are those that ``dequantize`` gives in the input's dtype, sums are float32.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.backends.triton_kernels import _scale_of, _value, interpreted, on_device
from quant.formats import Format
from quant.tables import tables

MAX_TOKENS = 64
_GROUP = {2: 4, 3: 8, 4: 2, 8: 1}  # codes of the smallest whole number of bytes
_PROGRAMS = 264  # two for each of an H100's 132 multiprocessors; fewer, and the sum is split


class Tile(NamedTuple):
    """What a program takes at once.

    Attributes:
        rows: Of the weight, a power of two from 16.
        columns: Of the weight, a power of two from 16.
        warps: Warps a program.
        split: Programs that share a sum; 0: as many as fill the device.

    The default has not been measured on a GPU yet; ``benchmarks.speed --suite small`` tries others.
    """

    rows: int = 32
    columns: int = 128
    warps: int = 4
    split: int = 0


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
    scale = _scale_of(block, known, scales_ptr, nested_scales_ptr, nested_offset_ptr, nested_map_ptr, NESTED)
    zero = 0.0
    if AFFINE:
        zero = tl.load(zeros_ptr + block, mask=known, other=0).to(tl.float32) * (1.0 / (1 << (8 - BITS)))
    if GROUP == 1:
        bit = at * BITS
        byte = bit // 8
        word = tl.load(codes_ptr + byte, mask=inside, other=0).to(tl.int32) << 8
        word |= tl.load(codes_ptr + byte + 1, mask=inside & (byte + 1 < n_bytes), other=0).to(tl.int32)
        code = (word >> (16 - BITS - (bit % 8).to(tl.int32))) & ((1 << BITS) - 1)
        values = _value(code, zero, scale, levels_ptr, AFFINE)
    elif BITS == 3:
        byte = at // 8 * 3
        word = tl.load(codes_ptr + byte, mask=inside, other=0).to(tl.int32) << 16
        word |= tl.load(codes_ptr + byte + 1, mask=inside & (byte + 1 < n_bytes), other=0).to(tl.int32) << 8
        word |= tl.load(codes_ptr + byte + 2, mask=inside & (byte + 2 < n_bytes), other=0).to(tl.int32)
        v0 = _value((word >> 21) & 7, zero, scale, levels_ptr, AFFINE)
        v1 = _value((word >> 18) & 7, zero, scale, levels_ptr, AFFINE)
        v2 = _value((word >> 15) & 7, zero, scale, levels_ptr, AFFINE)
        v3 = _value((word >> 12) & 7, zero, scale, levels_ptr, AFFINE)
        v4 = _value((word >> 9) & 7, zero, scale, levels_ptr, AFFINE)
        v5 = _value((word >> 6) & 7, zero, scale, levels_ptr, AFFINE)
        v6 = _value((word >> 3) & 7, zero, scale, levels_ptr, AFFINE)
        v7 = _value(word & 7, zero, scale, levels_ptr, AFFINE)
        # the axis joined last varies fastest, so pairs are joined four apart first
        even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
        values = tl.join(even, tl.join(tl.join(v1, v5), tl.join(v3, v7)))
    else:
        word = tl.load(codes_ptr + at * BITS // 8, mask=inside, other=0).to(tl.int32)
        if BITS == 8:
            values = _value(word, zero, scale, levels_ptr, AFFINE)
        elif BITS == 4:
            v0 = _value(word >> 4, zero, scale, levels_ptr, AFFINE)
            values = tl.join(v0, _value(word & 15, zero, scale, levels_ptr, AFFINE))
        else:
            v0 = _value(word >> 6, zero, scale, levels_ptr, AFFINE)
            v1 = _value((word >> 4) & 3, zero, scale, levels_ptr, AFFINE)
            v2 = _value((word >> 2) & 3, zero, scale, levels_ptr, AFFINE)
            v3 = _value(word & 3, zero, scale, levels_ptr, AFFINE)
            values = tl.join(tl.join(v0, v2), tl.join(v1, v3))
    return tl.reshape(values, (ROWS, COLUMNS))


@triton.jit
def _product_kernel(
    x_ptr,
    out_ptr,
    bias_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    nested_scales_ptr,
    nested_offset_ptr,
    nested_map_ptr,
    levels_ptr,
    tokens,
    n_rows,
    n_columns,
    n_bytes,
    x_stride,
    out_stride,
    part_stride,
    share,
    BITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    AFFINE: tl.constexpr,
    GROUP: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Forward: a program has ROWS rows of the weight and sums over `share` columns. TRANSPOSED: it has COLUMNS
    # columns and sums over `share` rows. Program (i, j) writes part j.
    token = tl.arange(0, TOKENS).to(tl.int64)
    seen = (token < tokens)[:, None]
    start = tl.program_id(1) * share
    if TRANSPOSED:
        output = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        n_outputs, n_inner = n_columns, n_rows
        total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    else:
        output = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        n_outputs, n_inner = n_rows, n_columns
        total = tl.zeros((TOKENS, ROWS), tl.float32)
    STEP: tl.constexpr = ROWS if TRANSPOSED else COLUMNS
    for step in range(0, share, STEP):
        inner = start + step + tl.arange(0, STEP)
        mask = seen & (inner < n_inner)[None, :]
        x = tl.load(x_ptr + token[:, None] * x_stride + inner[None, :], mask=mask, other=0.0)
        if TRANSPOSED:
            row, first_column = inner.to(tl.int64), tl.program_id(0) * COLUMNS
        else:
            row, first_column = output.to(tl.int64), start + step
        w = weight_tile(
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
        ).to(x_ptr.dtype.element_ty)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        if TRANSPOSED:
            total = tl.dot(x, w, total, input_precision="ieee")
        else:
            total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias_ptr + output, mask=output < n_outputs, other=0.0).to(tl.float32)[None, :]
    place = tl.program_id(1).to(tl.int64) * part_stride + token[:, None] * out_stride + output[None, :]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=seen & (output < n_outputs)[None, :])


Fields = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def product(
    x: Tensor,
    fields: Fields,
    shape: tuple[int, int],
    fmt: Format,
    block_size: int,
    *,
    bias: Tensor | None = None,
    transposed: bool = False,
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """``x W^T + bias``, or with ``transposed`` ``x W``, of a packed weight W.

    Args:
        x: (tokens, columns), transposed (tokens, rows): float32, float16 or bfloat16; the last dimension
            contiguous.
        fields: codes, scales, zeros, nested_scales, nested_offset, nested_map of a QuantizedTensor, flat.
        shape: (rows, columns) of W.
        fmt: Of W.
        block_size: Of W.
        bias: (rows,), any float dtype; not with ``transposed``.
        transposed: Multiply with W instead of W^T.
        out: Where to write, (tokens, rows) or (tokens, columns), rows may be strided; None: a fresh tensor in
            x's dtype.
        tile: What a program takes.

    Returns:
        (tokens, rows), transposed (tokens, columns).

    Raises:
        ValueError: more than 64 tokens, or a shape that does not fit.
    """
    (rows, columns), tokens = shape, x.shape[0]
    outputs, inner = (columns, rows) if transposed else (rows, columns)
    if x.ndim != 2 or x.shape[1] != inner or tokens > MAX_TOKENS:
        raise ValueError(f"x is {tuple(x.shape)}; expected (at most {MAX_TOKENS}, {inner})")
    if bias is not None and transposed:
        raise ValueError("a transposed product has no bias")
    if x.stride(1) != 1 and inner > 1:
        x = x.contiguous()
    out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device) if out is None else out
    if out.shape != (tokens, outputs) or (out.stride(1) != 1 and outputs > 1):
        raise ValueError(f"out is {tuple(out.shape)}, strides {out.stride()}; expected ({tokens}, {outputs})")
    if out.numel() == 0:
        return out
    tile = tile or Tile()
    step, width = (tile.rows, tile.columns) if transposed else (tile.columns, tile.rows)
    programs, steps = triton.cdiv(outputs, width), triton.cdiv(inner, step)
    split = tile.split or min(max(1, _PROGRAMS // programs), max(1, steps // 4))
    share = triton.cdiv(steps, split) * step
    split = triton.cdiv(inner, share)
    parts = out if split == 1 else torch.empty(split, tokens, outputs, dtype=torch.float32, device=x.device)
    _launch(x, parts, bias if split == 1 else None, fields, shape, fmt, block_size, transposed, tile, share)
    if split > 1:
        total = parts.sum(0)
        out.copy_(total if bias is None else total.add_(bias))
    return out


def _launch(
    x: Tensor,
    out: Tensor,
    bias: Tensor | None,
    fields: Fields,
    shape: tuple[int, int],
    fmt: Format,
    block_size: int,
    transposed: bool,
    tile: Tile,
    share: int,
) -> None:
    """Write the parts of the sum, (parts, tokens, outputs) or one of them without its first dimension."""
    codes, scales, zeros, nested_scales, offset, mapping = fields
    rows, columns = shape
    outputs, width = (columns, tile.columns) if transposed else (rows, tile.rows)
    group = _GROUP[fmt.bits] if columns % _GROUP[fmt.bits] == 0 else 1
    with on_device(x.device):
        _product_kernel[(triton.cdiv(outputs, width), out.shape[0] if out.ndim == 3 else 1)](
            x,
            out,
            x if bias is None else bias,
            codes,
            scales,
            scales if zeros is None else zeros,
            scales if nested_scales is None else nested_scales,
            scales if offset is None else offset,
            scales if mapping is None else mapping,
            tables(fmt, codes.device).levels,
            x.shape[0],
            rows,
            columns,
            codes.numel(),
            x.stride(0),
            out.stride(-2),
            out.stride(0) if out.ndim == 3 else 0,
            share,
            TRANSPOSED=transposed,
            BIAS=bias is not None,
            # the interpreter multiplies the bits of bfloat16 as integers
            UPCAST=interpreted() and x.dtype == torch.bfloat16,
            TOKENS=max(16, triton.next_power_of_2(x.shape[0])),
            **layout(fmt, block_size, columns, group, tile.rows, tile.columns, nested_scales is not None),
            num_warps=tile.warps,
            enable_fp_fusion=False,
        )


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
