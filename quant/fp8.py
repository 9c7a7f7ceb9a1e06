"""Products of a frozen quantised weight in float8: opt-in, for Hopper and Ada.

    forward   y = (x8 W8^T) * s_x s_W         x8, s_x: rows of x over their largest value
    dX        dx = (d8 W8) * s_d              d8, s_d: rows of dy * s_W

W8 is the decoded weight, each row divided by s_W, and it is one and the same in both: the gradient is that of
the function computed. s_W follows from the block scales alone, without a pass over the values. All of x8, d8
and W8 are float8_e4m3fn (4 significant bits, up to 448), so a product carries a relative error of about 3.5 %
of its norm where bfloat16 carries 0.2 %: measure what it does to your loss.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from quant import backends
from quant.tensor import QuantizedTensor

COMPUTES = ("same", "fp8")
LARGEST = 448.0  # of float8_e4m3fn
MULTIPLE = 16  # of both dimensions of a weight: what torch._scaled_mm asks for
_TINY = 1e-30  # least scale: an all-zero row divides by it
# The tensor cores sum float8 products at reduced precision, as is usual with a scale a row; how much slower
# the exact way is has not been measured yet.
_FAST_SUMS = True


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why float8 products can't run on ``device``, or None. On a CPU they run, for tests: slowly."""
    if device.type == "cpu":
        return None if _on_cpu() else f"torch {torch.__version__} multiplies float8 on CUDA alone"
    if device.type != "cuda":
        return f"float8 products run on CUDA (and for tests on the CPU), not on '{device.type}'"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9) or torch.version.hip is not None:
        name = torch.cuda.get_device_name(device)
        return (
            f"{name} has no float8 tensor cores: compute capability {capability[0]}.{capability[1]}, "
            "needed 8.9 (Ada, Hopper or newer)"
        )
    return None


def _on_cpu() -> bool:
    """Whether torch multiplies float8 with a scale a row on this CPU: 2.6 does not, 2.11 not on every one."""
    x, ones = torch.zeros(MULTIPLE, MULTIPLE).to(torch.float8_e4m3fn), torch.ones(MULTIPLE, 1)
    try:
        torch._scaled_mm(x, x.t(), scale_a=ones, scale_b=ones.t(), out_dtype=torch.float32)
    except RuntimeError:  # NotImplementedError among them
        return False
    return True


def check(device: torch.device, shape: torch.Size | tuple[int, ...], title: str = "the weight") -> None:
    """Raise unless the products of such a weight can run in float8.

    Raises:
        RuntimeError: the device can't. ValueError: a dimension is no multiple of 16.
    """
    if (reason := unavailable(device)) is not None:
        raise RuntimeError(f"compute='fp8' cannot run: {reason}")
    if any(size % MULTIPLE for size in shape):
        raise ValueError(f"compute='fp8': {title} is {tuple(shape)}; both must be multiples of {MULTIPLE}")


def quantize_rows(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows of ``x`` (times ``factor``) as float8 and their scales.

    Args:
        x: (rows, columns), float.
        factor: float32 (columns,) or None.

    Returns:
        float8_e4m3fn (rows, columns) and float32 (rows,), so that x * factor ~= the one times the other. A
        NaN makes its row NaN.
    """
    if x.device.type == "cuda":
        from quant.backends import triton_fp8

        return triton_fp8.quantize_rows(x, factor, LARGEST, _TINY)
    value = x.float() if factor is None else x.float() * factor
    scales = (value.abs().amax(1) / LARGEST).clamp_min(_TINY)
    return (value / scales[:, None]).to(torch.float8_e4m3fn), scales


def row_scales(q: QuantizedTensor) -> Tensor:
    """Scale of each row of W8, float32 (rows,): a bound of its values over 448, from block scales alone."""
    rows, columns = q.shape
    levels, size = q.spec.fmt.levels, q.spec.block_size
    scales = q.dense_scales().abs()
    if q.zeros is None:
        bound = scales * max(abs(min(levels)), abs(max(levels)))
    else:
        zero = q.zeros.float() / (1 << (8 - q.spec.bits))
        bound = scales * torch.maximum((min(levels) - zero).abs(), (max(levels) - zero).abs())
    row = torch.arange(rows, device=scales.device)
    first, last = row * columns // size, ((row + 1) * columns - 1) // size
    # every block that a row touches
    count = -(-columns // size) + 1
    block = torch.minimum(first[:, None] + torch.arange(count, device=scales.device), last[:, None])
    return (bound[block].amax(1) / LARGEST).clamp_min(_TINY)


def _fields(q: QuantizedTensor) -> Any:
    return (q.codes, q.scales, q.zeros, q.nested_scales, q.nested_offset, q.nested_map)


def weight(q: QuantizedTensor, out: Tensor, *, transposed: bool) -> Tensor:
    """Write W8, (rows, columns) or its transpose, into ``out`` (float8_e4m3fn); returns its row scales."""
    rows, columns = q.shape
    if out.device.type == "cuda":
        from quant.backends import triton_fp8

        fields, fmt, size = _fields(q), q.spec.fmt, q.spec.block_size
        scales = triton_fp8.row_scales(fields, (rows, columns), fmt, size, LARGEST, _TINY)
        triton_fp8.decode(fields, (rows, columns), fmt, size, scales, out, transposed=transposed)
        return scales
    scales = row_scales(q)
    value = (q.dequantize(torch.float32, backend=backends.AUTO) / scales[:, None]).to(torch.float8_e4m3fn)
    out.copy_(value.t() if transposed else value)
    return scales


def _out_dtype(x: Tensor) -> torch.dtype:
    """CUDA's row-wise kernels write bfloat16 alone."""
    return torch.bfloat16 if x.device.type == "cuda" else x.dtype


def multiply(x: Tensor, q: QuantizedTensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """``x W^T + bias`` in float8, in x's dtype (on CUDA rounded to bfloat16 on the way).

    Args:
        x: (tokens, in).
        q: W, (out, in), multiples of 16.
        bias: (out,) or None.
        buffer: float8_e4m3fn (out, in), contiguous; overwritten.

    Raises:
        RuntimeError, ValueError: as ``check``.
    """
    check(x.device, q.shape)
    scales = weight(q, buffer, transposed=False)
    x8, x_scales = quantize_rows(x)
    y: Tensor = torch._scaled_mm(
        x8,
        buffer.t(),
        scale_a=x_scales[:, None],
        scale_b=scales[None, :],
        out_dtype=_out_dtype(x),
        use_fast_accum=_FAST_SUMS,
    )
    y = y.to(x.dtype)
    return y if bias is None else y.add_(bias)


def multiply_transposed(grad: Tensor, q: QuantizedTensor, buffer: Tensor) -> Tensor:
    """``grad W`` in float8, in grad's dtype: the gradient of ``multiply``'s input.

    Args:
        grad: (tokens, out).
        q: W, (out, in), multiples of 16.
        buffer: float8_e4m3fn (in, out), contiguous; overwritten.

    Raises:
        RuntimeError, ValueError: as ``check``.
    """
    check(grad.device, q.shape)
    scales = weight(q, buffer, transposed=True)  # (in, out): the sum runs over the last dimension of both
    d8, d_scales = quantize_rows(grad, scales)
    ones = scales.new_ones(1, q.shape[1])
    dx: Tensor = torch._scaled_mm(
        d8,
        buffer.t(),
        scale_a=d_scales[:, None],
        scale_b=ones,
        out_dtype=_out_dtype(grad),
        use_fast_accum=_FAST_SUMS,
    )
    return dx.to(grad.dtype)
