"""A quantised layer and its LoRA adapter as one autograd function: about ten kernels forward and backward.

    forward   W = dequantise;  y = x W^T + b;   h = x A^T;   y += s h B^T
    backward  dh = s dy B;  dB = s dy^T h;  dA = dh^T x;  W = dequantise;  dx = dy W;  dx += dh A

x and h are kept for backward, the dense weight and the dropped-out input never are: the weight is decoded
again, the dropout mask drawn again from its seed. Autocast is off inside: the compute dtype is the input's.

Used where it applies (one LoRA adapter on a quantised layer, not compiling); results equal the unfused path's
up to rounding. Under torch.compile the unfused path is traced, and the compiler fuses it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quant.linear import QuantLinear
from quant.linear_op import TENSOR_NAMES, Weight, is_capturing, multiply, multiply_transposed
from quant.spec import QuantSpec

_MAX_SEED = 2**31 - 1


def weight_of(layer: QuantLinear) -> Weight:
    """The weight of a layer, on its storage."""
    tensors = tuple(getattr(layer, name) for name in TENSOR_NAMES)
    return Weight(tensors, layer.spec, layer.shape, layer.compute)


_switch = {"on": True}


def set_fused(on: bool) -> bool:
    """Switch the fused functions on or off for this process; returns what was set before."""
    before, _switch["on"] = _switch["on"], on
    return before


def on_gpu(x: Tensor) -> bool:
    """Whether the fused functions are worth it for ``x``."""
    return x.device.type == "cuda"


def has_triton() -> bool:
    """Whether Triton's kernels can be had: PyTorch for CUDA brings it along, but not on Windows."""
    return importlib.util.find_spec("triton") is not None


def wanted(x: Tensor) -> bool:
    """Whether fused functions are switched on, and worth it for ``x``, and nothing is being compiled."""
    return _switch["on"] and on_gpu(x) and not torch.compiler.is_compiling()


def applies(layer: Any, adapters: Sequence[str], x: Tensor) -> bool:
    """Whether ``lora_linear`` computes what a LoRA layer's forward does, and is worth it.

    On a CPU the unfused path is kept, whose products in the adapter's own dtype equal PEFT's to the last bit.
    """
    if not wanted(x) or len(adapters) != 1:
        return False
    adapter, base = adapters[0], layer.get_base_layer()
    return (
        type(base) is QuantLinear
        and layer.base_layer is base
        and adapter in layer.lora_A
        and not layer.use_dora.get(adapter, False)
        and not layer.lora_bias.get(adapter, False)
        and x.is_floating_point()
        and not any(has_hooks(module) for module in (base, layer.lora_A[adapter], layer.lora_B[adapter]))
    )


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether somebody watches the calls of ``module``."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def lora_linear(
    x: Tensor, layer: QuantLinear, A: Tensor, B: Tensor, scaling: float, dropout: float = 0.0
) -> Tensor:
    """``x W^T + b + scaling * dropout(x) A^T B^T`` in the input's dtype (under autocast, autocast's).

    Args:
        x: (..., in_features).
        layer: The quantised base.
        A: (r, in_features), any float dtype.
        B: (out_features, r), any float dtype.
        scaling: Of the product.
        dropout: Probability of dropping an element of the adapter's input.

    Returns:
        (..., out_features).

    Raises:
        RuntimeError: dropout while a CUDA graph is captured.
    """
    kind = x.device.type
    out_dtype = compute = x.dtype
    if torch.is_autocast_enabled(kind):
        out_dtype = compute = torch.get_autocast_dtype(kind)
    elif layer.compute_dtype is not None:
        compute = layer.compute_dtype
    if dropout > 0.0 and is_capturing(x.device):
        raise RuntimeError(
            "dropout in a captured CUDA graph would repeat one mask at every replay: capture without dropout"
        )
    weight = weight_of(layer)
    with torch.autocast(kind, enabled=False):
        # drawn on the host: no synchronisation, and activation checkpointing restores this generator
        seed = int(torch.randint(_MAX_SEED, (), device="cpu")) if dropout > 0.0 else 0
        y: Tensor = _LoraLinear.apply(
            x.to(compute),
            A,
            B,
            layer.bias,
            scaling,
            dropout,
            seed,
            weight.spec,
            weight.shape,
            weight.compute,
            *weight.tensors,
        )
    return y.to(out_dtype)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        scaling: float,
        dropout: float,
        seed: int,
        spec: QuantSpec,
        shape: torch.Size,
        kind: str,
        *tensors: Tensor | None,
    ) -> Tensor:
        flat = x.reshape(-1, shape[1])  # (tokens, in)
        a, b = A.to(x.dtype), B.to(x.dtype)
        y = multiply(flat, Weight(tensors, spec, shape, kind), bias)
        h = _dropped(flat, dropout, seed) @ a.t()  # (tokens, r)
        y.addmm_(h, b.t(), alpha=scaling)
        # the weight goes through save_for_backward too: offloaded or streamed tensors are then the right ones
        ctx.save_for_backward(x, A, B, h, *tensors)
        ctx.settings = (scaling, dropout, seed, spec, shape, kind, None if bias is None else bias.dtype)
        return y.reshape(*x.shape[:-1], shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, A, B, h, *tensors = ctx.saved_tensors
        scaling, dropout, seed, spec, shape, kind, bias_dtype = ctx.settings
        dy = grads[0].reshape(-1, shape[0]).to(x.dtype)  # (tokens, out)
        flat = x.reshape(-1, shape[1])
        a, b = A.to(x.dtype), B.to(x.dtype)
        need = ctx.needs_input_grad
        dx = dA = dB = dbias = None
        # beta=0: the first argument only lends its shape
        dh = torch.addmm(h, dy, b, beta=0, alpha=scaling)  # (tokens, r)
        if need[2]:
            dB = torch.addmm(b, dy.t(), h, beta=0, alpha=scaling).to(B.dtype)
        if need[1]:
            dA = (dh.t() @ _dropped(flat, dropout, seed)).to(A.dtype)
        if need[0]:
            dx = multiply_transposed(dy, Weight(tuple(tensors), spec, shape, kind))
            if dropout > 0.0:
                _dropped(dh @ a, dropout, seed, add_to=dx)
            else:
                dx.addmm_(dh, a)
            dx = dx.reshape(x.shape)
        if bias_dtype is not None and need[3]:
            dbias = dy.sum(0).to(bias_dtype)
        return (dx, dA, dB, dbias, *[None] * (len(need) - 4))


def _dropped(x: Tensor, p: float, seed: int, add_to: Tensor | None = None) -> Tensor:
    """``dropout(x)`` with the mask that ``seed`` draws; added to ``add_to`` where given."""
    if p == 0.0:
        return x
    x = x.contiguous()
    out = torch.empty_like(x) if add_to is None else add_to
    if x.device.type == "cuda":
        from quant.backends import triton_blocks

        return triton_blocks.dropout(x, p, seed, out, accumulate=add_to is not None)
    generator = torch.Generator(device=x.device).manual_seed(seed)
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= p
    value = x.mul(1.0 / (1.0 - p)).mul_(keep)
    return value if add_to is None else add_to.add_(value)
