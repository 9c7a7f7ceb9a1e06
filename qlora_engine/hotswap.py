"""Replace a loaded adapter's weights by another adapter's in place, so that a compiled model stays valid."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .adapter_state import load_peft_weights
from .adapters import lora_layers, tuner_layers, wrappers
from .config import LoraConfig, PeftConfig
from .lora_layer import LoraLayer
from .peft_layout import check_stacks, release_of_stacks
from .targets import pattern_value

# What the weights do not say, by type of adapter.
CONFIG_KEYS_TO_CHECK = {"LORA": ["use_rslora", "lora_dropout", "alpha_pattern", "use_dora"]}
_HUB_ARGUMENTS = ("subfolder", "revision", "cache_dir", "token")


@dataclass(frozen=True)
class _Slot:
    """A parameter of the adapter: where it is, and along which dimension its rank lies."""

    parameter: nn.Parameter
    layer: LoraLayer | None  # None for a module that trains in full
    layer_name: str
    kind: str
    rank_dim: int | None
    groups: int = 1


def hotswap_adapter(
    model: Any,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Give the adapter ``adapter_name`` of ``model`` the weights of an adapter folder or hub repository.

    The name stays, and so does every Parameter: a smaller rank is padded with zeros, weights that the new
    adapter does not have become nil. A larger rank replaces the data, after which a compiled model compiles
    again (see ``prepare_model_for_compiled_hotswap``).

    Args:
        model: A PeftModel, compiled or not.
        model_name_or_path: The new adapter.
        adapter_name: The adapter to replace.
        torch_device: Where to load the file; default: the CPU.
        kwargs: ``subfolder``, ``revision``, ``token``, ``cache_dir``.

    Raises:
        ValueError: no such adapter, one that is merged, a type other than LoRA, or configs that differ in
            use_rslora, lora_dropout, alpha_pattern or use_dora; shapes that differ in more than the rank.
        RuntimeError: the new adapter has weights that the model does not.
    """
    if adapter_name not in model.peft_config:
        raise ValueError(f"Adapter {adapter_name} does not exist")
    hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if kwargs.get(key) is not None}
    old = model.peft_config[adapter_name]
    _check_types(_type(old), PeftConfig._get_peft_type(os.fspath(model_name_or_path), **hub))
    config = LoraConfig.from_pretrained(model_name_or_path, **hub)
    check_hotswap_configs_compatible(old, config)
    check_stacks(model, adapter_name, release_of_stacks(config))
    tensors = load_peft_weights(model_name_or_path, device=torch_device, **hub)
    named = {insert_adapter_name(key, adapter_name): tensor for key, tensor in tensors.items()}
    hotswap_adapter_from_state_dict(model, named, adapter_name, config)


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Refuse two adapters that cannot take each other's place.

    Raises:
        ValueError: they are of different types, or differ in what is not in their weights.
    """
    _check_types(_type(config0), _type(config1))
    values0, values1 = config0.to_dict(), config1.to_dict()
    for key in CONFIG_KEYS_TO_CHECK[_type(config0)]:
        if values0.get(key) != values1.get(key):
            raise ValueError(f"Configs are incompatible: for {key}, {values0.get(key)} != {values1.get(key)}")


def _type(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _check_types(type0: str, type1: str) -> None:
    if type0 != type1:
        raise ValueError(f"Incompatible PEFT types found: {type0} and {type1}")
    if type0 not in CONFIG_KEYS_TO_CHECK:
        raise ValueError(
            f"Hotswapping only supports {', '.join(CONFIG_KEYS_TO_CHECK)} but {type0} was passed."
        )


def insert_adapter_name(key: str, adapter_name: str) -> str:
    """A key of a file as the model's: ``q.lora_A.weight`` -> ``q.lora_A.NAME.weight``."""
    return re.sub(r"(?<=\.)(lora_[^.]+)(?=\.|$)", rf"\1.{adapter_name}", key)


@torch.no_grad()
def hotswap_adapter_from_state_dict(
    model: Any,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """As ``hotswap_adapter``, from tensors with the model's own keys; nothing changes if anything is wrong.

    Args:
        model: With adapted layers, compiled or not.
        state_dict: The new weights, keys with the adapter's name in them.
        adapter_name: The adapter to replace.
        config: Of the new adapter: gives the scaling of every layer.
        parameter_prefix: What the names of an adapter's containers begin with.

    Raises:
        ValueError, RuntimeError: see ``hotswap_adapter``.
    """
    inner = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if any(adapter_name in layer.merged_adapters for layer in tuner_layers(inner)):
        raise ValueError(
            f"Cannot hot-swap adapter '{adapter_name}' because it is currently merged into the base "
            "weights. Please unmerge the adapter first by calling `peft_model.unmerge_adapter()` (or, for "
            "diffusers models, `diffusers_model.unfuse_lora()`); unmerging after a swap of merged weights "
            "would otherwise corrupt them."
        )
    slots = dict(_slots(inner, adapter_name, parameter_prefix))
    given = {_own_key(key, slots, adapter_name): tensor for key, tensor in state_dict.items()}
    unexpected = [key for key in given if key not in slots]
    if unexpected:
        raise RuntimeError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}."
        )
    fitted = {key: _fit(key, slots[key], tensor) for key, tensor in given.items()}

    swapped: dict[str, LoraLayer] = {}
    padded = False
    for key, slot in slots.items():
        if key not in fitted:
            if slot.layer is not None and slot.kind != "lora_magnitude_vector":
                slot.parameter.zero_()
            continue
        new = fitted[key].to(slot.parameter.device, slot.parameter.dtype)
        padded = padded or new.shape != given[key].shape
        if new.shape == slot.parameter.shape:
            slot.parameter.copy_(new)  # not through .data: caches of DoRA's norms look at the version
        else:
            slot.parameter.data = new
        if slot.layer is not None:
            swapped[slot.layer_name] = slot.layer
    for name, layer in swapped.items():
        _set_rank(layer, name, adapter_name, config)
    for key, slot in slots.items():
        if key not in fitted and slot.kind == "lora_magnitude_vector" and slot.layer is not None:
            slot.layer.refresh_magnitude(adapter_name)
    if adapter_name in getattr(inner, "peft_config", {}):
        _update_config(inner.peft_config[adapter_name], config, swapped, adapter_name, padded)


def _slots(model: nn.Module, adapter: str, prefix: str) -> Iterator[tuple[str, _Slot]]:
    """Key in the model's state dict -> slot, of every weight of the adapter."""
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or not module.has_adapter(adapter):
            continue
        groups = getattr(module.get_base_layer(), "groups", 1)
        for kind in module.adapter_layer_names:
            container = getattr(module, kind)
            if not kind.startswith(prefix) or adapter not in container:
                continue
            rank_dim = {"A": 0, "B": 1}.get(kind[-1])
            item: Any = container[adapter]
            if isinstance(item, nn.Parameter):
                yield f"{name}.{kind}.{adapter}", _Slot(item, module, name, kind, rank_dim)
                continue
            for own, parameter in item.named_parameters():
                dim = rank_dim if own == "weight" else None
                yield f"{name}.{kind}.{adapter}.{own}", _Slot(parameter, module, name, kind, dim, groups)
    paths = {id(module): name for name, module in model.named_modules()}
    for wrapper in wrappers(model):
        name = paths[id(wrapper)]
        own_parameters = dict(wrapper.named_parameters())
        for own in wrapper.adapter_state_dict_load_map(adapter).values():  # type: ignore[attr-defined]
            if own in own_parameters:
                yield f"{name}.{own}", _Slot(own_parameters[own], None, name, "wrapper", None)


def _own_key(key: str, slots: dict[str, _Slot], adapter: str) -> str:
    """The model's key: a file leaves ``.weight`` of a magnitude out and does not name a wrapper's version."""
    if key in slots:
        return key
    if f"{key}.weight" in slots:
        return f"{key}.weight"
    parent, _, leaf = key.rpartition(".")
    for infix in (f"modules_to_save.{adapter}.{leaf}", f"{leaf}.{adapter}"):
        if f"{parent}.{infix}" in slots:
            return f"{parent}.{infix}"
    return key


def _fit(key: str, slot: _Slot, new: Tensor) -> Tensor:
    """``new`` with its rank padded to the slot's; as it is where it has the slot's shape or a larger rank."""
    old, dim = slot.parameter.shape, slot.rank_dim
    if new.shape == old:
        return new
    same_but_rank = (
        dim is not None
        and new.dim() == len(old)
        and all(new.shape[i] == old[i] for i in range(len(old)) if i != dim)
    )
    if not same_but_rank or dim is None:
        raise ValueError(
            f"Incompatible shapes found for LoRA weights {key}: {tuple(old)} vs {tuple(new.shape)}. Please "
            "ensure that all ranks are padded to the largest rank among all LoRA adapters by using "
            "prepare_model_for_compiled_hotswap."
        )
    return new if new.shape[dim] > old[dim] else pad(new, old[dim], dim, slot.groups if dim == 0 else 1)


def pad(factor: Tensor, rank: int, dim: int, groups: int = 1) -> Tensor:
    """``factor`` with zeros along ``dim`` up to ``rank``; with groups at the end of each group's block."""
    if groups > 1:
        blocks = factor.unflatten(0, (groups, -1))
        return pad(blocks, rank // groups, 1).flatten(0, 1)
    shape = list(factor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim)


def _set_rank(layer: LoraLayer, name: str, adapter: str, config: LoraConfig) -> None:
    plain = name.removeprefix("base_model.model.")
    rank = pattern_value(config.rank_pattern, plain, config.r, field_name="rank_pattern")
    alpha = pattern_value(config.alpha_pattern, plain, config.lora_alpha, field_name="alpha_pattern")
    layer.r[adapter], layer.lora_alpha[adapter] = rank, alpha
    scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    old: Any = layer.scaling[adapter]
    if isinstance(old, Tensor):
        old.fill_(scaling)  # a compiled model reads this very tensor
    else:
        layer.scaling[adapter] = scaling
    if adapter in layer.lora_A:
        _set_sizes(layer, adapter)


def _update_config(
    own: LoraConfig, new: LoraConfig, layers: dict[str, LoraLayer], adapter: str, padded: bool
) -> None:
    """Let the model's config describe what its layers hold now, for when the adapter is saved."""
    if not padded:
        own.r, own.lora_alpha, own.rank_pattern = new.r, new.lora_alpha, dict(new.rank_pattern)
        return
    # Padded factors keep their rank, so that alpha has to make up for it.
    alphas = set()
    for layer in layers.values():
        rank = layer.get_factors(adapter)[0].shape[0]
        alphas.add(float(layer.scaling[adapter]) * (math.sqrt(rank) if new.use_rslora else rank))
    if len(alphas) == 1 and not own.alpha_pattern:
        alpha = alphas.pop()
        own.lora_alpha = int(alpha) if alpha == int(alpha) else alpha  # type: ignore[assignment]
    else:
        warnings.warn(
            f"The adapter '{adapter}' was padded to ranks that no single lora_alpha goes with: save it from "
            "where it came from, not from this model.",
            stacklevel=4,
        )


def _set_sizes(layer: LoraLayer, adapter: str) -> None:
    """Make the sizes that the factors' modules remember those of their weights."""
    A, B = layer.lora_A[adapter], layer.lora_B[adapter]
    rank = A.weight.shape[0]
    for module, attribute in (
        (A, "out_features"),
        (A, "out_channels"),
        (B, "in_features"),
        (B, "in_channels"),
    ):
        if hasattr(module, attribute):
            setattr(module, attribute, rank)


def prepare_model_for_compiled_hotswap(
    model: Any,
    *,
    target_rank: int | None = None,
    config: LoraConfig | dict[str, LoraConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make hot-swapping adapters of other ranks and alphas possible without compiling again.

    Scalings become tensors, and factors are padded with zeros to ``target_rank``; outputs stay the same.
    Call it after the first adapter is loaded and before ``torch.compile``.

    Args:
        model: With adapted layers, changed in place.
        target_rank: The largest rank of all adapters to come; None leaves ranks alone.
        config: Configs whose ranks are to become ``target_rank``, such as ``model.peft_config``.
        check_compiled: What to do if the model is compiled already.

    Raises:
        ValueError: compiled already, no adapted layer, a rank above ``target_rank``, one that a
            convolution's groups do not divide, or a bad ``check_compiled``. Nothing has changed then.
    """
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        if check_compiled == "error":
            raise ValueError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
        if check_compiled == "warn":
            warnings.warn(
                "prepare_model_for_compiled_hotswap was called with a model that is already compiled. This "
                "will likely result in re-compilation, hurting performance. Call the function before "
                "compiling the model.",
                stacklevel=2,
            )
        elif check_compiled != "ignore":
            raise ValueError(
                f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{check_compiled}' "
                "instead."
            )
    layers = list(lora_layers(model))
    if not layers:
        raise ValueError(
            "No adapter layers found on the model, make sure call `prepare_model_for_compiled_hotswap` after "
            "loading the first adapter and before loading the second adapter."
        )
    if target_rank is not None:
        for step in (_check_padding, _pad_layer):
            for layer in layers:
                for adapter in layer.r:
                    step(layer, adapter, target_rank)
    for layer in layers:
        for adapter, value in layer.scaling.items():
            if not isinstance(value, Tensor):
                device = layer.get_factors(adapter)[0].device
                layer.scaling[adapter] = torch.tensor(float(value), device=device)  # type: ignore[assignment]
    if target_rank is None or not config:
        return
    for entry in (config if isinstance(config, dict) else {"": config}).values():
        entry.r = target_rank
        entry.rank_pattern = dict.fromkeys(entry.rank_pattern, target_rank)


def _check_padding(layer: LoraLayer, adapter: str, target_rank: int) -> None:
    groups = getattr(layer.get_base_layer(), "groups", 1)
    if target_rank % groups:
        raise ValueError(
            f"Trying to pad a Conv2d LoRA adapter with groups={groups} to target rank {target_rank}, but "
            f"the target rank is not divisible by {groups}. Please choose a target rank that is divisible "
            f"by {groups}."
        )
    rank = layer.get_factors(adapter)[0].shape[0]
    if rank > target_rank:
        raise ValueError(
            f"Trying to pad the adapter to the target rank {target_rank}, but the original rank is larger "
            f"({rank}). This is not possible."
        )


@torch.no_grad()
def _pad_layer(layer: LoraLayer, adapter: str, target_rank: int) -> None:
    groups = getattr(layer.get_base_layer(), "groups", 1)
    if layer.get_factors(adapter)[0].shape[0] == target_rank:
        return

    def padded(parameter: nn.Parameter, rank: int, dim: int, groups: int) -> nn.Parameter:
        return nn.Parameter(pad(parameter.data, rank, dim, groups), requires_grad=parameter.requires_grad)

    if adapter in layer.lora_embedding_A:
        layer.lora_embedding_A[adapter] = padded(layer.lora_embedding_A[adapter], target_rank, 0, 1)
        layer.lora_embedding_B[adapter] = padded(layer.lora_embedding_B[adapter], target_rank, 1, 1)
        return
    A, B = layer.lora_A[adapter], layer.lora_B[adapter]
    A.weight = padded(A.weight, target_rank, 0, groups)
    B.weight = padded(B.weight, target_rank // groups, 1, 1)
    _set_sizes(layer, adapter)
