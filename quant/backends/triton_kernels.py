"""Triton kernels for NVIDIA GPUs, and on a CPU under Triton's interpreter (TRITON_INTERPRET=1), for tests.

One look-up kernel decodes every format and width, plain and nested scales, in one launch; one encodes every
format (``search_scales`` is in triton_search.py). Products and sums are never contracted to fused
multiply-adds (``enable_fp_fusion=False``), so codes and values equal the reference's to the bit.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.backends.triton_common import TINY, interpreted, nearest_rank, on_device, scale_of, value_of
from quant.backends.triton_search import search_scales
from quant.formats import Format
from quant.packing import packed_bytes
from quant.tables import tables

__all__ = ["dequantize", "dequantize_nested", "quantize", "search_scales", "unavailable"]

# Bytes of packed codes that one thread-row decodes: 16 bf16 values (32 bytes) at 4 bits. Sweep on an H100,
# 2026-11: 8 bytes x 256 rows x 4 warps moved 2.79 TB/s where a copy moved 2.94 and 4 bytes 2.75.
_ROW_BYTES = {2: 4, 3: 3, 4: 8, 8: 16}
_ROWS, _WARPS = 256, 4
_QUANTIZE_TILE = 2048  # elements a program encodes; 32 blocks of 64, same sweep: 1.6 TB/s, 512 elements 1.07
NestedScales = tuple[Tensor, Tensor, Tensor]


def unavailable(device: torch.device, fmt: Format, block_size: int) -> str | None:
    """Why these kernels can't serve such a tensor, or None."""
    if device.type == "cuda" or interpreted():
        return None
    return "needs CUDA"


@triton.jit
def _dequantize_kernel(
    out_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    nested_scales_ptr,
    nested_offset_ptr,
    nested_map_ptr,
    levels_ptr,
    first_row,
    skip,
    numel,
    n_bytes,
    n_columns,
    out_stride,
    BITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    NESTED: tl.constexpr,
    AFFINE: tl.constexpr,
    EVEN: tl.constexpr,
    STRIDED: tl.constexpr,
):
    # A thread-row is BYTES bytes of codes, WIDTH elements, all of one block. Row 0 of the launch is
    # `first_row` of the tensor, and its first `skip` elements lie before `out`.
    WIDTH: tl.constexpr = BYTES * 8 // BITS
    out_type = out_ptr.dtype.element_ty
    local = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    row = first_row + local
    at = local * WIDTH - skip  # where the row begins in `out`
    known = at < numel
    block = row * WIDTH // BLOCK_SIZE
    scale = scale_of(block, known, scales_ptr, nested_scales_ptr, nested_offset_ptr, nested_map_ptr, NESTED)
    if BITS == 3:
        zero = 0.0
        if AFFINE:
            zero = tl.load(zeros_ptr + block, mask=known, other=0).to(tl.float32) * 0.03125
        byte = row * 3
        word = tl.load(codes_ptr + byte, mask=known & (byte < n_bytes), other=0).to(tl.int32) << 16
        word |= tl.load(codes_ptr + byte + 1, mask=known & (byte + 1 < n_bytes), other=0).to(tl.int32) << 8
        word |= tl.load(codes_ptr + byte + 2, mask=known & (byte + 2 < n_bytes), other=0).to(tl.int32)
        v0 = value_of((word >> 21) & 7, zero, scale, levels_ptr, AFFINE).to(out_type)
        v1 = value_of((word >> 18) & 7, zero, scale, levels_ptr, AFFINE).to(out_type)
        v2 = value_of((word >> 15) & 7, zero, scale, levels_ptr, AFFINE).to(out_type)
        v3 = value_of((word >> 12) & 7, zero, scale, levels_ptr, AFFINE).to(out_type)
        v4 = value_of((word >> 9) & 7, zero, scale, levels_ptr, AFFINE).to(out_type)
        v5 = value_of((word >> 6) & 7, zero, scale, levels_ptr, AFFINE).to(out_type)
        v6 = value_of((word >> 3) & 7, zero, scale, levels_ptr, AFFINE).to(out_type)
        v7 = value_of(word & 7, zero, scale, levels_ptr, AFFINE).to(out_type)
        # the axis joined last varies fastest, so pairs are joined four apart first
        even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
        values = tl.join(even, tl.join(tl.join(v1, v5), tl.join(v3, v7)))
    else:
        scale = scale[:, None]
        zero = 0.0
        if AFFINE:
            z8 = tl.load(zeros_ptr + block, mask=known, other=0).to(tl.float32)
            zero = (z8 * (1.0 / (1 << (8 - BITS))))[:, None]
        byte = row[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
        if EVEN:
            word = tl.load(codes_ptr + byte).to(tl.int32)
        else:
            word = tl.load(codes_ptr + byte, mask=known[:, None] & (byte < n_bytes), other=0).to(tl.int32)
        if BITS == 8:
            values = value_of(word, zero, scale, levels_ptr, AFFINE).to(out_type)
        elif BITS == 4:
            v0 = value_of(word >> 4, zero, scale, levels_ptr, AFFINE).to(out_type)
            v1 = value_of(word & 15, zero, scale, levels_ptr, AFFINE).to(out_type)
            values = tl.join(v0, v1)
        else:
            v0 = value_of(word >> 6, zero, scale, levels_ptr, AFFINE).to(out_type)
            v1 = value_of((word >> 4) & 3, zero, scale, levels_ptr, AFFINE).to(out_type)
            v2 = value_of((word >> 2) & 3, zero, scale, levels_ptr, AFFINE).to(out_type)
            v3 = value_of(word & 3, zero, scale, levels_ptr, AFFINE).to(out_type)
            values = tl.join(tl.join(v0, v2), tl.join(v1, v3))
    values = tl.reshape(values, (ROWS, WIDTH))
    element = at[:, None] + tl.arange(0, WIDTH)[None, :]
    place = element
    if STRIDED:  # a thread-row lies within one row of `out`
        place = element + (at // n_columns * (out_stride - n_columns))[:, None]
    if EVEN:
        tl.store(out_ptr + place, values)
    else:
        tl.store(out_ptr + place, values, mask=(element >= 0) & (element < numel))


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, fmt: Format, block_size: int, start: int, out: Tensor
) -> Tensor:
    """As ``reference.dequantize``; ``out`` may also be 2-D with strided rows, multiples of 16 long."""
    return _launch_dequantize(codes, scales, zeros, None, fmt, block_size, start, out)


def dequantize_nested(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    nested: NestedScales,
    fmt: Format,
    block_size: int,
    start: int,
    out: Tensor,
) -> Tensor:
    """As ``dequantize``; ``nested`` = (scales, offset, map) decodes uint8 scales in the same launch."""
    return _launch_dequantize(codes, scales, zeros, nested, fmt, block_size, start, out)


def _launch_dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    nested: NestedScales | None,
    fmt: Format,
    block_size: int,
    start: int,
    out: Tensor,
) -> Tensor:
    numel = out.numel()
    if numel == 0:
        return out
    row_bytes = min(_ROW_BYTES[fmt.bits], block_size * fmt.bits // 8)
    width = row_bytes * 8 // fmt.bits
    first_row, skip = divmod(start, width)
    rows = -(-(numel + skip) // width)
    even = skip == 0 and numel % (_ROWS * width) == 0
    strided = not out.is_contiguous()
    if strided and not (out.ndim == 2 and out.stride(1) == 1 and skip == 0 and out.shape[1] % width == 0):
        raise ValueError(
            f"out {tuple(out.shape)}, strides {out.stride()}: strided rows must be multiples of {width} long"
        )
    nested_scales, offset, mapping = nested if nested is not None else (scales, scales, scales)
    with on_device(out.device):
        _dequantize_kernel[(triton.cdiv(rows, _ROWS),)](
            out,
            codes,
            scales,
            scales if zeros is None else zeros,
            nested_scales,
            offset,
            mapping,
            tables(fmt, codes.device).levels,
            first_row,
            skip,
            numel,
            codes.numel(),
            out.shape[-1],
            out.stride(0) if strided else 0,
            BITS=fmt.bits,
            BLOCK_SIZE=block_size,
            BYTES=row_bytes,
            ROWS=_ROWS,
            NESTED=nested is not None,
            AFFINE=fmt.affine,
            EVEN=even,
            STRIDED=strided,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return out


@triton.jit
def _half_even(v):
    """Round to nearest, ties to even, for 0 <= v < 2**22 (the interpreter has no libdevice)."""
    up = tl.floor(v + 0.5)
    odd = up - 2.0 * tl.floor(up * 0.5) == 1.0
    return tl.where((up == v + 0.5) & odd, up - 1.0, up)


@triton.jit
def _quantize_kernel(
    weight_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    thresholds_ptr,
    order_ptr,
    unit,
    numel,
    n_bytes,
    n_blocks,
    BITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    AFFINE: tl.constexpr,
    SIGNED: tl.constexpr,
    FILL: tl.constexpr,
    EVEN: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # (BLOCKS,)
    at = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    if EVEN:
        w = tl.load(weight_ptr + at).to(tl.float32)
    else:
        w = tl.load(weight_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    one = tl.full((BLOCKS,), 1.0, tl.float32)
    tiny = tl.full((BLOCKS,), TINY, tl.float32)
    # max() may drop a NaN, and the caller finds bad weights by their scale
    bad = tl.max((w != w).to(tl.int32), 1) > 0
    short = (block + 1) * BLOCK_SIZE > numel
    zero = tl.zeros((BLOCKS,), tl.float32)
    if AFFINE:
        low = tl.minimum(tl.min(w, 1), 0.0)
        high = tl.maximum(tl.max(w, 1), 0.0)
        scale = tl.div_rn(high - low, one * unit)
        z8 = _half_even(tl.div_rn(-low, tl.maximum(scale, tiny)) * (1 << (8 - BITS)))
        z8 = tl.minimum(tl.maximum(z8, 0.0), 255.0)
        tl.store(zeros_ptr + block, z8.to(tl.uint8), mask=block < n_blocks)
        zero = z8 * (1.0 / (1 << (8 - BITS)))
    elif SIGNED:
        low, high = tl.min(w, 1), tl.max(w, 1)
        scale = tl.div_rn(tl.where(high >= -low, high, low), one * unit)
    else:
        largest = tl.max(tl.abs(w), 1)
        if not EVEN:
            largest = tl.where(short, tl.maximum(largest, tiny), largest)
        scale = tl.div_rn(largest, one * unit)
    tl.store(scales_ptr + block, tl.where(bad, float("nan"), scale), mask=block < n_blocks)
    small = tl.abs(scale) < tiny
    divisor = tl.where(small, tl.where(scale < 0.0, -tiny, tiny), scale)
    x = w * tl.div_rn(one, divisor)[:, None]
    if not EVEN:
        x = tl.where(short[:, None], tl.div_rn(w, tl.broadcast_to(divisor[:, None], w.shape)), x)
    if AFFINE:
        x = x + zero[:, None]
    code = tl.load(order_ptr + nearest_rank(x, thresholds_ptr, BITS)).to(tl.int32)
    if not EVEN:
        code = tl.where(at < numel, code, FILL)
    BYTES: tl.constexpr = BLOCK_SIZE * BITS // 8
    if BITS == 3:
        e, o = tl.split(tl.reshape(code, (BLOCKS, BLOCK_SIZE // 8, 2, 2, 2)))
        c04, c26 = tl.split(e)
        c15, c37 = tl.split(o)
        c0, c4 = tl.split(c04)
        c2, c6 = tl.split(c26)
        c1, c5 = tl.split(c15)
        c3, c7 = tl.split(c37)
        word = (c0 << 21) | (c1 << 18) | (c2 << 15) | (c3 << 12) | (c4 << 9) | (c5 << 6) | (c6 << 3) | c7
        byte = block[:, None] * BYTES + tl.arange(0, BLOCK_SIZE // 8)[None, :] * 3
        tl.store(codes_ptr + byte, (word >> 16).to(tl.uint8), mask=byte < n_bytes)
        tl.store(codes_ptr + byte + 1, ((word >> 8) & 255).to(tl.uint8), mask=byte + 1 < n_bytes)
        tl.store(codes_ptr + byte + 2, (word & 255).to(tl.uint8), mask=byte + 2 < n_bytes)
    else:
        if BITS == 8:
            word = code
        elif BITS == 4:
            c0, c1 = tl.split(tl.reshape(code, (BLOCKS, BLOCK_SIZE // 2, 2)))
            word = (c0 << 4) | c1
        else:
            e, o = tl.split(tl.reshape(code, (BLOCKS, BLOCK_SIZE // 4, 2, 2)))
            c0, c2 = tl.split(e)
            c1, c3 = tl.split(o)
            word = (c0 << 6) | (c1 << 4) | (c2 << 2) | c3
        byte = block[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
        if EVEN:
            tl.store(codes_ptr + byte, word.to(tl.uint8))
        else:
            tl.store(codes_ptr + byte, word.to(tl.uint8), mask=byte < n_bytes)


def quantize(weight: Tensor, fmt: Format, block_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """As ``reference.quantize``, scales and codes in one launch."""
    flat = weight.reshape(-1)
    numel, n_blocks = flat.numel(), -(-flat.numel() // block_size)
    codes = torch.empty(packed_bytes(numel, fmt.bits), dtype=torch.uint8, device=flat.device)
    scales = torch.empty(n_blocks, dtype=torch.float32, device=flat.device)
    zeros = torch.empty(n_blocks, dtype=torch.uint8, device=flat.device) if fmt.affine else None
    if numel == 0:
        return codes, scales, zeros
    blocks = max(1, _QUANTIZE_TILE // block_size)
    table = tables(fmt, flat.device)
    with on_device(flat.device):
        _quantize_kernel[(triton.cdiv(n_blocks, blocks),)](
            flat,
            codes,
            scales,
            codes if zeros is None else zeros,
            table.thresholds,
            table.order,
            fmt.unit,
            numel,
            codes.numel(),
            n_blocks,
            BITS=fmt.bits,
            BLOCK_SIZE=block_size,
            BLOCKS=blocks,
            AFFINE=fmt.affine,
            SIGNED=fmt.signed,
            FILL=fmt.zero_code,
            EVEN=numel % (blocks * block_size) == 0,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return codes, scales, zeros
