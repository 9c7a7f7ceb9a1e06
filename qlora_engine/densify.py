"""A quantised model as a dense one, and the dtype of a model as a whole."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from .base_weight import dense_module, is_quantized
from .tuner_layer import BaseTunerLayer


def weights_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of most elements of the model's dense matrices, adapters left out; None if it has none."""
    inside = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, BaseTunerLayer))
    counts: Counter[torch.dtype] = Counter()
    for name, parameter in model.named_parameters():
        is_adapter = name.startswith(inside) and ".lora_" in name if inside else False
        if parameter.is_floating_point() and parameter.dim() > 1 and not is_adapter:
            counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else None


@torch.no_grad()
def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Make every quantised layer of ``model`` dense, one at a time, and forget that it was quantised.

    Args:
        model: Without adapters, changed in place.
        dtype: Of the dense weights; default: that of the weight that was quantised.
    """
    done: dict[int, nn.Module] = {}
    for key, module in list(model.named_modules(remove_duplicate=False)):
        if key and is_quantized(module):
            if id(module) not in done:
                done[id(module)] = dense_module(module, dtype=dtype).requires_grad_(False)
            replace_module(model, key, done[id(module)])
    config: Any = getattr(model, "config", None)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if name in vars(model):
            delattr(model, name)
    if "is_quantized" in vars(model):
        model.is_quantized = False  # type: ignore[assignment]


def cast_floats(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters, and buffers of modules that have parameters (BatchNorm's), but no table of angles."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        for tensor in [*own, *(module.buffers(recurse=False) if own else ())]:
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "dtype"):
        config.dtype = dtype


def replace_module(model: nn.Module, key: str, new: nn.Module) -> None:
    """Put ``new`` at the path ``key``."""
    parent, _, name = key.rpartition(".")
    setattr(model.get_submodule(parent), name, new)
