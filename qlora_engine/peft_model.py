"""PeftModel: a model with adapters; its state, switching and counting, by delegation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils import PushToHubMixin

from quant.linear import QuantizedModule

from .adapters import lora_layers, tuner_layers, wrappers
from .attach import LoraModel
from .config import PEFT_TYPE_TO_PREFIX_MAPPING, LoraConfig, PeftConfig
from .peft_files import AdapterFiles
from .taken_for_peft import TakenForPeft
from .tuner_layer import BaseTunerLayer, as_names


def warn_about_name(adapter_name: str, config: PeftConfig) -> None:
    """Warn about a name that is part of the adapters' prefix: keys could not be told apart."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type)  # type: ignore[call-overload]
    if prefix and adapter_name in prefix:
        warnings.warn(
            f"Adapter name '{adapter_name}' should not be contained in the prefix '{prefix}'. "
            "This may lead to reinitialization of the adapter weights during loading.",
            stacklevel=3,
        )


class PeftModel(TakenForPeft, AdapterFiles, PushToHubMixin, nn.Module):
    """A model with adapters, and everything one does with them.

    Attributes that it does not have are the LoraModel's, and then the base model's.

    Args:
        model: The model to adapt, in place.
        peft_config: What to adapt and how.
        adapter_name: Name of the first adapter.
        autocast_adapter_dtype: Keep half-precision adapters in float32, as training needs.
        low_cpu_mem_usage: Make the adapter's weights on the meta device, to be loaded.

    Attributes:
        base_model: The LoraModel.
        peft_config: Configs by adapter name.
        active_adapter: Name (or names) of the active adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        self.active_adapter: str | list[str] = adapter_name
        self.peft_type = peft_config.peft_type
        self.special_peft_forward_args = {"adapter_names", "alora_offsets"}
        self._is_prompt_learning = False
        self._adapters_disabled = False
        self.base_model = LoraModel(
            model, {adapter_name: peft_config}, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
        )
        self._cast(adapter_name, autocast_adapter_dtype)
        # transformers 5 renamed the flag and warns about the old name; other models have neither.
        flags = ("is_activation_checkpointing", "is_gradient_checkpointing")
        if next((getattr(model, flag) for flag in flags if hasattr(type(model), flag)), True):
            self.prepare_model_for_gradient_checkpointing(model)
        base_config: Any = getattr(model, "config", None)
        if hasattr(base_config, "pretraining_tp"):  # simulated tensor parallelism would bypass the layers
            base_config.pretraining_tp = 1

    def _cast(self, adapter_name: str, autocast_adapter_dtype: bool) -> None:
        self.base_model._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype and self.peft_config[adapter_name].use_dora:
            # The magnitudes were rounded to the base's dtype; set them again so that DoRA starts as an
            # identity.
            for layer in lora_layers(self.base_model.model):
                layer.refresh_magnitude(adapter_name)

    # ---- state

    @property
    def peft_config(self) -> dict[str, Any]:
        """Configs by adapter name."""
        return self.base_model.peft_config

    @peft_config.setter
    def peft_config(self, value: dict[str, Any]) -> None:
        self.base_model.peft_config = value

    @property
    def active_adapters(self) -> list[str]:
        """The active names as a list."""
        return self.base_model.active_adapters

    @property
    def active_peft_config(self) -> Any:
        """The active adapter's config (the first one's, if several are active)."""
        return self.peft_config[as_names(self.active_adapter)[0]]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether adapters are enabled, or none is active."""
        return not self._adapters_disabled or not self.active_adapters

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names in any adapter's ``modules_to_save``; None if there are none."""
        names = {
            name for c in self.peft_config.values() for name in getattr(c, "modules_to_save", None) or ()
        }
        return names or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The base model's dtype."""
        return getattr(self.base_model, "dtype", None)

    def get_base_model(self) -> Any:
        """The adapted model itself, without the wrappers around it."""
        return self.base_model.model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not initialised yet: nothing to ask
                raise
            return getattr(self.base_model, name)

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> None:
        """Let the embeddings' output require gradients: checkpoints of frozen layers need one input that
        does."""
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        elif hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_(True))

    # ---- running

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if not self.has_active_enabled_adapter:
            yield
            return
        with self.base_model._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def _without_special(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in kwargs.items() if key not in self.special_peft_forward_args}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted model's forward; ``adapter_names`` gives every row of the batch its adapter."""
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return self.get_base_model()(*args, **self._without_special(kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted model's ``generate``; ``adapter_names`` as in ``forward``."""
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return self.get_base_model().generate(*args, **self._without_special(kwargs))

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is the base model; it nests, and restores what was on and what
        trains."""
        base = self.get_base_model()
        switched: list[Any] = [*tuner_layers(base), *wrappers(base)]
        states = {module.disable_adapters for module in switched}
        if len(states) > 1:
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are disabled. "
                "This is most likely unintentional. After exiting the disable_adapter context, all adapters "
                "will be enabled",
                stacklevel=3,
            )
        trains = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
        was_disabled = self._adapters_disabled
        try:
            self.base_model.disable_adapter_layers()
            self._adapters_disabled = True
            yield
        finally:
            if states != {True}:
                self.base_model.enable_adapter_layers()
            for parameter, requires_grad in trains:
                parameter.requires_grad = requires_grad
            self._adapters_disabled = was_disabled

    # ---- adapters

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make one adapter the active one, trainable unless ``inference_mode``.

        Raises:
            TypeError: several names.
            ValueError: no such adapter.
        """
        if not isinstance(adapter_name, str):
            raise TypeError(
                f"set_adapter of a PeftModel takes one name, got {adapter_name!r}; "
                "base_model.set_adapter takes several"
            )
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} not found.")
        self.active_adapter = adapter_name
        self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the weights of these adapters train, or not."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a new adapter; it is not active yet.

        Args:
            adapter_name: A name that is not taken.
            peft_config: What to adapt and how.
            low_cpu_mem_usage: Make its weights on the meta device, to be loaded.
            autocast_adapter_dtype: Keep it in float32 where the base has half precision.

        Raises:
            ValueError: the name is taken, or the config does not fit the adapters that are there; nothing of
                the new adapter is left then.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
        warn_about_name(adapter_name, peft_config)
        if peft_config.peft_type != self.peft_type:
            raise ValueError(
                "Cannot combine adapters with different peft types. "
                f"Found {self.peft_type} and {peft_config.peft_type}."
            )
        try:
            self.peft_config[adapter_name] = peft_config
            self.base_model.inject_adapter(
                self.get_base_model(), adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
            )
        except Exception:
            self._roll_back(adapter_name)
            raise
        self._cast(adapter_name, autocast_adapter_dtype)

    def _roll_back(self, adapter_name: str) -> None:
        """Take what was added of a new adapter away again, and layers that have no other adapter."""
        self.peft_config.pop(adapter_name, None)
        base = self.get_base_model()
        for name, module in list(base.named_modules()):
            if isinstance(module, BaseTunerLayer) and adapter_name in module._get_available_adapters():
                module.delete_adapter(adapter_name)
                if not module._get_available_adapters():
                    parent, _, child = name.rpartition(".")
                    setattr(base.get_submodule(parent), child, module.base_layer)
        for wrapper in wrappers(base):
            wrapper.delete_adapter(adapter_name, new_active_adapters=self.active_adapters)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter.

        Raises:
            ValueError: no such adapter, or it is merged.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        self.base_model.delete_adapter(adapter_name)
        if adapter_name in as_names(self.active_adapter) or len(self.active_adapters) == 1:
            self.active_adapter = self.base_model.active_adapter

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is a delta of the weights: always."""
        return all(layer.supports_lora_conversion(adapter_name) for layer in tuner_layers(self))

    # ---- counting and status

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable parameters, all parameters); a quantised weight counts as the dense one it stands
        for."""
        trainable = total = 0
        packed: set[int] = set()
        for module in self.modules():
            if isinstance(module, QuantizedModule):
                total += module.shape.numel()
                packed.update(id(p) for name, p in module.named_parameters(recurse=False) if name != "bias")
        for parameter in self.parameters():
            if id(parameter) in packed:
                continue
            count = parameter.numel() or getattr(parameter, "ds_numel", 0)
            if type(parameter).__name__ == "Params4bit":
                count *= 2 * parameter.element_size()
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    def print_trainable_parameters(self) -> None:
        """Print the counts and the share that trains."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def get_layer_status(self) -> Any:
        """See ``status.get_layer_status``."""
        from .status import get_layer_status

        return get_layer_status(self)

    def get_model_status(self) -> Any:
        """See ``status.get_model_status``."""
        from .status import get_model_status

        return get_model_status(self)
