"""Products of layers that share their input, as one autograd function: the SwiGLU MLP; query, key and value.

The factors are a few columns more of the same products, not passes of their own over the activations:
``x W^T + s (x A^T) B^T = [x, x A^T] [W, s B]^T`` and ``dy W + dh A = [dy, dh] [W; A]``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quant.linear_op import Weight, decoded, times, using_workspace, workspace

_ALIGN = 8  # elements: 16 bytes, which tensor cores and TMA want of every row of a half-precision matrix
# The activation and its gradient exist for so many tokens at once, which fill an H100's multiprocessors: of
# 14336 columns in 16 bits 112 MiB.
_MOST_TOKENS = 4096
T = TypeVar("T")


class Part(NamedTuple):
    """One layer of a group: its weight (out, in), its factors and their scaling."""

    weight: Weight
    A: Tensor
    B: Tensor
    scaling: float


def _holding_workspace(function: Callable[..., T]) -> Callable[..., T]:
    """``function``, while no other thread decodes into the buffers that it uses."""

    @functools.wraps(function)
    def run(*args: Any) -> T:
        with using_workspace:
            return function(*args)

    return run


# ---- the MLP


def swiglu_mlp(x: Tensor, gate: Part, up: Part, down: Part) -> Tensor:
    """``down(silu(gate(x)) * up(x))`` of three quantised layers with their adapters; no biases, no dropout.

    Args:
        x: (..., hidden), the compute dtype.
        gate: (width, hidden).
        up: (width, hidden).
        down: (hidden, width).

    Returns:
        (..., hidden). For backward, x, gate's and up's outputs and their rank-wide products are kept; the
        activation is computed again. ``down``'s product keeps nothing: a checkpointed layer that is computed
        again need not come to it.
    """
    kept: list[Tensor] = []
    stand_in: Tensor = _GateUp.apply(x, kept, *_flatten(gate, up, down))
    y: Tensor = _Down.apply(stand_in, kept, down)
    return y


class _GateUp(torch.autograd.Function):
    """All of the MLP but the product with ``down`` forward, and all of its backward.

    Returns a tensor of the output's shape and no content, which the output's gradient comes back to.
    """

    @staticmethod
    @_holding_workspace
    def forward(ctx: Any, x: Tensor, kept: list[Tensor], *flat: Any) -> Tensor:
        gate, up, down = _unflatten(flat)
        width, hidden = gate.weight.shape
        rows = x.reshape(-1, hidden)
        tokens, ranks = rows.shape[0], len(gate.A) + len(up.A)
        inner = _aligned(ranks)
        xh = rows.new_empty(tokens, hidden + inner)  # [x, x A_gate^T, x A_up^T, 0]
        xh[:, :hidden] = rows
        stacked = _padded(torch.cat([gate.A, up.A]).to(x.dtype), inner)  # (inner, hidden)
        torch.mm(rows, stacked.t(), out=xh[:, hidden:])
        gate_up = rows.new_empty(tokens, 2 * width + inner)  # the last columns serve backward
        first = 0
        for part, out in ((gate, gate_up[:, :width]), (up, gate_up[:, width : 2 * width])):
            mine = slice(hidden + first, hidden + first + len(part.A))
            W = workspace(width * (hidden + inner), x.dtype, x.device).view(width, hidden + inner)
            part.weight.decode(W[:, :hidden])
            W[:, hidden:] = 0
            torch.mul(part.B, part.scaling, out=W[:, mine])
            torch.mm(xh, W.t(), out=out)
            del W  # while a graph is captured the next one is another
            first += len(part.A)
        h = xh[:, hidden : hidden + ranks].contiguous()
        ctx.parts = [
            (len(p.weight.tensors), p.weight.spec, p.weight.shape, p.scaling) for p in (gate, up, down)
        ]
        ctx.save_for_backward(x, gate_up, h, *_tensors(gate, up, down))
        ctx.used = False
        kept.append(gate_up)
        return x.new_empty(1).expand(x.shape)

    @staticmethod
    @_holding_workspace
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if ctx.used:
            raise RuntimeError(
                "the fused MLP overwrites what it saved: a second backward through it needs "
                "qlora_engine.fused.set_fused(False) before the forward"
            )
        ctx.used = True
        x, gate_up, h, *saved = ctx.saved_tensors
        gate, up, down = _with_settings(saved, ctx.parts)
        width, hidden = gate.weight.shape
        r_gate, ranks = len(gate.A), len(gate.A) + len(up.A)
        rows = x.reshape(-1, hidden)
        dA_down, dB_down = _through_down(grads[0].reshape(-1, hidden).to(x.dtype), gate_up, down)

        inner = gate_up.shape[1] - 2 * width
        d_gate, d_up, dh = gate_up[:, :width], gate_up[:, width : 2 * width], gate_up[:, 2 * width :]
        if inner > ranks:
            dh[:, ranks:] = 0
        for part, d_out, columns in ((gate, d_gate, dh[:, :r_gate]), (up, d_up, dh[:, r_gate:ranks])):
            columns.addmm_(d_out, part.B.to(x.dtype), beta=0, alpha=part.scaling)
        # beta=0: the first argument only lends its shape
        dB_gate = torch.addmm(gate.B.to(x.dtype), d_gate.t(), h[:, :r_gate], beta=0, alpha=gate.scaling)
        dB_up = torch.addmm(up.B.to(x.dtype), d_up.t(), h[:, r_gate:], beta=0, alpha=up.scaling)
        dA = dh[:, :ranks].t() @ rows
        dx = times(d_gate, gate.weight)
        stacked = _padded(torch.cat([gate.A, up.A]).to(x.dtype), inner)
        W = workspace((width + inner) * hidden, x.dtype, x.device).view(width + inner, hidden)
        up.weight.decode(W[:width])
        W[width:] = stacked
        dx.addmm_(gate_up[:, width:], W)  # [d_up, dh] [W_up; A_gate; A_up]
        return (
            dx.reshape(x.shape),
            None,
            None,
            *_gradients(gate, dA[:r_gate], dB_gate),
            *_gradients(up, dA[r_gate:], dB_up),
            *_gradients(down, dA_down, dB_down),
        )


class _Down(torch.autograd.Function):
    """The product with ``down``; its gradient is ``_GateUp``'s to compute."""

    @staticmethod
    @_holding_workspace
    def forward(ctx: Any, stand_in: Tensor, kept: list[Tensor], down: Part) -> Tensor:
        from quant.backends import triton_blocks

        gate_up = kept.pop()
        hidden, width = down.weight.shape
        y = gate_up.new_empty(gate_up.shape[0], hidden)
        A, B = down.A.to(y.dtype).t(), down.B.to(y.dtype).t()
        W = decoded(down.weight, y).t()
        acts = y.new_empty(min(len(y), _MOST_TOKENS), width)
        for inputs, out in zip(gate_up.split(_MOST_TOKENS), y.split(_MOST_TOKENS), strict=True):
            act = triton_blocks.swiglu(inputs, acts[: len(inputs)])
            torch.mm(act, W, out=out)
            out.addmm_(act @ A, B, alpha=down.scaling)
        return y.reshape(stand_in.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return grads[0], None, None


def _through_down(dy: Tensor, gate_up: Tensor, down: Part) -> tuple[Tensor, Tensor]:
    """Backward through ``down`` and the activation: ``gate_up`` becomes its own gradient.

    Args:
        dy: (tokens, hidden), of the output.
        gate_up: (tokens, 2 * width and more).
        down: With W (hidden, width), A (r, width) and B (hidden, r).

    Returns:
        The gradients of A and B.
    """
    from quant.backends import triton_blocks

    hidden, width = down.weight.shape
    tokens, r = dy.shape[0], len(down.A)
    B = down.B.to(dy.dtype)
    W = workspace((hidden + r) * width, dy.dtype, dy.device).view(hidden + r, width)
    down.weight.decode(W[:hidden])
    A = W[hidden:].copy_(down.A)
    h = dy.new_empty(tokens, r)
    most = min(tokens, _MOST_TOKENS)
    both, d_acts = dy.new_empty(most, hidden + _aligned(r)), dy.new_empty(most, width)
    dA = None
    for first in range(0, max(tokens, 1), _MOST_TOKENS):  # of no tokens the gradients are zeros
        part = slice(first, first + _MOST_TOKENS)
        some = dy[part]
        dy_dh, d_act = both[: len(some), : hidden + r], d_acts[: len(some)]
        dy_dh[:, :hidden] = some
        dh = dy_dh[:, hidden:].addmm_(some, B, beta=0, alpha=down.scaling)
        torch.mm(dy_dh, W, out=d_act)  # [dy, dh] [W; A]
        triton_blocks.swiglu_backward(gate_up[part], d_act)  # d_act holds the activation now
        torch.mm(d_act, A.t(), out=h[part])
        more = dh.t() @ d_act
        dA = more if dA is None else more.float().add_(dA)
    assert dA is not None
    # beta=0: the first argument only lends its shape
    return dA, torch.addmm(B, dy.t(), h, beta=0, alpha=down.scaling)


# ---- query, key and value


def shared_input(x: Tensor, *parts: Part) -> tuple[Tensor, ...]:
    """The outputs of quantised layers with adapters on one input; no biases, no dropout.

    Args:
        x: (..., in), the compute dtype.
        parts: Each (out_i, in).

    Returns:
        (..., out_i) each; backward adds the input's gradients up in one buffer.
    """
    outputs: tuple[Tensor, ...] = _SharedProducts.apply(x, *_flatten(*parts))
    return outputs


class _SharedProducts(torch.autograd.Function):
    @staticmethod
    @_holding_workspace
    def forward(ctx: Any, x: Tensor, *flat: Any) -> tuple[Tensor, ...]:
        parts = _unflatten(flat)
        columns = parts[0].weight.shape[1]
        rows = x.reshape(-1, columns)
        h = rows @ torch.cat([part.A for part in parts]).to(x.dtype).t()  # (tokens, all ranks)
        outputs, first = [], 0
        for part in parts:
            out = part.weight.shape[0]
            W = part.weight.decode(workspace(out * columns, x.dtype, x.device).view(out, columns))
            y = rows @ W.t()
            del W
            mine = h[:, first : first + len(part.A)]
            y.addmm_(mine, part.B.to(x.dtype).t(), alpha=part.scaling)
            first += len(part.A)
            outputs.append(y.reshape(*x.shape[:-1], out))
        ctx.parts = [(len(p.weight.tensors), p.weight.spec, p.weight.shape, p.scaling) for p in parts]
        ctx.save_for_backward(x, h, *_tensors(*parts))
        return tuple(outputs)

    @staticmethod
    @_holding_workspace
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, h, *saved = ctx.saved_tensors
        parts = _with_settings(saved, ctx.parts)
        columns = parts[0].weight.shape[1]
        rows = x.reshape(-1, columns)
        dh = torch.empty_like(h)
        dx = None
        first, dBs = 0, []
        for part, grad in zip(parts, grads, strict=True):
            out, r = part.weight.shape[0], len(part.A)
            dy = grad.reshape(-1, out).to(x.dtype)
            B = part.B.to(x.dtype)
            dh[:, first : first + r].addmm_(dy, B, beta=0, alpha=part.scaling)
            dBs.append(torch.addmm(B, dy.t(), h[:, first : first + r], beta=0, alpha=part.scaling))
            W = part.weight.decode(workspace(out * columns, x.dtype, x.device).view(out, columns))
            dx = dy @ W if dx is None else dx.addmm_(dy, W)
            del W
            first += r
        assert dx is not None
        dA = dh.t() @ rows
        dx.addmm_(dh, torch.cat([part.A for part in parts]).to(x.dtype))
        result: list[Any] = [dx.reshape(x.shape), None]
        first = 0
        for part, dB in zip(parts, dBs, strict=True):
            result += _gradients(part, dA[first : first + len(part.A)], dB)
            first += len(part.A)
        return tuple(result)


# ---- parts as flat arguments of an autograd function


def _flatten(*parts: Part) -> list[Any]:
    flat: list[Any] = [len(parts)]
    for part in parts:
        flat += [part.A, part.B, part.scaling, part.weight.spec, part.weight.shape, *part.weight.tensors]
    return flat


_PER_PART = 5 + 6  # what _flatten writes a part


def _unflatten(flat: tuple[Any, ...]) -> list[Part]:
    parts = []
    for i in range(flat[0]):
        A, B, scaling, spec, shape, *tensors = flat[1 + _PER_PART * i : 1 + _PER_PART * (i + 1)]
        parts.append(Part(Weight(tuple(tensors), spec, shape), A, B, scaling))
    return parts


def _tensors(*parts: Part) -> list[Tensor | None]:
    return [tensor for part in parts for tensor in (part.A, part.B, *part.weight.tensors)]


def _with_settings(saved: list[Any], settings: list[tuple[int, Any, Any, float]]) -> list[Part]:
    parts, at = [], 0
    for count, spec, shape, scaling in settings:
        A, B, *tensors = saved[at : at + 2 + count]
        parts.append(Part(Weight(tuple(tensors), spec, shape), A, B, scaling))
        at += 2 + count
    return parts


def _gradients(part: Part, dA: Tensor, dB: Tensor) -> list[Any]:
    return [dA.to(part.A.dtype), dB.to(part.B.dtype), *[None] * (_PER_PART - 2)]


def _aligned(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN


def _padded(matrix: Tensor, rows: int) -> Tensor:
    """``matrix`` with rows of zeros below, up to ``rows``."""
    missing = rows - matrix.shape[0]
    return matrix if missing == 0 else torch.cat([matrix, matrix.new_zeros(missing, matrix.shape[1])])
