"""The search for the scales of least error as one Triton kernel."""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.backends.triton_common import TINY, nearest_rank, on_device
from quant.formats import Format
from quant.tables import tables

_TILE = 2048  # elements a program searches, as many as one encodes


@triton.jit
def _search_kernel(
    weight_ptr,
    importance_ptr,
    base_ptr,
    scales_ptr,
    thresholds_ptr,
    sorted_levels_ptr,
    multipliers_ptr,
    n_multipliers,
    numel,
    n_blocks,
    n_columns,
    BITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    REFINEMENTS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # (BLOCKS,)
    at = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    inside = at < numel
    w = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    one = tl.full((BLOCKS,), 1.0, tl.float32)
    tiny = tl.full((BLOCKS,), TINY, tl.float32)
    # in units of the block's absmax scale, where squares neither overflow nor vanish
    base = tl.load(base_ptr + block, mask=block < n_blocks, other=0.0)
    w = w * tl.div_rn(one, tl.where(tl.abs(base) < tiny, one, base))[:, None]
    if IMPORTANCE:
        h = tl.load(importance_ptr + at % n_columns, mask=inside, other=0.0)
    else:
        h = inside.to(tl.float32)
    hw = h * w
    best, best_gain = one, tl.zeros((BLOCKS,), tl.float32)
    for i in range(n_multipliers):
        s = one * tl.load(multipliers_ptr + i)
        rank = nearest_rank(w * tl.div_rn(one, s)[:, None], thresholds_ptr, BITS)
        c = tl.load(sorted_levels_ptr + rank)
        num = tl.sum(hw * c, 1)
        fit = tl.div_rn(num, tl.maximum(tl.sum(h * c * c, 1), tiny))
        better = num * fit > best_gain
        best_gain = tl.where(better, num * fit, best_gain)
        best = tl.where(better, fit, best)
    chosen, chosen_error = one, tl.full((BLOCKS,), float("inf"), tl.float32)
    candidate = one
    # the base first, then the best of the grid and its refinements
    for i in tl.static_range(REFINEMENTS + 1):
        s = tl.where(tl.abs(candidate) < tiny, tl.where(candidate < 0.0, -tiny, tiny), candidate)
        rank = nearest_rank(w * tl.div_rn(one, s)[:, None], thresholds_ptr, BITS)
        c = tl.load(sorted_levels_ptr + rank)
        residual = w - c * candidate[:, None]
        error = tl.sum(h * residual * residual, 1)
        better = error < chosen_error
        chosen = tl.where(better, candidate, chosen)
        chosen_error = tl.where(better, error, chosen_error)
        if i == 0:
            candidate = best
        else:
            den = tl.sum(h * c * c, 1)
            candidate = tl.where(den > 0.0, tl.div_rn(tl.sum(hw * c, 1), tl.maximum(den, tiny)), candidate)
    tl.store(scales_ptr + block, tl.where(chosen == 1.0, base, base * chosen), mask=block < n_blocks)


def search_scales(
    weight: Tensor,
    fmt: Format,
    block_size: int,
    base: Tensor,
    multipliers: list[float],
    importance: Tensor | None,
    refinements: int = 3,
) -> Tensor:
    """The scale of each block with the least (weighted) squared error, in one launch.

    Args:
        weight: Any shape, float; computed in float32.
        fmt: Not affine.
        block_size: Elements a block.
        base: float32 (n_blocks,), the absmax rule's scales: also the first candidate.
        multipliers: Of ``base``, of either sign, to try.
        importance: float32, not negative: one an element, or (in_features,), one a column.
        refinements: Least-squares fits after the grid.

    Returns:
        float32 (n_blocks,). Equal to the torch search but for the order of its sums.
    """
    flat = weight.reshape(-1)
    table = tables(fmt, flat.device)
    ranked = table.levels[table.order.int()]
    scales = torch.empty_like(base)
    if flat.numel() == 0:
        return scales
    blocks = max(1, _TILE // block_size)
    weights = flat if importance is None else importance.reshape(-1).float().contiguous()
    grid = torch.tensor(multipliers, dtype=torch.float32).to(flat.device, non_blocking=True)
    with on_device(flat.device):
        _search_kernel[(triton.cdiv(base.numel(), blocks),)](
            flat,
            weights,
            base,
            scales,
            table.thresholds,
            ranked,
            grid,
            grid.numel(),
            flat.numel(),
            base.numel(),
            weights.numel(),
            BITS=fmt.bits,
            BLOCK_SIZE=block_size,
            BLOCKS=blocks,
            IMPORTANCE=importance is not None,
            REFINEMENTS=refinements,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return scales
