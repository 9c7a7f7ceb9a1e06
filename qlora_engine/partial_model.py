"""A model on the meta device whose weights are read from a checkpoint folder part by part.

Which tensor on disk becomes which parameter, and how stacked or split weights (the experts of transformers 5)
are converted, is transformers' own knowledge: its renaming rules and converters are asked.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_engine.architecture import read_architecture
from qlora_engine.checkpoint import Checkpoint
from qlora_engine.errors import InputError


@dataclass
class _Unit:
    """Tensors on disk that become one or more parameters together."""

    first: str
    converter: Any = None
    sources: list[tuple[str, str | None]] = field(default_factory=list)  # name on disk, pattern it matched


class PartialModel:
    """A checkpoint as a model without weights, and the means to load and drop some of them.

    Args:
        folder: Checkpoint in Hugging Face layout, safetensors.
        dtype: Of the floating-point weights once loaded.
        trust_remote_code: Let Python files of the folder run.
        quantised: Accept a quantised checkpoint; whoever asks for one replaces the quantised modules.

    Attributes:
        model: In eval mode; parameters on the meta device, buffers real.
        names: Tensor's module path on disk -> layer name in memory, where they differ.
        homes: Modules that are looked up here before they are in ``model``, by the path as it was built:
            for whoever wraps them before their weights are read.

    Raises:
        InputError: not a checkpoint, an unknown model, one that is quantised already, or a lacking tensor.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
        quantised: bool = False,
    ) -> None:
        from accelerate import init_empty_weights

        self.folder = folder
        self.dtype = dtype
        self._checkpoint = Checkpoint.open(folder)
        if "quantization_config" in self._checkpoint.config and not quantised:
            raise InputError(f"{folder} is quantised already; calibrate the model it was made from")
        self._known = known = read_architecture(
            folder, self._checkpoint.config, trust_remote_code=trust_remote_code
        )
        with init_empty_weights(include_buffers=False):
            self.model: Any = type(known._model)(known._model.config)
        self.model.eval()
        self.model.requires_grad_(False)
        self.homes: dict[str, nn.Module] = {}
        self._persistent = frozenset(self.model.state_dict())
        self._units = self._find_units()
        self.names = self._names_on_disk()

    def _home(self, path: str) -> nn.Module:
        found: nn.Module = self.homes[path] if path in self.homes else self.model.get_submodule(path)
        return found

    def parameters_of(self, keys: Iterable[str]) -> dict[str, str]:
        """Names in memory of the parameters that tensors called so on disk become; others keep theirs."""
        keys = list(keys)
        homes = self._known.homes(keys)
        return {key: homes[key].parameter if key in homes else key for key in keys}

    def _find_units(self) -> dict[str, _Unit]:
        """Parameter or buffer name -> what it is read from."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        rules = get_model_conversion_mapping(self.model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        state = self.model.state_dict()
        units: dict[str, _Unit] = {}
        for key in self._checkpoint.tensors:
            name, pattern = rename_source_key(key, renamings, converters, self.model.base_model_prefix, state)
            if name not in state and key in state:  # named as in memory already
                name, pattern = key, None
            if name not in state:
                continue  # what the model does not use
            converter: Any = None if pattern is None else by_pattern[pattern]
            unit = units.setdefault(name, _Unit(name, converter))
            unit.sources.append((key, pattern))
            for other in () if converter is None else converter.target_patterns[1:]:
                units.setdefault(name.replace(converter.target_patterns[0], other), unit)
        return units

    def _names_on_disk(self) -> dict[str, str]:
        names: dict[str, str] = {}
        for unit in {id(unit): unit for unit in self._units.values()}.values():
            counts: dict[str | None, int] = {}
            for key, pattern in unit.sources:
                index = counts.get(pattern, 0)
                counts[pattern] = index + 1
                path = key.removesuffix(".weight")
                if unit.converter is None:
                    names[path] = unit.first.removesuffix(".weight")
                elif any(type(step).__name__ == "MergeModulelist" for step in unit.converter.operations):
                    names[path] = f"{unit.first.removesuffix('.weight')}.{index}"
        return {path: name for path, name in names.items() if path != name}

    def load(self, names: Iterable[str], device: torch.device | str = "cpu") -> None:
        """Read parameters and buffers by name; tied ones follow the one that is stored.

        Raises:
            InputError: the checkpoint lacks one, or has it in another shape.
        """
        wanted = set(names)
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        persistent = self._persistent
        missing = []
        for name in sorted(wanted):
            if name not in persistent:
                holder, _, leaf = name.rpartition(".")
                self._set(name, getattr(self._home(holder), leaf).to(device))
            elif name not in self._units and name not in tied:
                missing.append(name)
        if missing:
            raise InputError(
                f"{self.folder} lacks {len(missing)} tensors of the model, among them {missing[0]}"
            )
        units = {id(self._units[name]): self._units[name] for name in wanted & self._units.keys()}
        for unit in units.values():
            for name, tensor in self._read(unit).items():
                if name in wanted:
                    self._set(name, tensor.to(device))
        for name in wanted & tied.keys() - self._units.keys():
            self._tie(name, tied[name])

    def _tie(self, name: str, source: str) -> None:
        holder, _, leaf = source.rpartition(".")
        shared = getattr(self._home(holder), leaf)
        if shared.is_meta:
            raise AssertionError(f"{name} is tied to {source}, which is not loaded")
        holder, _, leaf = name.rpartition(".")
        setattr(self._home(holder), leaf, shared)

    def _read(self, unit: _Unit) -> dict[str, Tensor]:
        entries = self._checkpoint.tensors
        if unit.converter is None:
            return {unit.first: self._cast(entries[unit.sources[0][0]].read())}
        converter = copy.deepcopy(unit.converter)
        for key, pattern in unit.sources:
            converter.add_tensor(unit.first, key, pattern, self._cast(entries[key].read()))
        made = converter.convert(unit.first, model=self.model, config=self.model.config)
        made = made[0] if isinstance(made, tuple) else made  # transformers 5.0 gives its errors beside it
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _set(self, name: str, tensor: Tensor) -> None:
        holder, _, leaf = name.rpartition(".")
        module = self._home(holder)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
            return
        if (expected := getattr(module, leaf).shape) != tensor.shape:
            raise InputError(
                f"{self.folder}: {name} is {tuple(tensor.shape)}, the model expects {tuple(expected)}"
            )
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def drop(self, names: Iterable[str]) -> None:
        """Free parameters by name; buffers stay."""
        for name in names:
            holder, _, leaf = name.rpartition(".")
            module = self._home(holder)
            held = module._parameters.get(leaf)
            if held is not None:
                module._parameters[leaf] = nn.Parameter(held.to("meta"), requires_grad=False)
