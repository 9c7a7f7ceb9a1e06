"""Merge adapters into one layer's base weight, and restore the base bit for bit.

All adapters are summed in float32 (float64 for a float64 base) on the original weight and rounded once. A
quantised base gives way to a dense layer while it is merged; its codes are kept beside. A dense base keeps
its original tensor beside (in host memory if the layer is on an accelerator). A weight that another layer
shares, as a head does an embedding's, is left to that layer: the merged one is this layer's own meanwhile.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .base_weight import dense_module, dense_weight, is_conv1d, is_quantized
from .errors import InputError
from .lora_layer import LoraLayer

_KEPT = "before_merge"


class MergeOverflow(InputError):
    """A merged weight is beyond the range of its dtype."""


@dataclass
class BeforeMerge:
    """What a merged layer needs to be as it was."""

    base: nn.Module | None  # the quantised layer that a dense one stands in for
    weight: Tensor | None  # a dense layer's original weight; a Parameter if another layer has it, too
    bias: Tensor | None  # the original bias, where an adapter changed it; likewise
    fan_in_fan_out: bool


def original_weight(layer: LoraLayer) -> Tensor:
    """A fresh copy of the base weight without any adapter, at least float32, in the base's orientation.

    Raises:
        ValueError: the weight is on the meta device (offloaded, or not loaded yet).
    """
    weight = layer.get_base_weight()
    if weight.is_meta:
        raise ValueError("the base weight is on the meta device; load the whole model to merge it")
    is_own = not is_quantized(layer.get_base_layer())  # dequantised ones are fresh already
    return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=is_own)


@torch.no_grad()
def add_adapters(weight: Tensor, layer: LoraLayer, names: Sequence[str]) -> Tensor:
    """Change ``weight`` (see ``original_weight``) in place to what the adapted layer multiplies by.

    LoRA adds ``s B A``. DoRA makes ``g (W + s B A)`` of the weight before it, with ``g = magnitude / norm``
    by output row and the norm that of the base plus this adapter alone: what forward() does to the output.
    """
    for name in names:
        A, B = (factor.to(weight.device, weight.dtype) for factor in layer.get_factors(name))
        weight.add_(layer._delta(A, B), alpha=float(layer.scaling[name]))
        if layer.use_dora.get(name, False):
            weight.mul_(along_rows(layer, dora_gain(layer, name).to(weight), weight))
    return weight


def dora_gain(layer: LoraLayer, name: str) -> Tensor:
    """Magnitude over norm of the adapted weight, (out,), at least float32."""
    magnitude = layer.lora_magnitude_vector[name].weight.detach().reshape(-1)
    return magnitude / layer.weight_norm(name).to(magnitude.device)


def along_rows(layer: LoraLayer, values: Tensor, weight: Tensor) -> Tensor:
    """``values`` (out,) shaped to multiply the output rows of ``weight`` in the base's orientation."""
    if is_transposed(layer):
        return values.reshape(1, -1)
    return values.reshape(-1, *(1,) * (weight.dim() - 1))


def is_transposed(layer: LoraLayer) -> bool:
    """Whether the base weight is stored (in, out): Conv1D and embeddings."""
    return layer.fan_in_fan_out or bool(layer.lora_embedding_A)


@torch.no_grad()
def merged_weight(
    layer: LoraLayer, names: Sequence[str], dtype: torch.dtype | None, *, safe_merge: bool = False
) -> Tensor:
    """The weight with the adapters in it, in ``dtype`` (None: at least float32), in the base's orientation.

    Raises:
        ValueError: ``safe_merge`` and the result is not finite.
        MergeOverflow: the result is finite, but not in float16.
        NotImplementedError: a grouped convolution.
    """
    total = add_adapters(original_weight(layer), layer, names)
    if safe_merge and not torch.isfinite(total).all():
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {_broken(layer, names)} seems to be broken"
        )
    if dtype is None:
        return total
    result = total.to(dtype)
    if dtype == torch.float16:
        largest = total.abs().max().item() if total.numel() else 0.0
        limit = torch.finfo(dtype).max
        if limit < largest < float("inf"):
            raise MergeOverflow(
                f"the merged weight reaches {largest:.4g}, beyond float16's {limit:.4g}; "
                "merge in bfloat16 or float32"
            )
    return result


def merged_bias(layer: LoraLayer, names: Sequence[str], *, safe_merge: bool = False) -> Tensor | None:
    """The base's bias plus the adapters' scaled ones, at least float32; None where no adapter has one.

    Raises:
        RuntimeError: an adapter has a bias and the base has none.
        ValueError: ``safe_merge`` and the result is not finite.
    """
    with_bias = [name for name in names if layer.lora_bias.get(name, False)]
    if not with_bias:
        return None
    base: Any = layer.get_base_layer()
    if getattr(base, "bias", None) is None:
        raise RuntimeError(
            "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias."
        )
    bias = base.bias.detach().to(torch.promote_types(base.bias.dtype, torch.float32))
    added = torch.zeros_like(bias)
    for name in names:
        if name in with_bias:
            added += float(layer.scaling[name]) * layer.lora_B[name].bias.detach().to(added)
        elif layer.use_dora.get(name, False):
            added *= dora_gain(layer, name).to(added)  # DoRA scales all that is there but the base's bias
    total = bias + added
    if safe_merge and not torch.isfinite(total).all():
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {with_bias[-1]} seems to be broken"
        )
    return total


def _broken(layer: LoraLayer, names: Sequence[str]) -> str:
    """The first adapter with a value that is not finite, else the last one."""
    for name in names:
        tensors = [*layer.get_factors(name)]
        if name in layer.lora_magnitude_vector:
            tensors.append(layer.lora_magnitude_vector[name].weight)
        if not all(torch.isfinite(tensor).all() for tensor in tensors):
            return name
    return names[-1]


@torch.no_grad()
def merge_layer(
    layer: LoraLayer, names: Sequence[str], *, safe_merge: bool = False, dtype: torch.dtype | None = None
) -> None:
    """Merge ``names`` besides what is merged already; on an error the layer stays as it was.

    Args:
        layer: Any LoRA layer with a dense or a quantised base.
        names: Adapters that this layer has and that are not merged.
        safe_merge: Refuse a result that is not finite.
        dtype: Of the merged weight. Default: a dense base keeps its dtype; a quantised base becomes dense in
            the dtype of its bias, else of the weight that was quantised.

    Raises:
        ValueError, RuntimeError, NotImplementedError: see ``merged_weight`` and ``merged_bias``.
    """
    already = list(layer.merged_adapters)
    if already:
        unmerge_layer(layer)
    wanted = [*already, *names]
    base: Any = layer.get_base_layer()
    dtype = dtype or _dense_dtype(base)
    try:
        bias = merged_bias(layer, wanted, safe_merge=safe_merge)
        weight = merged_weight(layer, wanted, dtype, safe_merge=safe_merge)
    except Exception:
        if already:
            merge_layer(layer, already)
        raise
    kept = BeforeMerge(None, None, None, layer.fan_in_fan_out)
    if is_quantized(base):
        kept.base = base
        dense: Any = dense_module(base, weight).requires_grad_(False)
        if getattr(dense, "bias", None) is not None:
            # Never the quantised layer's own storage, which has to stay as it is.
            values = (base.bias if bias is None else bias).detach().to(dtype, copy=True)
            dense.bias = nn.Parameter(values, requires_grad=base.bias.requires_grad)
        _set_base(layer, dense)
        layer.fan_in_fan_out = is_conv1d(dense)
    else:
        kept.weight = _exchange(base, "weight", weight)
        if bias is not None:
            kept.bias = _exchange(base, "bias", bias.to(base.bias.dtype))
    layer._caches[_KEPT] = kept
    layer.merged_adapters.extend(wanted)


@torch.no_grad()
def unmerge_layer(layer: LoraLayer) -> None:
    """Put the base back as it was before merging, bit for bit (in its present dtype, if that was changed)."""
    kept: BeforeMerge = layer._caches.pop(_KEPT)
    now: Any = layer.get_base_layer()
    if kept.base is not None:
        base: Any = kept.base.to(now.weight.device).train(now.training)
        if getattr(base, "bias", None) is not None and base.bias.dtype != now.bias.dtype:
            base.bias.data = base.bias.data.to(now.bias.dtype)
        _set_base(layer, base)
    elif kept.weight is not None:
        _restore(now, "weight", kept.weight)
        if kept.bias is not None:
            _restore(now, "bias", kept.bias)
    layer.fan_in_fan_out = kept.fan_in_fan_out
    layer.merged_adapters.clear()


def forget_original(layer: LoraLayer) -> None:
    """Drop what ``unmerge_layer`` would need: the merge is final."""
    layer._caches.pop(_KEPT, None)


def _dense_dtype(base: nn.Module) -> torch.dtype:
    if not is_quantized(base):
        return dense_weight(base).dtype
    bias = getattr(base, "bias", None)
    if bias is not None and bias.is_floating_point():
        return bias.dtype  # type: ignore[no-any-return]
    return getattr(base, "weight_dtype", None) or torch.float16  # LLM.int8 stands for float16


def _exchange(base: Any, name: str, new: Tensor) -> Tensor:
    """Make ``new`` the Parameter ``name`` of this layer alone; what ``_restore`` needs to undo it."""
    old = getattr(base, name)
    data, reference = old.data, weakref.ref(old)
    setattr(base, name, nn.Parameter(new, requires_grad=old.requires_grad))
    del old
    shared: nn.Parameter | None = reference()  # None unless something else still holds it
    return _in_host_memory(data) if shared is None else shared


def _restore(base: Any, name: str, original: Tensor) -> None:
    now = getattr(base, name)
    if isinstance(original, nn.Parameter) and (original.dtype, original.device) == (now.dtype, now.device):
        setattr(base, name, original)
    else:
        now.data = original.detach().to(now)


def _in_host_memory(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "cpu" else tensor.cpu()


def _set_base(layer: LoraLayer, module: nn.Module) -> None:
    holder: Any = layer
    while hasattr(holder.base_layer, "base_layer"):
        holder = holder.base_layer
    holder.base_layer = module
