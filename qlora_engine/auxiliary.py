"""Modules that train beside the adapters: in full (``modules_to_save``), or only some rows (trainable
tokens)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base_weight import dense_module, is_quantized
from .lora_layer import BASE_ONLY
from .tuner_layer import BaseTunerLayer, as_names, set_requires_grad_of

_NO_FORWARD = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
_MIXABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class AuxiliaryTrainingWrapper(nn.Module):
    """Stands in the place of a module and lets every adapter bring its own trained version of it.

    At most one adapter is active at a time. Unknown attributes are those of the version in use.

    Args:
        module_to_save: The module to wrap.
        adapter_name: The first adapter.
        kwargs: Of the subclass.

    Raises:
        TypeError: a container, or an adapted layer.
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    merged_adapters: list[str] = []  # noqa: RUF012 - never filled: nothing here merges but trainable tokens

    def __init__(self, module_to_save: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        if isinstance(module_to_save, (*_NO_FORWARD, BaseTunerLayer)):
            raise TypeError(f"{self._title} cannot be applied to modules of type {type(module_to_save)}")
        self._active_adapter: list[str] | str = [adapter_name]
        self._disable_adapters = False
        self._adapters: set[str] = set()
        self._wrap(module_to_save, adapter_name, **kwargs)
        self.update(adapter_name, **kwargs)

    _title = "training wrapper"

    def _wrap(self, module: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        """Register the wrapped module and the containers."""
        raise NotImplementedError

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        """Give ``adapter_name`` its own version."""
        raise NotImplementedError

    def _versions(self) -> Any:
        """Container of the trained weights by adapter name."""
        raise NotImplementedError

    @property
    def disable_adapters(self) -> bool:
        """Whether the original module is used."""
        return self._disable_adapters

    @property
    def active_adapter(self) -> list[str] | str:
        """As set."""
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """The active adapter, in a list of at most one."""
        return as_names(self._active_adapter)

    def _get_available_adapters(self) -> set[str]:
        return set(self._versions().keys())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_modules" not in self.__dict__:
                raise
        if self._disable_adapters or not self.active_adapters:
            return getattr(self.original_module, name)
        return self._attribute_in_use(name)

    def _attribute_in_use(self, name: str) -> Any:
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The active version's output; ``adapter_names`` chooses a version for every row of the batch."""
        names = kwargs.get("adapter_names")
        if names is not None and args and len(args[0]) != len(names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(args[0])} respectively."
            )
        kwargs.pop("adapter_names", None)
        if self.disable_adapters or any(name not in self._adapters for name in self.active_adapters):
            return self._forward_original(*args, **kwargs)
        if names is not None:
            return self._forward_mixed(*args, adapter_names=names, **kwargs)
        if not self.active_adapters:
            return self._forward_original(*args, **kwargs)
        return self._forward_version(self.active_adapters[0], *args, **kwargs)

    def _forward_original(self, *args: Any, **kwargs: Any) -> Any:
        return self.original_module(*args, **kwargs)

    def _forward_version(self, adapter: str, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def _forward_mixed(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        if not isinstance(self.original_module, _MIXABLE) and not is_quantized(self.original_module):
            names = ", ".join(cls.__name__ for cls in _MIXABLE)
            raise TypeError(f"Mixed batching is only supported for the following modules: {names}.")
        rows: list[Any] = [None] * len(x)
        for adapter in dict.fromkeys(adapter_names):
            index = [i for i, name in enumerate(adapter_names) if name == adapter]
            if adapter == BASE_ONLY:
                out = self.original_module(x[index], *args, **kwargs)
            else:
                out = self._forward_version(adapter, x[index], *args, **kwargs)
            for position, i in enumerate(index):
                rows[i] = out[position]
        return torch.stack(rows)

    def enable_adapters(self, enabled: bool) -> None:
        """Use the trained versions, or the original module."""
        self._disable_adapters = not enabled

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """Which of the names this wrapper would activate.

        Raises:
            ValueError: no name, or more than one that this wrapper knows.
        """
        if isinstance(adapter_name, str):
            return adapter_name
        if not adapter_name:
            raise ValueError("Please specify at least one adapter to set")
        known = [name for name in adapter_name if name in self._versions()]
        if len(known) > 1:
            raise ValueError(f"Only one adapter can be set at a time for {self}, got {len(known)}")
        return known[0] if known else None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter, or none with an empty list."""
        raise NotImplementedError

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the versions of these adapters train, or not."""
        for name in as_names(adapter_names):
            if name in self._versions():
                set_requires_grad_of(self._versions()[name], requires_grad)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Forget a version; activate the given adapter's, if it has one.

        Raises:
            ValueError: more than one new active adapter.
        """
        if adapter_name not in self._adapters:  # a tied one's versions may be gone with the other's
            return
        if new_active_adapters and len(new_active_adapters) > 1:
            raise ValueError(
                f"Attempted to set multiple ({new_active_adapters}) adapters at once for "
                f"{type(self).__name__}, which is not allowed."
            )
        self._adapters.discard(adapter_name)
        new = [
            name for name in new_active_adapters or [] if name != adapter_name and name in self._versions()
        ]
        if not new:
            self._active_adapter = []
        elif new[0] not in self.active_adapters:
            self.set_adapter(new[0])
        self._forget(adapter_name)

    def _forget(self, adapter_name: str) -> None:
        del self._versions()[adapter_name]


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """Every adapter has its own full, trainable copy of the module; a quantised module is copied dense."""

    adapter_layer_names: tuple[str, ...] = ("modules_to_save",)
    _title = "modules_to_save"

    def __init__(
        self, module_to_save: nn.Module, adapter_name: str, tied_module: nn.Module | None = None
    ) -> None:
        super().__init__(module_to_save, adapter_name, tied_module=tied_module)

    def _wrap(self, module: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()

    def _versions(self) -> Any:
        return self.modules_to_save

    def _attribute_in_use(self, name: str) -> Any:
        active = self.active_adapters[0]
        if active in self.modules_to_save:
            return getattr(self.modules_to_save[active], name)
        return super()._attribute_in_use(name)

    def _forward_version(self, adapter: str, *args: Any, **kwargs: Any) -> Any:
        return self.modules_to_save[adapter](*args, **kwargs)

    def update(self, adapter_name: str, tied_module: nn.Module | None = None, **kwargs: Any) -> None:
        """Copy the original for ``adapter_name``; with ``tied_module``, a Linear that shares its weight."""
        self._adapters.add(adapter_name)
        if adapter_name not in self.modules_to_save:
            if tied_module is not None:
                weight: Any = tied_module.weight
                with torch.device("meta"):
                    version: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                version.weight = weight
            elif is_quantized(self.original_module):
                version = dense_module(self.original_module)
            else:
                version = copy.deepcopy(self.original_module)
                _own_hook(version)
            self.modules_to_save[adapter_name] = version
        for parameter in self.original_module.parameters():
            parameter.requires_grad_(False)
        if adapter_name == self.active_adapter:
            set_requires_grad_of(self.modules_to_save[adapter_name], True)

    def enable_adapters(self, enabled: bool) -> None:
        """Use the trained versions (the active one trains), or the original module (none trains)."""
        super().enable_adapters(enabled)
        for name, module in self.modules_to_save.items():
            if not enabled or name in self.active_adapters:
                set_requires_grad_of(module, enabled)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter's version, trainable unless ``inference_mode``; none with an empty list.

        Raises:
            ValueError: several names, or an unknown one.
        """
        names = as_names(adapter_names)
        if len(names) > 1:
            raise ValueError(f"Attempted to set multiple ({names}) adapters at once for modules_to_save.")
        if names and names[0] not in self._adapters:
            raise ValueError(f"Adapter {names[0]} not found in {self._adapters}")
        for active in self.active_adapters:
            set_requires_grad_of(self.modules_to_save[active], False)
        self._active_adapter = names[0] if names else []
        if names:
            set_requires_grad_of(self.modules_to_save[names[0]], not inference_mode)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Key in a file -> key in this module's state dict."""
        if adapter_name not in self._adapters:
            return {}
        keys = self.modules_to_save[adapter_name].state_dict()
        return {key: f"modules_to_save.{adapter_name}.{key}" for key in keys}

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a file holds of this module, picked from its state dict."""
        return {key: state_dict[own] for key, own in self.adapter_state_dict_load_map(adapter_name).items()}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module that stays when adapters are taken off: the active version, else the original."""
        if not self.active_adapters:
            return self.original_module
        module = self.modules_to_save[self.active_adapters[0]]
        if isinstance(module, BaseTunerLayer):
            if merge:
                module.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return module.get_base_layer()  # type: ignore[no-any-return]
        return module


def _own_hook(module: nn.Module) -> None:
    """Give a copied module its own accelerate hook: a copied one still points at the original's."""
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is None:
        return
    import inspect

    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    wanted = inspect.signature(type(hook).__init__).parameters
    new_hook = type(hook)(**{key: value for key, value in vars(hook).items() if key in wanted})
    remove_hook_from_module(module)
    add_hook_to_module(module, new_hook)
