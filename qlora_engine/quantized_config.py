"""Keep a model's config.json true to its layers, so that the base can be saved and loaded after it was
quantised."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from quant.linear import QuantizedModule

from .base_weight import is_bnb_linear
from .loading import NATIVE_METHOD, native_config


def base_path(name: str) -> str:
    """The path that a module inside adapted layers had before they were put around it."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


def record_quantization(model: Any) -> None:
    """Write ``config.quantization_config`` for the layers quantised here; take it out where none is left.

    A model that still has layers of bitsandbytes, or was quantised by another library, is left alone.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return
    settings = getattr(config, "quantization_config", None)
    method = (
        settings.get("quant_method")
        if isinstance(settings, dict)
        else getattr(settings, "quant_method", None)
    )
    if method not in (None, NATIVE_METHOD, "bitsandbytes") or any(is_bnb_linear(m) for m in model.modules()):
        return
    specs = {base_path(name): m.spec for name, m in model.named_modules() if isinstance(m, QuantizedModule)}
    if specs:
        config.quantization_config = native_config(specs)
    elif method == NATIVE_METHOD:
        del config.quantization_config


def untie_if_quantized(model: Any, was_tied: bool) -> None:
    """Say, and write into the config, that quantising one of two tied layers has parted them."""
    if not was_tied or tied_embeddings(model):
        return
    model.config.tie_word_embeddings = False
    warnings.warn(
        "Quantising one of the input and output embeddings, which shared a weight, has parted them: the "
        "other keeps the full-precision weight. Setting `tie_word_embeddings=False` in the model config.",
        stacklevel=4,
    )


def tied_embeddings(model: Any) -> bool:
    """Whether the input and output embeddings are one Parameter, whatever is wrapped around them."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return False
    layers = [getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    weights = [_own_weight(layer) for layer in layers]
    return weights[0] is not None and weights[0] is weights[1]


def _own_weight(layer: nn.Module | None) -> Any:
    """The registered weight of a layer or of the one that it wraps; None where it is quantised."""
    while isinstance(layer, nn.Module) and "weight" not in layer._parameters:
        layer = getattr(layer, "base_layer", None) or layer._modules.get("original_module")
    return None if layer is None else layer._parameters["weight"]
