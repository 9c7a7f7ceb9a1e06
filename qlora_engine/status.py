"""What is adapted, active, merged, trainable and quantised: layer by layer, and for the model as a whole."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from quant.linear import QuantizedModule

from .auxiliary import AuxiliaryTrainingWrapper
from .base_weight import is_bnb_linear
from .trainable_tokens import TrainableTokensWrapper
from .tuner_layer import BaseTunerLayer

Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """The state of one adapted layer, or of a module that trains in full.

    Attributes:
        name: Its path.
        module_type: Its class, e.g. ``lora.Linear``.
        enabled: Whether its adapters are in use at all.
        active_adapters, merged_adapters: Names.
        requires_grad: By adapter; "irregular" where its weights differ.
        available_adapters: Sorted names.
        devices: Device types of every adapter's weights, sorted.
        quantization_backend: How the base is quantised: "bnb 4bit", "bnb 8bit", or "qlora_engine " and the
            format; None if it is not.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The state of an adapted model; "irregular" where its layers disagree.

    Attributes:
        base_model_type, adapter_model_type: Class names ("None" without a LoraModel around it).
        peft_types: By adapter.
        trainable_params, total_params: Numbers of weights; a quantised weight counts as one.
        num_adapter_layers: How many layers the fields below summarise.
        enabled, active_adapters, merged_adapters, requires_grad, available_adapters, devices,
            quantization_backend: As in ``TunerLayerStatus``.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def get_layer_status(model: Any) -> list[TunerLayerStatus]:
    """The status of every adapted layer of a PeftModel, or of any module with adapters in it.

    Raises:
        ValueError: there is none.
        TypeError: a PeftModel without a tuner in it.
    """
    inner = _inner(model, "get_layer_status")
    found = [
        _layer_status(name, module)
        for name, module in inner.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        # what a TrainableTokensWrapper wraps is a tuner layer, and reports for it
        and not isinstance(module, TrainableTokensWrapper)
    ]
    if not found:
        raise ValueError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that you have "
            "PEFT adapters injected in the model."
        )
    return found


def get_model_status(model: Any) -> TunerModelStatus:
    """The status of a PeftModel, or of any module with adapters in it, as one.

    Raises:
        ValueError, TypeError: see ``get_layer_status``.
    """
    from .peft_api import PeftModel

    peft_types: dict[str, str] = {}
    adapter_model_type = "None"
    if isinstance(model, PeftModel):
        tuner = _inner(model, "get_model_status")
        base_model_type = type(model.get_base_model()).__name__
        adapter_model_type = type(tuner).__name__
        peft_types = {
            name: str(getattr(c.peft_type, "value", c.peft_type)) for name, c in tuner.peft_config.items()
        }
    else:
        base_model_type = type(model).__name__ if hasattr(model, "get_input_embeddings") else "other"
    trainable, total = PeftModel.get_nb_trainable_parameters(model)
    layers = get_layer_status(model)

    grads: dict[str, list[bool | Irregular]] = collections.defaultdict(list)
    devices: dict[str, set[str]] = collections.defaultdict(set)
    for layer in layers:
        for name, value in layer.requires_grad.items():
            grads[name].append(value)
        for name, kinds in layer.devices.items():
            devices[name].update(kinds)
    active = _agreed([tuple(layer.active_adapters) for layer in layers])
    return TunerModelStatus(
        base_model_type=base_model_type,
        adapter_model_type=adapter_model_type,
        peft_types=peft_types,
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_agreed([layer.enabled for layer in layers]),
        active_adapters="irregular" if active == "irregular" else list(active),
        merged_adapters=_merged(layers),
        requires_grad={name: _agreed(values) for name, values in grads.items()},
        available_adapters=sorted({name for layer in layers for name in layer.available_adapters}),
        devices={name: sorted(kinds) for name, kinds in devices.items()},
        quantization_backend=_agreed([layer.quantization_backend for layer in layers]),
    )


def quantization_backend(layer: Any) -> str | None:
    """How the base of an adapted layer is quantised; an attribute of that name on the layer wins."""
    told = getattr(layer, "quantization_backend", None)
    if told is not None:
        return getattr(told, "backend_name", None) or str(told)
    if not isinstance(layer, BaseTunerLayer):
        return None
    base = layer.get_base_layer()
    if isinstance(base, QuantizedModule):
        return f"qlora_engine {base.spec.format}"
    kind = is_bnb_linear(base)
    return None if kind is None else f"bnb {kind}"


def _inner(model: Any, caller: str) -> Any:
    from .attach import LoraModel
    from .peft_api import PeftModel

    if not isinstance(model, PeftModel):
        return model
    if not isinstance(model.base_model, LoraModel):
        raise TypeError(f"{caller}() got an invalid PeftModel instance; it has no tuner in it.")
    return model.base_model


def _layer_status(name: str, module: Any) -> TunerLayerStatus:
    grads: dict[str, list[bool]] = collections.defaultdict(list)
    devices: dict[str, set[str]] = collections.defaultdict(set)
    for attribute in (*module.adapter_layer_names, *module.other_param_names):
        for adapter, parameters in _parameters(getattr(module, attribute)):
            devices[adapter].update(p.device.type for p in parameters)
            if attribute in module.adapter_layer_names:
                grads[adapter].extend(p.requires_grad for p in parameters)
    return TunerLayerStatus(
        name=name,
        module_type=repr(module).partition("(")[0],
        enabled=not module.disable_adapters,
        active_adapters=list(module.active_adapters),
        merged_adapters=list(module.merged_adapters),
        requires_grad={
            adapter: values[0] if len(set(values)) == 1 else "irregular"
            for adapter, values in grads.items()
            if values
        },
        available_adapters=sorted(module._get_available_adapters()),
        devices={adapter: sorted(kinds) for adapter, kinds in devices.items() if kinds},
        quantization_backend=quantization_backend(module),
    )


def _parameters(container: Any) -> list[tuple[str, list[nn.Parameter]]]:
    """The parameters by adapter that an attribute of a layer holds; none if it holds something else."""
    if isinstance(container, nn.ModuleDict):
        return [(adapter, list(module.parameters())) for adapter, module in container.items()]
    if isinstance(container, nn.ParameterDict):
        return [(adapter, [parameter]) for adapter, parameter in container.items()]
    return []


def _agreed(values: list[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else "irregular"


def _merged(layers: list[TunerLayerStatus]) -> list[str] | Irregular:
    """What is merged wherever it is available; layers have different adapters."""
    merged = {name for layer in layers for name in layer.merged_adapters}
    for layer in layers:
        if merged & set(layer.available_adapters) - set(layer.merged_adapters):
            return "irregular"
    return sorted(merged)
