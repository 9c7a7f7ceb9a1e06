"""Switch, freeze, cast and delete adapters anywhere in a model: functions over its adapted layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .auxiliary import AuxiliaryTrainingWrapper
from .lora_layer import LoraLayer
from .tuner_layer import BaseTunerLayer, as_names

_NARROW = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")


def tuner_layers(model: nn.Module) -> Iterator[BaseTunerLayer]:
    """The adapted layers of ``model``, in its own order."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            yield module


def lora_layers(model: nn.Module) -> Iterator[LoraLayer]:
    """Those of them that are LoRA layers."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            yield module


def wrappers(model: nn.Module) -> Iterator[AuxiliaryTrainingWrapper]:
    """The wrappers of modules that train beside the adapters."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield module


def set_adapter(
    model: nn.Module,
    adapter_name: str | list[str],
    inference_mode: bool = False,
    layer_cls: type[BaseTunerLayer] = BaseTunerLayer,
) -> None:
    """Activate adapters everywhere; a merged layer is unmerged first, with a warning.

    Args:
        model: With adapted layers.
        adapter_name: One name or several.
        inference_mode: Leave them frozen.
        layer_cls: Only layers of this class.

    Raises:
        ValueError: several adapters that each bring their own version of one module.
    """
    for wrapper in wrappers(model):
        chosen = wrapper.check_set_adapter(adapter_name)
        wrapper.set_adapter(chosen if chosen in wrapper._adapters else [], inference_mode=inference_mode)
    warned = False
    for layer in tuner_layers(model):
        if isinstance(layer, layer_cls):
            if layer.merged:
                if not warned:
                    warnings.warn(
                        "Adapter cannot be set when the model is merged. Unmerging the model first.",
                        stacklevel=2,
                    )
                    warned = True
                layer.unmerge()
            layer.set_adapter(adapter_name, inference_mode=inference_mode)


def set_requires_grad(
    model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True
) -> None:
    """Let the weights of these adapters train, or not, whichever are active."""
    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            module.set_requires_grad(adapter_names, requires_grad)


def check_not_merged(model: nn.Module, adapter_names: str | Sequence[str]) -> None:
    """Raises:
    ValueError: one of the adapters is merged somewhere.
    """
    merged = {name for layer in tuner_layers(model) for name in layer.merged_adapters}
    still = sorted(merged & set(as_names(adapter_names)))
    if still:
        raise ValueError(
            f"Cannot delete adapter(s) {still} while they are merged. Please unmerge them first."
        )


def delete_adapter(
    model: nn.Module,
    adapter_name: str,
    prefix: str = "lora_",
    layer_cls: type[BaseTunerLayer] = BaseTunerLayer,
) -> list[str] | None:
    """Delete an adapter's weights everywhere.

    Args:
        model: With adapted layers.
        adapter_name: To delete.
        prefix: Modules whose path contains it are inside adapters and not looked at.
        layer_cls: Only layers of this class.

    Returns:
        The names that are active now; None if there was no adapted layer.
    """
    active: list[str] | None = None
    for name, module in list(model.named_modules()):
        if prefix not in name and isinstance(module, layer_cls):
            module.delete_adapter(adapter_name)
            if active is None:
                active = module.active_adapters[:]
    for wrapper in wrappers(model):
        wrapper.delete_adapter(adapter_name, new_active_adapters=active)
    return active


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Cast one adapter's half- and quarter-precision weights to float32, in new Parameters.

    Args:
        model: With adapted layers.
        adapter_name: To cast.
        autocast_adapter_dtype: False: do nothing.
    """
    if not autocast_adapter_dtype:
        return
    narrow = {torch.float16, torch.bfloat16, *(getattr(torch, n) for n in _NARROW if hasattr(torch, n))}
    for layer in tuner_layers(model):
        for container in layer._containers():
            if adapter_name not in container:
                continue
            item: Any = container[adapter_name]
            if isinstance(item, nn.Parameter):
                if item.dtype in narrow:
                    container[adapter_name] = _as_float32(item)
                continue
            for owner in item.modules():
                for name, parameter in list(owner.named_parameters(recurse=False)):
                    if parameter.dtype in narrow:
                        setattr(owner, name, _as_float32(parameter))


def _as_float32(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.data.float(), requires_grad=parameter.requires_grad)


def mark_only_adapters_as_trainable(model: nn.Module, biases: Sequence[str]) -> None:
    """Freeze all but the adapters and what the wrappers manage; then let biases train.

    Args:
        model: With adapted layers.
        biases: The ``bias`` settings of the active adapters: "none", "all", or "..._only".

    Raises:
        NotImplementedError: another setting.
    """
    kept: set[int] = set()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            containers = [*module._containers(), module.lora_dropout]
            kept.update(id(p) for container in containers for p in container.parameters())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            kept.update(id(p) for p in module.parameters())
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad = False
    for bias in biases:
        if bias == "none":
            continue
        if bias == "all":
            for name, parameter in model.named_parameters():
                if name == "bias" or name.endswith(".bias"):
                    parameter.requires_grad = True
        elif bias.endswith("_only"):
            for layer in lora_layers(model):
                if getattr(layer, "bias", None) is not None:
                    layer.bias.requires_grad = True  # type: ignore[union-attr]
        else:
            raise NotImplementedError(f"Requested bias: {bias}, is not implemented.")
