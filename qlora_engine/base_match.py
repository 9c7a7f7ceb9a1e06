"""Does an adapter belong to the base that it is put on? The fingerprint of a model in memory, compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from quant.bnb_format import from_linear4bit
from quant.linear import QuantizedModule
from quant.tensor import QuantizedTensor

from .base_weight import dense_weight, is_bnb_linear, is_conv1d
from .fingerprint import Fingerprint, dense_digest, module_digest, most


def _named_bases(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the base model, by the path it had before it was adapted."""
    for name, module in model.named_modules():
        yield name.replace(".base_layer", "").replace(".original_module", ""), module


def _quantized_weights(model: nn.Module) -> dict[str, QuantizedTensor]:
    found: dict[str, QuantizedTensor] = {}
    for path, module in _named_bases(model):
        if isinstance(module, QuantizedModule):
            found[path] = module.quantized()
        elif is_bnb_linear(module) == "4bit" and getattr(module.weight, "quant_state", None) is not None:
            found[path] = from_linear4bit(module)
    return found


def base_fingerprint(model: nn.Module) -> Fingerprint | None:
    """The fingerprint of a base model (adapted or not) whose weights are quantised; None if none is.

    A weight is hashed once: its digest is kept on the module until its codes move or change.
    """
    weights = _quantized_weights(model)
    if not weights:
        return None
    dtype = str(getattr(model, "dtype", torch.float32)).removeprefix("torch.")
    kept: dict[str, Any] = model.__dict__.setdefault("_quantization_digests", {})
    digests = {}
    for path, q in weights.items():
        key = (q.codes.data_ptr(), q.codes._version, q.scales.data_ptr(), q.scales._version)
        if kept.get(path, (None,))[0] != key:
            kept[path] = (key, module_digest(q))
        digests[path] = kept[path][1]
    return Fingerprint({path: q.spec for path, q in weights.items()}, digests, dtype)


def differences(made_for: Fingerprint, model: nn.Module) -> list[str]:
    """Why an adapter made for that base does not belong to ``model``: at most 5 reasons, none if it does.

    A base that was saved dequantised is known by the signs of its weights, in whatever dtype it was loaded.
    """
    if not made_for.dense:
        base = base_fingerprint(model)
        return ["nothing is quantised here"] if base is None else made_for.differences(base)
    # The innermost module of a path comes last: the base layer, not what wraps it.
    modules = dict(_named_bases(model))
    found = []
    for path, digest in sorted(made_for.digests.items()):
        module = modules.get(path)
        if module is None:
            found.append(f"there is no {path} in this base")
            continue
        weight = dense_weight(module)
        if dense_digest(weight.T if is_conv1d(module) else weight) != digest:
            found.append(f"{path} has other weights")
    return most(found)
