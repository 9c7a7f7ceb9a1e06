"""Triton kernels around the products of a fine-tuned block: SwiGLU, and dropout drawn again from its seed."""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quant.backends.triton_common import on_device

_BLOCK = 1024


@triton.jit
def _swiglu_kernel(gate_up_ptr, out_ptr, width, stride, out_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gate_up_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gate_up_ptr + row * stride + width + column, mask=inside, other=0.0).to(tl.float32)
    value = g * tl.sigmoid(g) * u
    tl.store(out_ptr + row * out_stride + column, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_kernel(gate_up_ptr, grad_ptr, width, stride, grad_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate_at = gate_up_ptr + row * stride + column
    grad_at = grad_ptr + row * grad_stride + column
    g = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gate_at + width, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    silu = g * s
    kind = gate_up_ptr.dtype.element_ty
    tl.store(gate_at, (d * u * (s + silu * (1.0 - s))).to(kind), mask=inside)
    tl.store(gate_at + width, (d * silu).to(kind), mask=inside)
    tl.store(grad_at, (silu * u).to(kind), mask=inside)


def swiglu(gate_up: Tensor, out: Tensor) -> Tensor:
    """``silu(gate) * up`` in float32, rounded once.

    Args:
        gate_up: (tokens, at least 2 * width), gate in the first ``width`` columns, up in the next.
        out: (tokens, width); written and returned. Rows of both may be strided.
    """
    tokens, width = out.shape
    _check(gate_up, out)
    with on_device(out.device):
        _swiglu_kernel[(tokens, triton.cdiv(width, _BLOCK))](
            gate_up, out, width, gate_up.stride(0), out.stride(0), BLOCK=_BLOCK
        )
    return out


def swiglu_backward(gate_up: Tensor, grad: Tensor) -> None:
    """In place: ``gate_up`` becomes its own gradient, and ``grad``, the output's, becomes the output again.

    Args:
        gate_up: As for ``swiglu``; overwritten.
        grad: (tokens, width); overwritten.
    """
    tokens, width = grad.shape
    _check(gate_up, grad)
    with on_device(grad.device):
        _swiglu_backward_kernel[(tokens, triton.cdiv(width, _BLOCK))](
            gate_up, grad, width, gate_up.stride(0), grad.stride(0), BLOCK=_BLOCK
        )


def _check(gate_up: Tensor, other: Tensor) -> None:
    tokens, width = other.shape
    fits = gate_up.shape[0] == tokens and gate_up.shape[1] >= 2 * width
    if not fits or gate_up.stride(1) != 1 or other.stride(1) != 1:
        raise ValueError(
            f"gate_up {tuple(gate_up.shape)}, strides {gate_up.stride()}, does not fit {tuple(other.shape)}, "
            f"strides {other.stride()}: rows of twice the width, each contiguous"
        )


# not specialised: a seed that is 1 or a multiple of 16 would compile another kernel, in the middle of a run
@triton.jit(do_not_specialize=["seed"])
def _dropout_kernel(x_ptr, out_ptr, seed, p, numel, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(tl.rand(seed, at) >= p, x / (1.0 - p), 0.0)
    if ACCUMULATE:
        value += tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)


def dropout(x: Tensor, p: float, seed: int, out: Tensor, *, accumulate: bool = False) -> Tensor:
    """``x / (1 - p)`` where a number drawn from ``seed`` and the position is at least p, else 0.

    Args:
        x: Contiguous.
        p: In [0, 1).
        seed: The same seed gives the same mask, so that none need be stored.
        out: Contiguous, as ``x``; written, or added to, and returned.
        accumulate: Add to ``out``.

    Raises:
        ValueError: a tensor that is not contiguous, or of another size.
    """
    if not (x.is_contiguous() and out.is_contiguous() and x.numel() == out.numel()):
        raise ValueError(f"x {tuple(x.shape)} and out {tuple(out.shape)} must be contiguous and of one size")
    with on_device(x.device):
        _dropout_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
            x, out, seed, p, x.numel(), ACCUMULATE=accumulate, BLOCK=_BLOCK
        )
    return out
