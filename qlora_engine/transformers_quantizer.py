"""Teach transformers the native format: its ``from_pretrained`` of a folder that loftq-init wrote natively.

``transformers_hook`` registers it. ``qlora_engine.from_pretrained`` does not need it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .expert_stack import ExpertPlace, put_layer, settle_experts
from .loading import NATIVE_METHOD, empty_layer, native_config, native_specs, standing_at


class NativeConfig(QuantizationConfigMixin):
    """The quantization_config of the native format, as config.json has it."""

    def __init__(self, **values: Any) -> None:
        self.quant_method = NATIVE_METHOD  # type: ignore[assignment]
        self.specs = native_specs(values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, as it was read."""
        return native_config(self.specs)


class NativeQuantizer(HfQuantizer):
    """Puts empty QuantLinears into the model before its weights are read."""

    requires_calibration = True  # a stored model can be read; quantising on the fly is get_peft_model's

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        modules = dict(model.named_modules())
        for path, spec in self.quantization_config.specs.items():
            there = standing_at(modules, path)
            layer = empty_layer(path, there, spec, next(model.parameters()).dtype)
            put_layer(model, path, layer, there if isinstance(there, ExpertPlace) else None)
        settle_experts(model)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        settle_experts(model)  # loading has written down its conversions
        return model

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        """Bytes an element: the packed tensors are bytes."""
        return float(param.element_size())

    @property
    def is_trainable(self) -> bool:
        """Adapters on it can be trained."""
        return True

    def is_serializable(self, **kwargs: Any) -> bool:
        """Its state dict is the format."""
        return True
