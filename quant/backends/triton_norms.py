"""Triton kernels for what stands between the products of a decoder layer: RMSNorm and the rotary embedding.

Each reads what it needs once and writes once. Rounding is that of the separate operators which they replace:
products and sums are never contracted, which at 16 bits would leave out a rounding.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quant.backends.triton_common import on_device

MOST_COLUMNS = 16384  # of a normalised row: it is held in registers as a whole
_TILE = 2048  # elements a program of short rows normalises


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    rows,
    columns,
    stride,
    eps,
    ONE: tl.constexpr,
    EARLY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    column = tl.arange(0, BLOCK)
    known = row < rows
    inside = known[:, None] & (column < columns)[None, :]
    x = tl.load(x_ptr + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / columns + eps)  # (ROWS,)
    n = x * rstd[:, None]
    if EARLY:
        n = n.to(x_ptr.dtype.element_ty).to(tl.float32)
    if ONE:
        w = w + 1.0
    y = n * w[None, :]
    at = row[:, None] * columns + column[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=known)


@triton.jit
def _rms_norm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    rows,
    columns,
    dy_stride,
    stride,
    ONE: tl.constexpr,
    EARLY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    known = row < rows
    inside = known[:, None] & (column < columns)[None, :]
    x = tl.load(x_ptr + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row, mask=known, other=0.0)
    if ONE:
        w = w + 1.0
    g = g * w[None, :]
    if EARLY:
        g = g.to(x_ptr.dtype.element_ty).to(tl.float32)
    n = x * rstd[:, None]
    mean = tl.sum(g * n, axis=1) / columns
    dx = rstd[:, None] * (g - n * mean[:, None])
    at = row[:, None] * columns + column[None, :]
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def _launch(rows: int, columns: int) -> tuple[tuple[int], dict[str, int]]:
    block = triton.next_power_of_2(columns)
    at_once = max(1, _TILE // block)
    warps = 4 if block * at_once <= 2048 else 8 if block <= 8192 else 16
    options = {"ROWS": at_once, "BLOCK": block, "num_warps": warps, "enable_fp_fusion": False}
    return (triton.cdiv(rows, at_once),), options


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, one_plus: bool, early: bool, out: Tensor, rstd: Tensor
) -> None:
    """``x / sqrt(mean(x^2) + eps) * weight`` in float32, a row at a time (Zhang and Sennrich 2019).

    Args:
        x: (rows, columns), columns at most ``MOST_COLUMNS`` and contiguous; rows may be strided.
        weight: (columns,), contiguous.
        eps: Added to the mean of the squares.
        one_plus: Multiply by ``1 + weight``.
        early: Round to x's dtype before the weight is multiplied, as Llama's does, not only after it.
        out: (rows, columns), contiguous; written.
        rstd: float32 (rows,): ``1 / sqrt(mean(x^2) + eps)``; written.

    Raises:
        ValueError: tensors that do not fit each other.
    """
    rows, columns = x.shape
    _check_rows(x, weight, out, rstd)
    if not rows:
        return
    grid, options = _launch(rows, columns)
    with on_device(x.device):
        _rms_norm_kernel[grid](
            x, weight, out, rstd, rows, columns, x.stride(0), eps, ONE=one_plus, EARLY=early, **options
        )


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, *, one_plus: bool, early: bool, out: Tensor
) -> None:
    """The gradient of ``rms_norm``'s input.

    Args:
        dy: (rows, columns), of the output; rows may be strided.
        x: As in forward.
        weight: As in forward.
        rstd: What forward wrote.
        one_plus: As in forward.
        early: As in forward.
        out: (rows, columns), contiguous; written.

    Raises:
        ValueError: tensors that do not fit each other.
    """
    rows, columns = x.shape
    _check_rows(x, weight, out, rstd)
    if dy.shape != x.shape or dy.stride(1) != 1:
        raise ValueError(f"dy {tuple(dy.shape)}, strides {dy.stride()}, does not fit x {tuple(x.shape)}")
    if not rows:
        return
    grid, options = _launch(rows, columns)
    with on_device(x.device):
        _rms_norm_backward_kernel[grid](
            dy, x, weight, rstd, out, rows, columns, dy.stride(0), x.stride(0), ONE=one_plus, EARLY=early,
            **options,
        )  # fmt: skip


def _check_rows(x: Tensor, weight: Tensor, out: Tensor, rstd: Tensor) -> None:
    rows, columns = x.shape
    fits = out.shape == x.shape and weight.shape == (columns,) and rstd.shape == (rows,)
    whole = out.is_contiguous() and weight.is_contiguous() and rstd.is_contiguous()
    if not fits or not whole or (columns > 1 and x.stride(1) != 1) or not 0 < columns <= MOST_COLUMNS:
        raise ValueError(
            f"x {tuple(x.shape)}, strides {x.stride()}, weight {tuple(weight.shape)} and out "
            f"{tuple(out.shape)} do not fit: contiguous rows of at most {MOST_COLUMNS}"
        )


# ---- the rotary embedding


@triton.jit
def _rotate(
    x_ptr,
    out_ptr,
    x_at,
    x_head,
    out_at,
    out_head,
    c1,
    c2,
    s1,
    s2,
    heads,
    half,
    BACKWARD: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    kind = out_ptr.dtype.element_ty
    x1 = tl.load(x_ptr + x_at + head * x_head + column, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + x_at + head * x_head + half + column, mask=inside, other=0.0).to(tl.float32)
    # each product rounded, as those of separate operators are
    a, b = (x1 * c1).to(kind).to(tl.float32), (x2 * c2).to(kind).to(tl.float32)
    if BACKWARD:
        y1 = a + (x2 * s2).to(kind).to(tl.float32)
        y2 = b - (x1 * s1).to(kind).to(tl.float32)
    else:
        y1 = a - (x2 * s1).to(kind).to(tl.float32)
        y2 = b + (x1 * s2).to(kind).to(tl.float32)
    tl.store(out_ptr + out_at + head * out_head + column, y1.to(kind), mask=inside)
    tl.store(out_ptr + out_at + head * out_head + half + column, y2.to(kind), mask=inside)


@triton.jit
def _rotary_kernel(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    length,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    q_out_batch,
    q_out_head,
    q_out_token,
    k_out_batch,
    k_out_head,
    k_out_token,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    q_heads,
    k_heads,
    half,
    BACKWARD: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    batch = program // length
    token = program % length
    column = tl.arange(0, HALF)[None, :]
    inside = column < half
    cos_ptr += batch * cos_batch + token * cos_token
    sin_ptr += batch * sin_batch + token * sin_token
    c1 = tl.load(cos_ptr + column, mask=inside, other=0.0).to(tl.float32)
    c2 = tl.load(cos_ptr + half + column, mask=inside, other=0.0).to(tl.float32)
    s1 = tl.load(sin_ptr + column, mask=inside, other=0.0).to(tl.float32)
    s2 = tl.load(sin_ptr + half + column, mask=inside, other=0.0).to(tl.float32)
    _rotate(
        q_ptr, q_out_ptr, batch * q_batch + token * q_token, q_head,
        batch * q_out_batch + token * q_out_token, q_out_head,
        c1, c2, s1, s2, q_heads, half, BACKWARD, Q_HEADS, HALF,
    )  # fmt: skip
    _rotate(
        k_ptr, k_out_ptr, batch * k_batch + token * k_token, k_head,
        batch * k_out_batch + token * k_out_token, k_out_head,
        c1, c2, s1, s2, k_heads, half, BACKWARD, K_HEADS, HALF,
    )  # fmt: skip


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, k_out: Tensor, *, backward: bool = False
) -> None:
    """Rotate pairs of columns half a head apart (Su et al. 2021, in Llama's order of the columns).

    ``out = x cos + rotate_half(x) sin`` with ``rotate_half([a, b]) = [-b, a]``, in float32, each product and
    the sum rounded to the output's dtype; with ``backward`` the transposed map, which takes the outputs'
    gradients to the inputs'.

    Args:
        q: (batch, heads, length, size), size even; last dimension contiguous, as of all that follow.
        k: (batch, k_heads, length, size).
        cos: (batch or 1, length, size).
        sin: (batch or 1, length, size).
        q_out: As ``q``; written.
        k_out: As ``k``; written.
        backward: The transposed map.

    Raises:
        ValueError: tensors that do not fit each other.
    """
    batch, q_heads, length, size = q.shape
    k_heads = k.shape[1]
    fits = k.shape == (batch, k_heads, length, size) and q_out.shape == q.shape and k_out.shape == k.shape
    fits = fits and all(t.shape[0] in (1, batch) and t.shape[1:] == (length, size) for t in (cos, sin))
    if not fits or size % 2 or any(t.stride(-1) != 1 for t in (q, k, cos, sin, q_out, k_out)):
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, cos, sin, q_out, k_out))
        raise ValueError(f"q, k, cos, sin and outputs do not fit each other: {shapes}, rows contiguous")
    if not q.numel():
        return
    per_token = [(0 if t.shape[0] == 1 else t.stride(0), t.stride(1)) for t in (cos, sin)]
    heads = triton.next_power_of_2(q_heads)
    half = triton.next_power_of_2(size // 2)
    with on_device(q.device):
        _rotary_kernel[(batch * length,)](
            q, k, q_out, k_out, cos, sin, length,
            *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3],
            *per_token[0], *per_token[1], q_heads, k_heads, size // 2,
            BACKWARD=backward, Q_HEADS=heads, K_HEADS=triton.next_power_of_2(k_heads), HALF=half,
            num_warps=4 if heads * half <= 2048 else 8, enable_fp_fusion=False,
        )  # fmt: skip
