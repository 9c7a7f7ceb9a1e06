"""Singular values of what a quantised layer lacks, without and with its adapter, from the files on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant import QuantSpec, quantize
from quant.bnb_format import from_bnb, is_bnb
from quant.linear_op import TENSOR_NAMES, as_quantized

from .adapter_io import ADAPTER_WEIGHTS_FILE, factor_names
from .architecture import read_architecture
from .checkpoint import Checkpoint
from .errors import InputError
from .report import LayerReport, RunReport
from .safetensors_io import read_header


@dataclass(frozen=True)
class Spectrum:
    """Singular values, largest first, each divided by ||W||_F: squares sum to the squared relative error.

    Attributes:
        label: Run and layer.
        before: Of W - Q, plain absmax quantisation in the layer's format.
        after: Of W - (Q + scaling * B @ A), what is stored.
    """

    label: str
    before: tuple[float, ...]
    after: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)


def spectra(
    model: Path, out: Path, names: Sequence[str], *, label: str = "", adapter: str = "loftq_init"
) -> list[Spectrum]:
    """Spectra of the named layers of a folder that ``loftq-init`` wrote.

    Args:
        model: The original checkpoint's folder.
        out: What was written.
        names: Module paths, as in the report.
        label: Put before each layer's name.
        adapter: Folder of the adapter inside ``out``.

    Raises:
        InputError: a layer is not in the report, or a tensor is missing.
    """
    report = {layer.name: layer for layer in RunReport.read(out).layers}
    original, stored = Checkpoint.open(model), Checkpoint.open(out)
    factors = read_header(out / adapter / ADAPTER_WEIGHTS_FILE)[0]
    homes = read_architecture(model, original.config).homes(original.tensors)
    entries = {home.parameter: original.tensors[key] for key, home in homes.items() if not home.converted}
    found = []
    for name in names:
        layer = report.get(name)
        if layer is None or f"{name}.weight" not in entries:
            raise InputError(f"{out} and {model} have no quantised layer '{name}' in common")
        entry = entries[f"{name}.weight"]
        weight = _oriented(entry.read().float(), layer)
        spec = QuantSpec(layer.format, layer.block_size, layer.double_quant)
        before = weight - quantize(weight, spec).dequantize()
        # The base is named after the tensor on disk in bitsandbytes' layout, after the module natively.
        after = weight - _base(stored, entry.name, name, layer)
        if layer.rank:
            A, B = (factors[key].read().float() for key in factor_names(name, layer.kind))
            if layer.kind == "embedding":
                A, B = B.T, A.T
            after = after - layer.scaling * B @ A
        norm = weight.norm()
        pair = (tuple((torch.linalg.svdvals(part) / norm).tolist()) for part in (before, after))
        found.append(Spectrum(f"{label} {name}".strip(), *pair))
    return found


def _oriented(weight: Tensor, layer: LayerReport) -> Tensor:
    """As the solver sees it: a Conv1D's weight lies transposed on disk."""
    return weight.T.contiguous() if layer.kind == "conv1d" else weight


def _base(stored: Checkpoint, tensor: str, module: str, layer: LayerReport) -> Tensor:
    """The base of a layer as it is stored, dequantised, float32 (out, in)."""
    if f"{module}.codes" in stored.tensors:
        parts = [_read(stored, f"{module}.{part}") for part in TENSOR_NAMES]
        spec = QuantSpec(layer.format, layer.block_size, layer.double_quant)
        return as_quantized(parts, spec, torch.Size(layer.shape), torch.float32).dequantize()
    if is_bnb(tensor, stored.tensors):
        names = [name for name in stored.tensors if name == tensor or name.startswith(f"{tensor}.")]
        found = from_bnb(tensor, {name: stored.tensors[name].read() for name in names})
        return found.dequantize(torch.float32).reshape(layer.shape)
    return _oriented(stored.tensors[tensor].read().float(), layer)


def _read(stored: Checkpoint, name: str) -> Tensor | None:
    return stored.tensors[name].read() if name in stored.tensors else None
