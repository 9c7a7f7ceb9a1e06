"""A Triton kernel for the cross entropy of a chunk of logits, which become their own gradient where they lie.

They are read twice and written once: first for a row's maximum and its sum of exponentials, which is
corrected as the maximum grows (Milakov and Gimelshein 2018, arXiv:1805.02867), then for the gradient.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quant.backends.triton_common import on_device

_BLOCK = 8192  # logits a program reads at once


@triton.jit
def _bent(x, cap):
    # tanh(x / cap) by way of exp(-2 |x| / cap), which does not overflow
    e = tl.exp(-2.0 * tl.abs(x) / cap)
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -t, t)


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,
    targets_ptr,
    losses_ptr,
    columns,
    stride,
    cap,
    CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = logits_ptr + row * stride
    target = tl.load(targets_ptr + row)
    known = (target >= 0) & (target < columns)
    chosen = tl.load(at + target, mask=known, other=float("nan")).to(tl.float32)
    if CAPPED:
        chosen = cap * _bent(chosen, cap)
    top = -3.0e38  # finite: a block of nothing but -inf is no maximum
    total = 0.0
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < columns
        x = tl.load(at + column, mask=inside, other=float("-inf")).to(tl.float32)
        if CAPPED:
            x = tl.where(inside, cap * _bent(x, cap), float("-inf"))
        higher = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), axis=0)
        top = higher
    tl.store(losses_ptr + row, tl.log(total) - (chosen - top))
    if GRADIENT:
        tl.debug_barrier()  # the target's logit has been read by all threads
        for first in range(0, columns, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < columns
            x = tl.load(at + column, mask=inside, other=0.0).to(tl.float32)
            if CAPPED:
                t = _bent(x, cap)
                x = cap * t
            d = tl.exp(x - top) / total
            d = tl.where(column == target, d - 1.0, d)
            if CAPPED:
                d = d * (1.0 - t * t)
            tl.store(at + column, d.to(logits_ptr.dtype.element_ty), mask=inside)


def cross_entropy(
    logits: Tensor, targets: Tensor, losses: Tensor, *, softcap: float | None = None, gradient: bool = True
) -> None:
    """``losses = -log softmax(logits)[targets]`` in float32; the logits become the gradient of their sum.

    Args:
        logits: (rows, vocabulary), float32, float16 or bfloat16, each row contiguous; overwritten with
            ``gradient``.
        targets: int64 (rows,); one that is no column gives NaN.
        losses: float32 (rows,); written.
        softcap: A bound c of the logits: c * tanh(logits / c).
        gradient: Whether it is wanted.

    Raises:
        ValueError: tensors that do not fit each other.
    """
    rows, columns = logits.shape
    fits = targets.shape == losses.shape == (rows,) and targets.is_contiguous() and losses.is_contiguous()
    if not fits or not columns or (columns > 1 and logits.stride(1) != 1):
        raise ValueError(
            f"logits {tuple(logits.shape)}, strides {logits.stride()}, targets {tuple(targets.shape)} and "
            f"losses {tuple(losses.shape)} do not fit"
        )
    if not rows:
        return
    block = min(_BLOCK, triton.next_power_of_2(columns))
    with on_device(logits.device):
        _cross_entropy_kernel[(rows,)](
            logits,
            targets,
            losses,
            columns,
            logits.stride(0),
            1.0 if softcap is None else softcap,
            CAPPED=softcap is not None,
            GRADIENT=gradient,
            BLOCK=block,
            num_warps=16 if block >= 8192 else 4,
        )
