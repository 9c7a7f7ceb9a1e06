"""The product with a quantised weight as a custom op: dequantise in forward, again in backward.

On a CPU the weight is dequantised in blocks of rows into a workspace that stays in the cache and is
reused; the whole dense weight never exists. Where the CPU has no native bfloat16, half-precision inputs
are multiplied in float32 tiles, because its half-precision products are up to 180 times slower (measured
with bitsandbytes' layer at 512 tokens).

On a GPU the whole weight is decoded into a buffer that all layers of a stream share, and multiplied by
cuBLAS. One token goes to bitsandbytes' GEMV where it can (``small.py``); float8 products (``fp8.py``) are
there for layers that ask for them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant import backends, fp8, small
from quant.spec import QuantSpec
from quant.tensor import QuantizedTensor

# Order of a layer's tensors in the ops' signatures.
TENSOR_NAMES = ("codes", "scales", "zeros", "nested_scales", "nested_offset", "nested_map")
# Which of them are float32, kept as bytes, by whether the scales are nested.
_PLAIN_FLOATS = (False, True, False, False, False, False)
_NESTED_FLOATS = (False, False, False, True, True, True)
# Elements of a tile of the dense weight: 1 MiB of float32, which stays in a core's second-level cache.
_TILE_ELEMENTS = 1 << 18
# Up to here narrowing the decoded float32 costs more than a half-precision product saves: 4096 x 4096 on one
# AVX512 core with bfloat16, ms with half and float32 tiles: 21.7, 15.3 at 1 token, 22.4, 21.5 at 8.
_FEW_TOKENS = 8
_local = threading.local()
_gpu_buffers: dict[tuple[Any, ...], Tensor] = {}
# Held from decoding into a shared buffer until the product that reads it is enqueued: threads that launch on
# one stream would else decode over each other's weight.
using_workspace = threading.RLock()


@cache
def _cpu_has_half(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _tile_dtype(dtype: torch.dtype, tokens: int) -> torch.dtype:
    """The dtype to multiply in on a CPU for ``tokens`` rows of ``dtype``."""
    half = dtype in (torch.bfloat16, torch.float16)
    if half and (tokens <= _FEW_TOKENS or not _cpu_has_half(dtype)):
        return torch.float32
    return dtype


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is captured on the device's stream; it need not be the current device."""
    if device.type != "cuda":
        return False
    if device.index in (None, torch.cuda.current_device()):
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def workspace(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer that the next caller on this thread (GPU: stream) gets again; its content is anything.

    While a CUDA graph is captured it is a fresh tensor: the graph keeps its address, and a larger buffer may
    take its place.
    """
    key: tuple[Any, ...] = (dtype, device)
    if device.type == "cuda":
        if is_capturing(device):
            return torch.empty(numel, dtype=dtype, device=device)
        index = torch.cuda.current_device() if device.index is None else device.index
        key = (dtype, index, torch._C._cuda_getCurrentRawStream(index))
        buffers = _gpu_buffers
    else:
        buffers = _local.__dict__.setdefault("buffers", {})
    buffer = buffers.get(key)
    if buffer is None or buffer.numel() < numel:
        buffer = buffers[key] = torch.empty(numel, dtype=dtype, device=device)
    return buffer[:numel]


def forget_workspaces(device: torch.device) -> None:
    """Give the device's buffers back; the next product makes one of the size that it needs."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with using_workspace:
        for key in [key for key in _gpu_buffers if key[1] == index]:
            del _gpu_buffers[key]


def _tiles(rows: int, columns: int) -> list[tuple[int, int]]:
    step = max(1, _TILE_ELEMENTS // max(columns, 1))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def as_quantized(
    tensors: Sequence[Tensor | None], spec: QuantSpec, shape: torch.Size, dtype: torch.dtype
) -> QuantizedTensor:
    """The uint8 tensors of a layer, in the order of TENSOR_NAMES, as a QuantizedTensor on their storage."""
    floats = ("nested_scales", "nested_offset", "nested_map") if spec.double_quant else ("scales",)
    fields: dict[str, Tensor] = {}
    for name, tensor in zip(TENSOR_NAMES, tensors, strict=True):
        if tensor is not None:
            flat = tensor.detach().reshape(-1)
            fields[name] = flat.view(torch.float32) if name in floats else flat
    return QuantizedTensor.from_state_dict(fields, shape, dtype, spec)


class Weight(NamedTuple):
    """A layer's weight in the pieces that an autograd function can save: its tensors, and the rest beside.

    ``compute`` is "same" (in the input's dtype) or "fp8".
    """

    tensors: tuple[Tensor | None, ...]
    spec: QuantSpec
    shape: torch.Size
    compute: str = "same"

    def quantized(self, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
        """As a QuantizedTensor on the same storage."""
        return as_quantized(self.tensors, self.spec, self.shape, dtype)

    def fields(self) -> tuple[Tensor | None, ...]:
        """The flat tensors in the order of TENSOR_NAMES, scales as float32.

        What ``quantized`` would give, without its checks, which take the host three times as long as the rest
        of launching a decoder does.
        """
        floats = _NESTED_FLOATS if self.spec.double_quant else _PLAIN_FLOATS
        flat = (t if t is None or t.ndim == 1 else t.reshape(-1) for t in self.tensors)
        return tuple(
            tensor.view(torch.float32) if tensor is not None and is_float else tensor
            for tensor, is_float in zip(flat, floats)
        )

    def decode(self, out: Tensor, first: int = 0) -> Tensor:
        """Dequantise rows from ``first`` on into ``out``, (so many rows, columns).

        Its rows may be strided (on CUDA: multiples of 16 long).
        """
        if not out.is_contiguous() and out.device.type != "cuda":
            return out.copy_(self.decode(torch.empty_like(out, memory_format=torch.contiguous_format), first))
        codes, scales, zeros, nested_scales, offset, mapping = self.fields()
        assert codes is not None
        assert scales is not None
        rest = (zeros, nested_scales, offset, mapping)
        start, spec = first * self.shape[1], self.spec
        backends.decode(out, codes, scales, *rest, spec.format, spec.block_size, start, backends.AUTO)
        return out


def _whole(device: torch.device) -> bool:
    """Whether weights are decoded as wholes, not in tiles for a CPU's cache."""
    return device.type != "cpu"


def decoded(weight: Weight, like: Tensor) -> Tensor:
    """The decoded weight in the shared buffer, in the dtype of ``like``."""
    return weight.decode(workspace(weight.shape.numel(), like.dtype, like.device).view(weight.shape))


def _float8(weight: Weight, transposed: bool, device: torch.device) -> Tensor:
    """The shared buffer for a float8 weight."""
    rows, columns = weight.shape
    shape = (columns, rows) if transposed else (rows, columns)
    return workspace(rows * columns, torch.float8_e4m3fn, device).view(shape)


def _for_tiles(weight: Weight) -> QuantizedTensor:
    """The weight with dense scales, so that nested ones are decoded once and not once a tile."""
    q = weight.quantized()
    if not weight.spec.double_quant:
        return q
    plain = replace(weight.spec, double_quant=False)
    return QuantizedTensor(q.codes, q.dense_scales(), q.zeros, None, None, None, q.shape, q.dtype, plain)


def multiply(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x (tokens, in) @ W^T + bias -> (tokens, out), a fresh tensor in x's dtype."""
    rows, columns = weight.shape
    if weight.compute == "fp8":
        with using_workspace:
            return fp8.multiply(x, weight.quantized(), bias, _float8(weight, False, x.device))
    if small.worth_it(x):
        found = small.multiply(x, weight.quantized(), bias)
        if found is not None:
            return found
    if _whole(x.device):
        bias = None if bias is None else bias.to(x.dtype)
        with using_workspace:
            return torch.nn.functional.linear(x, decoded(weight, x), bias)
    q, dtype = _for_tiles(weight), _tile_dtype(x.dtype, x.shape[0])
    x_tile = x.to(dtype)
    y = torch.empty(x.shape[0], rows, dtype=dtype)
    for start, stop in _tiles(rows, columns):
        tile = workspace((stop - start) * columns, dtype, x.device).view(stop - start, columns)
        q.dequantize_rows(start, stop, dtype, out=tile)
        torch.mm(x_tile, tile.t(), out=y[:, start:stop])
    if bias is not None:
        y += bias
    return y.to(x.dtype)


def times(grad: Tensor, weight: Weight) -> Tensor:
    """grad (tokens, out) @ W by way of the shared buffer, on a GPU: (tokens, in), a fresh tensor."""
    with using_workspace:
        return grad @ decoded(weight, grad)


def multiply_transposed(grad: Tensor, weight: Weight) -> Tensor:
    """grad (tokens, out) @ W -> (tokens, in), a fresh tensor in grad's dtype."""
    rows, columns = weight.shape
    if weight.compute == "fp8":
        with using_workspace:
            return fp8.multiply_transposed(grad, weight.quantized(), _float8(weight, True, grad.device))
    if _whole(grad.device):
        return times(grad, weight)
    q, dtype = _for_tiles(weight), _tile_dtype(grad.dtype, grad.shape[0])
    grad_tile = grad.to(dtype)
    total = torch.zeros(grad.shape[0], columns, dtype=dtype)
    for start, stop in _tiles(rows, columns):
        tile = workspace((stop - start) * columns, dtype, grad.device).view(stop - start, columns)
        q.dequantize_rows(start, stop, dtype, out=tile)
        torch.addmm(total, grad_tile[:, start:stop], tile, out=total)
    return total.to(grad.dtype)


@torch.library.custom_op("quant::linear", mutates_args=())
def quant_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    nested_scales: Tensor | None,
    nested_offset: Tensor | None,
    nested_map: Tensor | None,
    bias: Tensor | None,
    format: str,
    block_size: int,
    double_quant: bool,
    rows: int,
    columns: int,
    compute: str,
) -> Tensor:
    """x (..., columns) times the transposed quantised weight (rows, columns), plus bias: (..., rows)."""
    tensors = (codes, scales, zeros, nested_scales, nested_offset, nested_map)
    spec = QuantSpec(format, block_size, double_quant)
    weight = Weight(tensors, spec, torch.Size((rows, columns)), compute)
    with torch.autocast(x.device.type, enabled=False):
        y = multiply(x.reshape(-1, columns), weight, bias)
    return y.reshape(*x.shape[:-1], rows)


@quant_linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], rest[-3])


@torch.library.custom_op("quant::linear_backward", mutates_args=())
def quant_linear_backward(
    grad: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    nested_scales: Tensor | None,
    nested_offset: Tensor | None,
    nested_map: Tensor | None,
    format: str,
    block_size: int,
    double_quant: bool,
    rows: int,
    columns: int,
    compute: str,
) -> Tensor:
    """grad (..., rows) times the quantised weight (rows, columns): the input's gradient, (..., columns)."""
    tensors = (codes, scales, zeros, nested_scales, nested_offset, nested_map)
    spec = QuantSpec(format, block_size, double_quant)
    weight = Weight(tensors, spec, torch.Size((rows, columns)), compute)
    with torch.autocast(grad.device.type, enabled=False):
        out = multiply_transposed(grad.reshape(-1, rows), weight)
    return out.reshape(*grad.shape[:-1], columns)


@quant_linear_backward.register_fake
def _(grad: Tensor, codes: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], rest[-2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, bias, settings = inputs[1:7], inputs[7], inputs[8:]
    # Through save_for_backward, so that offloaded or streamed weights are the right ones when backward runs.
    ctx.save_for_backward(*tensors)
    ctx.settings = settings
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = quant_linear_backward(grad, *ctx.saved_tensors, *ctx.settings)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[7]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return (grad_x, *[None] * 6, grad_bias, *[None] * 6)


quant_linear.register_autograd(_backward, setup_context=_setup_context)
