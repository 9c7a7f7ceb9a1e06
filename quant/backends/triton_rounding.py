"""Triton kernel that rounds column after column: the inner loop of GPTQ and coordinate descent."""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.backends.triton_common import nearest_rank, on_device

_ROWS = 32  # rows of the weight a program: one a thread of its single warp, so that nothing is exchanged


@triton.jit
def _sweep_kernel(
    base_ptr,
    anchor_ptr,
    feedback_ptr,
    scales_ptr,
    inverse_ptr,
    zeros_ptr,
    levels_ptr,
    midpoints_ptr,
    ranks_ptr,
    values_ptr,
    n_columns,
    n_rows,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    AFFINE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    inside = row < n_rows
    column = tl.arange(0, COLUMNS)  # (COLUMNS,)
    tile = column.to(tl.int64)[:, None] * n_rows + row[None, :]
    target = tl.load(base_ptr + tile, mask=(column < n_columns)[:, None] & inside[None, :], other=0.0)
    at = row  # of column c; counted on, because c * n_rows would be a 32-bit product
    for c in range(n_columns):
        anchor = tl.load(anchor_ptr + at, mask=inside, other=0.0)
        scale = tl.load(scales_ptr + at, mask=inside, other=0.0)
        inverse = tl.load(inverse_ptr + at, mask=inside, other=0.0)
        weights = tl.load(feedback_ptr + c * n_columns + column, mask=column < n_columns, other=0.0)
        weights = tl.where(column > c, weights, 0.0)
        unit = tl.sum(tl.where((column == c)[:, None], target, 0.0), 0) * inverse
        if AFFINE:
            zero = tl.load(zeros_ptr + at, mask=inside, other=0.0)
            unit += zero
        rank = nearest_rank(unit, midpoints_ptr, BITS)
        level = tl.load(levels_ptr + rank)
        if AFFINE:
            level -= zero
        value = level * scale
        target += weights[:, None] * (anchor - value)[None, :]
        tl.store(ranks_ptr + at, rank, mask=inside)
        tl.store(values_ptr + at, value, mask=inside)
        at += n_rows


def sweep_columns(
    base: Tensor,
    anchor: Tensor,
    feedback: Tensor,
    scales: Tensor,
    inverse: Tensor,
    zeros: Tensor | None,
    levels: Tensor,
    midpoints: Tensor,
) -> tuple[Tensor, Tensor]:
    """Round n columns in sequence, each from ``base[c] + sum_{i<c} (anchor - value)[i] * feedback[i, c]``.

    Args:
        base: (n, rows) float32, contiguous as all that follow.
        anchor: (n, rows) float32.
        feedback: (n, n) float32; only its part above the diagonal is read.
        scales: (n, rows) float32, and ``inverse``, 1 / scales or 0.
        inverse: (n, rows) float32.
        zeros: (n, rows) float32 in units of the levels, or None.
        levels: (2**bits,) float32, ascending.
        midpoints: (2**bits - 1,) float32.

    Raises:
        ValueError: a tensor that is not contiguous.

    Returns:
        Index into ``levels``, (n, rows) int32, and (level - zero) * scale, (n, rows) float32.
    """
    n, rows = base.shape
    for tensor in (base, anchor, feedback, scales, inverse, zeros):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"tensors must be contiguous; got strides {tensor.stride()} of {tensor.shape}")
    ranks = torch.empty(base.shape, dtype=torch.int32, device=base.device)
    values = torch.empty_like(base)
    with on_device(base.device):
        _sweep_kernel[(triton.cdiv(rows, _ROWS),)](
            base,
            anchor,
            feedback,
            scales,
            inverse,
            scales if zeros is None else zeros,
            levels,
            midpoints,
            ranks,
            values,
            n,
            rows,
            BITS=levels.numel().bit_length() - 1,
            COLUMNS=max(16, triton.next_power_of_2(n)),
            ROWS=_ROWS,
            AFFINE=zeros is not None,
            num_warps=1,
        )
    return ranks, values
