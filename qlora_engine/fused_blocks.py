"""Layers that share their input, computed together: the SwiGLU MLP, and query, key and value.

``enable(model)`` looks for modules with ``gate_proj``, ``up_proj`` and ``down_proj`` (SiLU between), and for
modules with ``q_proj``, ``k_proj`` and ``v_proj``, all of them LoRA layers on quantised weights, and runs
each as one autograd function on CUDA, without touching the model's source. Where a call does not fit (several
adapters, DoRA, dropout in training, hooks, torch.compile, a CPU), the module's own forward runs.
``disable(model)`` undoes it; do so before pickling the model. RMSNorms and rotary embeddings are switched
with them (``fused_norms``).
"""

from __future__ import annotations

import copy
import types
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import fused, fused_norms
from .fused_products import Part, shared_input, swiglu_mlp

_MLP = ("gate_proj", "up_proj", "down_proj")
_QKV = ("q_proj", "k_proj", "v_proj")
_SILU = ("SiLU", "SiLUActivation")
_STRIDED = 16  # elements: strided rows of a decoded weight must be a multiple of this


def enable(model: nn.Module, *, norms: bool = True) -> int:
    """Run what can be run together as one function; returns how many modules were switched.

    Idempotent. ``qlora_engine.fused.set_fused(False)`` switches all of it off for the process. Without Triton
    only query, key and value are.

    Args:
        model: With adapters attached.
        norms: RMSNorms and rotary embeddings, too.
    """
    triton = fused.has_triton()
    switched = fused_norms.enable(model) if norms and triton else 0
    for module in model.modules():
        if triton and _has_lora(module, _MLP) and _is_silu(module) and "forward" not in module.__dict__:
            module.forward = types.MethodType(_mlp_forward, module)
            switched += 1
        elif _has_lora(module, _QKV) and not hasattr(module.q_proj, "_shared_input"):
            group = _SharedInput([getattr(module, name) for name in _QKV])
            for index, name in enumerate(_QKV):
                layer = getattr(module, name)
                layer.forward = types.MethodType(_member_forward, layer)
                layer._shared_input = (group, index)
                switched += index == 0
    return switched


def disable(model: nn.Module) -> int:
    """Undo ``enable``; returns how many modules were switched back."""
    switched = fused_norms.disable(model)
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if getattr(forward, "__func__", None) is _mlp_forward:
            del module.forward
            switched += 1
        elif getattr(forward, "__func__", None) is _member_forward:
            del module.forward
            switched += cast(Any, module)._shared_input[1] == 0
            del module._shared_input
    return switched


def _has_lora(module: nn.Module, names: tuple[str, ...]) -> bool:
    return all(hasattr(getattr(module, name, None), "_fused_forward") for name in names)


def _is_silu(module: nn.Module) -> bool:
    return type(getattr(module, "act_fn", None)).__name__ in _SILU


def _part(layer: Any, x: Tensor) -> Part | None:
    """The layer as a Part, or None where its own forward has to run."""
    adapters = [name for name in layer.active_adapters if layer.has_adapter(name)]
    if layer.merged or layer.disable_adapters or not fused.applies(layer, adapters, x):
        return None
    name, base = adapters[0], layer.base_layer
    dropout = layer.lora_dropout[name]
    drops = layer.training and isinstance(dropout, nn.Dropout) and dropout.p > 0
    # float8 products have no columns to spare for the factors: such layers are fused one by one
    if drops or base.bias is not None or fused.has_hooks(layer) or base.compute != "same":
        return None
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    return Part(fused.weight_of(base), A, B, layer.scaling[name])


def _compute_dtype(layer: Any, x: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    dtype: torch.dtype = layer.base_layer.compute_dtype or x.dtype
    return dtype


# ---- the MLP


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    layers = [getattr(self, name) for name in _MLP]
    parts = [_part(layer, x) for layer in layers]
    if any(part is None or part.weight.shape[1] % _STRIDED for part in parts) or fused.has_hooks(self.act_fn):
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    out_dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    with torch.autocast(x.device.type, enabled=False):
        y = swiglu_mlp(x.to(_compute_dtype(layers[0], x)), *[part for part in parts if part is not None])
    return y.to(out_dtype)


# ---- query, key and value


class _SharedInput:
    """Layers called one after the other on the same input: the first call computes all, the others collect.

    The results wait here between the calls of one forward; only a call with the very tensor they were
    computed from, in the same grad mode, collects them.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.x: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}
        self.mode = (False, False)

    def __deepcopy__(self, memo: dict[int, Any]) -> _SharedInput:
        twin = memo[id(self)] = _SharedInput([])  # before its layers, which lead back here
        twin.layers = copy.deepcopy(self.layers, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "x": None, "waiting": {}, "mode": (False, False)}

    def output(self, index: int, x: Tensor) -> Tensor | None:
        """The output of layer ``index`` on ``x``, or None where its own forward has to run."""
        mode = (torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type))
        if index in self.waiting and self.x is x and self.mode == mode:
            y = self.waiting.pop(index)
            if not self.waiting:
                self.x = None
            return y
        self.x, self.waiting = None, {}
        if index != 0:
            return None
        parts = [_part(layer, x) for layer in self.layers]
        if any(part is None for part in parts):
            return None
        dtype = torch.get_autocast_dtype("cuda") if mode[1] else x.dtype
        with torch.autocast(x.device.type, enabled=False):
            computed = shared_input(
                x.to(_compute_dtype(self.layers[0], x)), *[part for part in parts if part is not None]
            )
        outputs = [y.to(dtype) for y in computed]
        self.x, self.waiting, self.mode = x, dict(enumerate(outputs[1:], 1)), mode
        return outputs[0]


def _member_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    group, index = self._shared_input
    y = None if args or kwargs or torch.compiler.is_compiling() else group.output(index, x)
    return type(self).forward(self, x, *args, **kwargs) if y is None else y
