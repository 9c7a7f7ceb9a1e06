"""A folder that ``loftq-init`` wrote, read a layer at a time: the base as it is stored, and its factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from quant import QuantizedTensor, QuantSpec
from quant.bnb_format import from_bnb, is_bnb
from quant.linear_op import TENSOR_NAMES, as_quantized

from .adapter_io import ADAPTER_WEIGHTS_FILE, factor_names
from .checkpoint import Checkpoint
from .errors import InputError
from .expert_adapter import of_expert, stack_paths
from .files import read_json_object
from .report import LayerReport
from .safetensors_io import TensorEntry, read_header


def oriented(weight: Tensor, kind: str) -> Tensor:
    """(out, in), as the solver sees it: a Conv1D's weight lies transposed on disk."""
    return weight.T.contiguous() if kind == "conv1d" else weight


@dataclass(frozen=True)
class StoredRun:
    """The output of a run.

    Attributes:
        checkpoint: The base.
        factors: Tensors of the adapter.
        stacks: Adapted stack of experts -> the path of its factors.
    """

    checkpoint: Checkpoint
    factors: Mapping[str, TensorEntry]
    stacks: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, out: Path, adapter: str = "loftq_init") -> StoredRun:
        """The folder ``out`` with the adapter in its folder ``adapter``.

        Raises:
            InputError: something is missing or malformed.
        """
        path = out / adapter / ADAPTER_WEIGHTS_FILE
        if not path.is_file():
            raise InputError(f"{out / adapter} has no {ADAPTER_WEIGHTS_FILE}")
        names = read_json_object(out / adapter / "adapter_config.json").get("target_parameters") or []
        return cls(Checkpoint.open(out), read_header(path)[0], stack_paths(map(str, names)))

    def quantized(self, layer: LayerReport, tensor: str) -> QuantizedTensor | None:
        """Codes and scales, shape (out, in); None where the base was saved dequantised.

        Args:
            layer: What the report says of it.
            tensor: Name of its weight on disk before (in bitsandbytes' layout it keeps that name).
        """
        stored = self.checkpoint.tensors
        if f"{layer.name}.codes" in stored:
            names = [f"{layer.name}.{part}" for part in TENSOR_NAMES]
            parts = [stored[name].read() if name in stored else None for name in names]
            spec = QuantSpec(layer.format, layer.block_size, layer.double_quant)
            return as_quantized(parts, spec, torch.Size(layer.shape), torch.float32)
        if is_bnb(tensor, stored):
            names = [name for name in stored if name == tensor or name.startswith(f"{tensor}.")]
            return from_bnb(tensor, {name: stored[name].read() for name in names})
        return None

    def base(self, layer: LayerReport, tensor: str) -> Tensor:
        """The base without its adapter, dequantised, float32 (out, in).

        Raises:
            InputError: it is not there.
        """
        quantized = self.quantized(layer, tensor)
        if quantized is not None:
            return quantized.dequantize(torch.float32).reshape(layer.shape)
        return oriented(self._read(self.checkpoint.tensors, tensor).float(), layer.kind)

    def correction(self, layer: LayerReport) -> tuple[Tensor, Tensor] | None:
        """A (rank, in) and B (out, rank), float32; None for a layer without an adapter.

        Raises:
            InputError: they are not there.
        """
        if not layer.rank:
            return None
        stack, _, number = layer.name.rpartition(".")
        if stack in self.stacks:
            names = factor_names(self.stacks[stack], "linear")
            A, B = (self._read(self.factors, key).float() for key in names)
            return of_expert(A, B, int(number), layer.rank)
        A, B = (self._read(self.factors, key).float() for key in factor_names(layer.name, layer.kind))
        return (B.T, A.T) if layer.kind == "embedding" else (A, B)

    def _read(self, tensors: Mapping[str, TensorEntry], name: str) -> Tensor:
        if name not in tensors:
            raise InputError(f"{self.checkpoint.folder} lacks the tensor '{name}'")
        return tensors[name].read()
