"""The weights of a checkpoint, however stored: dense, in bitsandbytes' layouts, or in the native one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quant import QuantSpec
from quant.bnb_format import BNB_SUFFIXES, BNB_TYPES, dequantize_int8, from_bnb, is_bnb
from quant.linear_op import TENSOR_NAMES, as_quantized
from quant.tensor import QuantizedTensor

from .architecture import Architecture, ModuleInfo
from .checkpoint import Checkpoint
from .errors import InputError
from .expert_layout import Slab, expert_module, expert_slabs
from .loading import NATIVE_METHOD, NATIVE_VERSION, native_specs, newer_than_known
from .safetensors_io import DTYPE_OF_STORED, FLOAT_DTYPES, TensorEntry


@dataclass(frozen=True)
class StoredWeight:
    """One weight of the model, as it lies on the disk.

    Attributes:
        name: Of the dense tensor, as the model's own checkpoint would have it.
        entries: Its tensors, by what follows the common part of their names.
        method: "dense", "bnb", "int8" or "native".
        module: Its module; None for a parameter of none that is known.
        spec: How a native one is quantised.
        dtype: torch's name of the dtype it stands for.
    """

    name: str
    entries: Mapping[str, TensorEntry]
    method: str
    module: ModuleInfo | None
    spec: QuantSpec | None
    dtype: str

    @property
    def is_quantised(self) -> bool:
        """Whether it is stored as codes."""
        return self.method != "dense"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense tensor on disk: a Conv1D's is (in, out)."""
        if self.method == "dense":
            return self.entries[self.name].shape
        assert self.module is not None
        return self.module.shape[::-1] if self.module.kind == "conv1d" else self.module.shape

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def quantized(self) -> QuantizedTensor:
        """The codes, (out, in).

        Raises:
            InputError: broken tensors, or LLM.int8 rows that no block fits.
        """
        assert self.module is not None
        tensors = {name: entry.read() for name, entry in self.entries.items()}
        dtype = getattr(torch, self.dtype)
        try:
            if self.method == "native":
                assert self.spec is not None
                ordered = [tensors.get(f"{self._stored}.{name}") for name in TENSOR_NAMES]
                return as_quantized(ordered, self.spec, torch.Size(self.module.shape), dtype)
            q = from_bnb(self.name, tensors, dtype=dtype)
        except (ValueError, TypeError, RuntimeError) as error:
            raise InputError(f"'{self.name}' cannot be read: {error}") from error
        if tuple(q.shape) != tuple(self.module.shape):
            raise InputError(
                f"'{self.name}' holds a weight {tuple(q.shape)}, config.json calls for {self.module.shape}"
            )
        return q

    @property
    def _stored(self) -> str:
        return self.name.removesuffix(".weight")

    def read(self) -> Tensor:
        """The dense weight as it would lie on the disk, float32, in memory of its own.

        Raises:
            InputError: broken tensors.
        """
        if self.method == "dense":
            tensor = self.entries[self.name].read()
            return tensor.float() if tensor.dtype != torch.float32 else tensor
        if self.method == "int8":
            tensors = {name: entry.read() for name, entry in self.entries.items()}
            scb = next(tensor for name, tensor in tensors.items() if name.endswith(".SCB"))
            try:
                weight = dequantize_int8(tensors[self.name], scb, torch.float32)
            except (ValueError, KeyError) as error:
                raise InputError(f"'{self.name}' cannot be read: {error}") from error
        else:
            weight = self.quantized().dequantize(torch.float32)
        is_conv1d = self.module is not None and self.module.kind == "conv1d"
        return weight.t().contiguous() if is_conv1d else weight


@dataclass(frozen=True)
class DiskBase:
    """A checkpoint with its weights by parameter name.

    Attributes:
        weights: Parameter name in the model -> what is stored; tied names of one weight have one entry.
        kept: Tensors that belong to no known parameter; they are copied.
        fused: Parameters that are put together from several tensors, or split; they are copied, too.
        slabs: Where in a stack of experts a tensor belongs, by its name on disk.
        experts: Stacked Parameter -> its quantised experts in order.
        method: "dense", "bnb" or "native".
        dtype: torch's name of the model's dtype.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    weights: dict[str, StoredWeight]
    kept: tuple[TensorEntry, ...]
    fused: frozenset[str]
    method: str
    dtype: str
    slabs: Mapping[str, Slab] = field(default_factory=dict)
    experts: Mapping[str, tuple[StoredWeight, ...]] = field(default_factory=dict)

    @classmethod
    def open(cls, checkpoint: Checkpoint, architecture: Architecture) -> DiskBase:
        """Sort the tensors of ``checkpoint``.

        Raises:
            InputError: quantised by something else, or a broken quantization_config.
        """
        settings = checkpoint.config.get("quantization_config")
        method, specs = _method(checkpoint, settings)
        dtype = _dtype_of(checkpoint)
        groups = _groups(checkpoint, specs)
        homes = architecture.homes(groups)
        modules = {module.path: module for module in architecture.modules}
        weights: dict[str, StoredWeight] = {}
        kept: list[TensorEntry] = []
        experts: dict[str, dict[str, StoredWeight]] = {}
        for name, (kind, entries) in groups.items():
            home = homes.get(name)
            path = name.removesuffix(".weight")
            if kind == "native" and (found := expert_module(architecture, path)) is not None:
                stack, module = found
                weight = StoredWeight(name, entries, kind, module, specs.get(path), dtype)
                experts.setdefault(stack, {})[path] = weight
                continue
            if home is None or home.converted:
                if kind != "dense":
                    raise InputError(f"'{name}' is quantised, but is no weight of {architecture.class_name}")
                kept += entries.values()
                continue
            wanted = architecture.parameters.get(home.parameter)
            if kind == "dense" and wanted is not None and entries[name].shape != wanted:
                raise InputError(
                    f"'{name}' has shape {entries[name].shape}, {architecture.class_name} has {wanted}; is "
                    "it quantised, with a damaged quant_state?"
                )
            own_module = modules.get(home.parameter.removesuffix(".weight"))
            if kind != "dense" and (own_module is None or not own_module.shape):
                raise InputError(f"'{name}' is quantised, but belongs to no Linear, Conv1D or Embedding")
            own = DTYPE_OF_STORED.get(entries[name].dtype, dtype) if kind == "dense" else dtype
            spec = (
                specs.get(name.removesuffix(".weight"))
                if kind == "native"
                else _bnb_spec(name, kind, entries)
            )
            weights[home.parameter] = StoredWeight(name, entries, kind, own_module, spec, own)
        fused = frozenset(home.parameter for home in homes.values() if home.converted)
        shapes = {name: entries[name].shape for name, (kind, entries) in groups.items() if kind == "dense"}
        slabs = expert_slabs(architecture, shapes)
        stacks = {stack: _in_order(architecture, stack, found) for stack, found in experts.items()}
        return cls(checkpoint, architecture, weights, tuple(kept), fused, method, dtype, slabs, stacks)

    def tied_with(self, parameter: str) -> set[str]:
        """All names of the parameter that ``parameter`` is, itself included."""
        roots = getattr(self.architecture._model, "all_tied_weights_keys", None) or {}
        root = roots.get(parameter, parameter)
        return {root, parameter, *(name for name, source in roots.items() if source == root)}

    def find(self, parameter: str) -> StoredWeight | None:
        """The stored weight of a parameter, perhaps under the name of one that it is tied to."""
        names = [parameter, *sorted(self.tied_with(parameter))]
        return next((self.weights[name] for name in names if name in self.weights), None)


def _in_order(
    architecture: Architecture, stack: str, found: Mapping[str, StoredWeight]
) -> tuple[StoredWeight, ...]:
    paths = [f"{stack}.{number}" for number in range(architecture.parameters[stack][0])]
    if lacking := [path for path in paths if path not in found]:
        raise InputError(f"'{lacking[0]}' is not quantised, and other experts of its stack are")
    return tuple(found[path] for path in paths)


def _method(checkpoint: Checkpoint, settings: Any) -> tuple[str, dict[str, QuantSpec]]:
    if settings is None:
        return "dense", {}
    name = settings.get("quant_method") if isinstance(settings, dict) else repr(settings)
    if name == "bitsandbytes":
        return "bnb", {}
    if name == NATIVE_METHOD:
        if newer_than_known(settings):
            raise InputError(
                f"{checkpoint.folder} has version {settings['version']} of the native format; known: "
                f"{NATIVE_VERSION}"
            )
        return "native", native_specs(settings)
    raise InputError(
        f"{checkpoint.folder} is quantised with {name!r:.60}; readable: bitsandbytes, {NATIVE_METHOD} or "
        "dense"
    )


def _groups(
    checkpoint: Checkpoint, specs: Mapping[str, QuantSpec]
) -> dict[str, tuple[str, dict[str, TensorEntry]]]:
    """Name of the dense tensor -> how it is stored and its tensors, in natural order."""
    tensors = checkpoint.tensors
    groups: dict[str, tuple[str, dict[str, TensorEntry]]] = {}
    owner: dict[str, str] = {}
    for path in specs:
        found = {
            f"{path}.{part}": tensors[f"{path}.{part}"]
            for part in TENSOR_NAMES
            if f"{path}.{part}" in tensors
        }
        if f"{path}.codes" not in found:
            raise InputError(f"{checkpoint.folder} lacks '{path}.codes', which config.json calls for")
        groups[f"{path}.weight"] = ("native", found)
        owner |= dict.fromkeys(found, f"{path}.weight")
    for name in tensors:
        if name.endswith(".weight") and is_bnb(name, tensors):
            parts = [other for other in _belonging(name) if other in tensors]
            kind = "int8" if any(part.endswith(".SCB") for part in parts) else "bnb"
            groups[name] = (kind, {part: tensors[part] for part in (name, *parts)})
            owner |= dict.fromkeys((name, *parts), name)
    result: dict[str, tuple[str, dict[str, TensorEntry]]] = {}
    for name, entry in tensors.items():
        if name not in owner:
            result[name] = ("dense", {name: entry})
        elif owner[name] not in result:
            result[owner[name]] = groups[owner[name]]
    return result


def _belonging(name: str) -> Iterable[str]:
    """Names that tensors beside the bitsandbytes weight ``name`` may have."""
    module = name.removesuffix("weight")
    return (*(name + suffix for suffix in BNB_SUFFIXES), f"{module}SCB", f"{module}weight_format")


def _bnb_spec(name: str, kind: str, entries: Mapping[str, TensorEntry]) -> QuantSpec | None:
    """What a 4-bit weight's quant_state says; None for weights that have none."""
    state = next((entry for part, entry in entries.items() if ".quant_state." in part), None)
    if kind != "bnb" or state is None:
        return None
    try:
        values = json.loads(bytes(state.read().numpy()).decode())
        fmt = BNB_TYPES[values["quant_type"]]
        return QuantSpec(fmt, values["blocksize"], double_quant="nested_blocksize" in values)
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"'{name}' has a broken bitsandbytes quant_state: {error!r}") from error


def _dtype_of(checkpoint: Checkpoint) -> str:
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if named in ("float16", "bfloat16", "float32"):
        return str(named)
    counts = dict.fromkeys(FLOAT_DTYPES, 0)
    for name, entry in checkpoint.tensors.items():
        if entry.dtype in counts and not name.endswith(tuple(BNB_SUFFIXES)):
            counts[entry.dtype] += entry.numel
    return DTYPE_OF_STORED[max(counts, key=lambda key: counts[key])]
