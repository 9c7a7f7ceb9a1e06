"""Put EVA's directions into an adapter, with the ranks that they bring."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .lora_layer import LoraLayer
from .targets import condense, get_pattern_key

_BASE = "base_model.model."


def load_eva_state_dict(
    model: Any, eva_state_dict: Mapping[str, Tensor], adapter_name: str, adjust_scaling_factors: bool
) -> None:
    """Set A, rank and alpha of every layer; layers that the state dict does not have start with True.

    Args:
        model: A PeftModel; its adapter's config is brought up to date.
        eva_state_dict: Layer name -> (rank, in); rank 0 takes the adapter's layer away.
        adapter_name: Which adapter.
        adjust_scaling_factors: Change alpha with the rank, so that a layer's scaling remains what it was.

    Raises:
        ValueError: a name that is no adapted layer, or directions of another width.
    """
    config = copy.copy(model.peft_config[adapter_name])
    layers = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, LoraLayer) and m.has_adapter(adapter_name)
    }
    unknown = [name for name in eva_state_dict if name not in layers]
    if unknown:
        raise ValueError(f"eva_state_dict has names that are no adapted layers: {', '.join(unknown[:5])}")
    all_names = [name.removeprefix(_BASE) for name, _ in model.named_modules()]
    missing: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, layer in layers.items():
        plain, r, alpha = name.removeprefix(_BASE), layer.r[adapter_name], layer.lora_alpha[adapter_name]
        A = eva_state_dict.get(name)
        if A is None:
            missing.append(plain)
            _update(layer, adapter_name, r, alpha, config, init=True)
        elif len(A) == 0:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
            continue
        else:
            weight = layer.lora_A[adapter_name].weight
            if A.shape[1:] != weight.shape[1:]:
                raise ValueError(f"{name}: directions {tuple(A.shape)} do not fit A {tuple(weight.shape)}")
            if len(A) != r and adjust_scaling_factors:
                ratio = len(A) / r
                alpha *= ratio**0.5 if config.use_rslora else ratio
            r = len(A)
            if r != layer.r[adapter_name] or weight.is_meta:
                _update(layer, adapter_name, r, alpha, config, init="eva")
            layer.lora_A[adapter_name].weight.data.copy_(A)
            layer.refresh_magnitude(adapter_name)
        ranks[plain], alphas[plain] = r, alpha
    own = model.peft_config[adapter_name]
    own.target_modules = condense(set(ranks), all_names)
    own.rank_pattern = _pattern(ranks, own.r)
    own.alpha_pattern = _pattern(alphas, own.lora_alpha)
    if missing:
        warnings.warn(
            "the following layers were initialized with init_lora_weights=True because they were not found "
            f"in the eva state_dict: {missing}\nEVA is for linear layers that the data reached",
            stacklevel=3,
        )


def _update(layer: LoraLayer, adapter_name: str, r: int, alpha: float, config: Any, init: bool | str) -> None:
    """Make the factors anew, in the dtype that they had."""
    dtype = next(p.dtype for p in _factors(layer, adapter_name))
    config.init_lora_weights = init
    layer.update_layer(adapter_name, r, lora_alpha=alpha, config=config)
    for parameter in _factors(layer, adapter_name):
        parameter.data = parameter.data.to(dtype)


def _factors(layer: LoraLayer, adapter_name: str) -> list[Any]:
    found: list[Any] = []
    for attribute in layer.adapter_layer_names:
        container = getattr(layer, attribute)
        if adapter_name in container:
            item = container[adapter_name]
            found += item.parameters() if hasattr(item, "parameters") else [item]
    return found


def _pattern(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """Layer name -> value where it is not the usual one; anchored where a plain name matches others too."""
    plain = {name: value for name, value in values.items() if value != usual}
    if all(plain.get(get_pattern_key(plain, name), usual) == value for name, value in values.items()):
        return plain
    return {f"^{re.escape(name)}$": value for name, value in plain.items()}
