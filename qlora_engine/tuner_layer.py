"""What every adapted layer keeps: its adapters by name, which of them are active, merged and trainable."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from .base_weight import dense_weight, device_and_dtype, store_weight
from .config import PeftWarning

_CONTAINERS = (nn.ModuleDict, nn.ParameterDict)


def as_names(adapter_names: str | Sequence[str]) -> list[str]:
    """One adapter name or several, as a list."""
    return [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)


def set_requires_grad_of(item: nn.Module | nn.Parameter | Tensor, value: bool) -> None:
    """Set ``requires_grad`` on a parameter or on all floating-point parameters of a module."""
    if isinstance(item, nn.Module):
        for parameter in item.parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(value)
    else:
        item.requires_grad_(value)


class BaseTunerLayer:
    """Mixin of layers that wrap a ``base_layer``; the attribute names are PEFT's.

    Attributes:
        adapter_layer_names: Attributes that hold weights by adapter name (ModuleDict or ParameterDict).
        other_param_names: Attributes that hold anything else by adapter name.
        merged_adapters: Names that are in the base weight now, in the order of merging.
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    # Adapter -> containers whose weights its method keeps frozen; replaced on instances, never changed in
    # place.
    frozen_peft_weight_names: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    _disable_adapters: bool = False
    _active_adapter: str | list[str] = "default"
    merged_adapters: list[str]
    # PEFT's: who reads a base that another library quantised. Set, it is what ``status`` tells of the layer.
    quantization_backend: Any = None
    base_layer: nn.Module
    # Whether forward() casts its input to the adapter's dtype.
    cast_input_dtype_enabled: bool = True

    def get_base_layer(self) -> Any:
        """The innermost wrapped layer."""
        layer: Any = self
        while hasattr(layer, "base_layer"):
            layer = layer.base_layer
        return layer

    def get_base_weight(self) -> Tensor:
        """The base weight, dense, in the base layer's own orientation; dequantised where it is quantised."""
        return dense_weight(self.get_base_layer())

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Replace the base weight; a quantised base is quantised again with its own spec."""
        store_weight(self.get_base_layer(), weight_data)

    @property
    def weight(self) -> Tensor:
        """The base layer's ``weight``, which model code reads for its dtype and device."""
        return cast(Tensor, self.get_base_layer().weight)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's ``bias``."""
        return cast("Tensor | None", self.get_base_layer().bias)

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged into the base weight."""
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        """Whether forward() ignores all adapters; see ``enable_adapters``."""
        return self._disable_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """As it was set; see ``set_adapter``."""
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """The active names as a list."""
        return as_names(self._active_adapter)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the base weight."""
        raise NotImplementedError(f"{type(self).__name__} cannot be merged")

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again."""
        raise NotImplementedError(f"{type(self).__name__} cannot be unmerged")

    def _containers(self) -> Iterator[Any]:
        for name in self.adapter_layer_names:
            yield getattr(self, name)

    def _get_available_adapters(self) -> set[str]:
        names: set[str] = set()
        for container in self._containers():
            if isinstance(container, _CONTAINERS):
                names.update(container.keys())
        return names

    def _all_available_adapter_names(self) -> list[str]:
        names: set[str] = set()
        for attribute in self.adapter_layer_names + self.other_param_names:
            names.update(getattr(getattr(self, attribute), "keys", tuple)())
        return sorted(names)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters active and trainable (unless ``inference_mode``), all others neither."""
        names = as_names(adapter_names)
        for attribute in self.adapter_layer_names:
            for name, item in getattr(self, attribute).items():
                trains = name in names and not inference_mode
                set_requires_grad_of(item, trains and not self._stays_frozen(attribute, name))
        self._active_adapter = names

    def _stays_frozen(self, attribute: str, adapter_name: str) -> bool:
        return attribute in self.frozen_peft_weight_names.get(adapter_name, ())

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the weights of these adapters train, or not, active or not."""
        names = set(as_names(adapter_names))
        for attribute in self.adapter_layer_names:
            for name, item in getattr(self, attribute).items():
                if name in names:
                    set_requires_grad_of(item, requires_grad and not self._stays_frozen(attribute, name))

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters of the layer on (the active ones train again) or off (none trains)."""
        if enabled:
            self.set_adapter(self.active_adapters)
        else:
            for container in self._containers():
                for item in container.values():
                    set_requires_grad_of(item, False)
        self._disable_adapters = not enabled

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. If it was the only active one, the first remaining name becomes active."""
        for attribute in self.adapter_layer_names + self.other_param_names:
            container = getattr(self, attribute)
            if adapter_name in container:
                del container[adapter_name]
        if adapter_name in self.frozen_peft_weight_names:
            del self.frozen_peft_weight_names[adapter_name]  # type: ignore[attr-defined]
        if adapter_name not in self.active_adapters:
            return
        still_active = [name for name in self.active_adapters if name != adapter_name]
        if still_active:
            self.set_adapter(still_active)
            return
        remaining = self._all_available_adapter_names()
        if not remaining:
            self.set_adapter([])
            return
        warnings.warn(
            f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to "
            f"{remaining[0]}.",
            stacklevel=2,
        )
        self.set_adapter(remaining[0])

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None, *, keep_dtype: bool = False
    ) -> None:
        """Put this adapter (only this one) on the base weight's device, in its dtype if that is a float."""
        base_device, base_dtype = device_and_dtype(self.get_base_layer())
        device = device or base_device
        if device is None:
            return
        is_float = base_dtype is not None and (base_dtype.is_floating_point or base_dtype.is_complex)
        is_float = is_float and not keep_dtype
        for attribute in self.adapter_layer_names + self.other_param_names:
            container = getattr(self, attribute, None)
            if not isinstance(container, _CONTAINERS) or adapter_name not in container:
                continue
            if any(p.is_meta for p in container.parameters()):
                continue
            item = container[adapter_name]
            container[adapter_name] = item.to(device, dtype=base_dtype) if is_float else item.to(device)

    def _cast_input_dtype(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.cast_input_dtype_enabled or x.dtype == dtype:
            return x
        return x.to(dtype)

    def _get_embed_scale(self) -> Tensor | None:
        """The scalar by which some embeddings (Gemma's) multiply their rows, if there is one."""
        base = self.get_base_layer()
        scale = getattr(base, "embed_scale", None)
        if isinstance(scale, (int, float)):
            device, dtype = device_and_dtype(base)
            return torch.tensor(scale, device=device, dtype=dtype)
        if not isinstance(scale, Tensor):
            return None
        if scale.numel() != 1:
            warnings.warn(
                f"Found embed_scale attribute with shape {scale.shape}, expected scalar. "
                "Embedding scaling will not be applied.",
                PeftWarning,
                stacklevel=2,
            )
            return None
        return scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter's effect is a delta of the weight."""
        return False


def check_adapters_to_merge(module: BaseTunerLayer, adapter_names: list[str] | None = None) -> list[str]:
    """The names to merge now: those asked for (default: the active ones) that are not merged yet.

    Raises:
        TypeError: ``adapter_names`` is a string.
    """
    if adapter_names is None:
        adapter_names = module.active_adapters
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
    if module.merged:
        adapter_names = [name for name in adapter_names if name not in module.merged_adapters]
        if adapter_names:
            warnings.warn(
                f"Already following adapters were merged {','.join(module.merged_adapters)}. "
                f"You are now additionally merging {','.join(adapter_names)}.",
                stacklevel=3,
            )
        else:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
    return adapter_names
