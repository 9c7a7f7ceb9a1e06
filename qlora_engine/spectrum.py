"""Singular values of what a quantised layer lacks, without and with its adapter, from the files on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quant import QuantSpec, quantize

from .architecture import read_architecture
from .checkpoint import Checkpoint
from .errors import InputError
from .report import RunReport
from .safetensors_io import TensorEntry
from .stored_expert import ExpertEntry, expert_matrices
from .stored_layer import StoredRun, oriented


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


def share(values: Sequence[float], count: int) -> float:
    """Part of the squared norm that the ``count`` largest of the singular values hold."""
    squares = [value**2 for value in values]
    return sum(squares[:count]) / (sum(squares) or 1.0)


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
    original, stored = Checkpoint.open(model), StoredRun.open(out, adapter)
    architecture = read_architecture(model, original.config)
    homes = architecture.homes(original.tensors)
    entries: dict[str, TensorEntry | ExpertEntry] = {
        home.parameter: original.tensors[key] for key, home in homes.items() if not home.converted
    }
    experts, _ = expert_matrices(original, architecture)
    entries |= {f"{entry.name}.weight": entry for _, entry in experts}
    found = []
    for name in names:
        layer = report.get(name)
        if layer is None or f"{name}.weight" not in entries:
            raise InputError(f"{out} and {model} have no quantised layer '{name}' in common")
        entry = entries[f"{name}.weight"]
        weight = oriented(entry.read().float(), layer.kind)
        spec = QuantSpec(layer.format, layer.block_size, layer.double_quant)
        before = weight - quantize(weight, spec).dequantize()
        after = weight - stored.base(layer, entry.name)
        factors = stored.correction(layer)
        if factors is not None:
            A, B = factors
            after = after - layer.scaling * B @ A
        norm = weight.norm()
        pair = (tuple((torch.linalg.svdvals(part) / norm).tolist()) for part in (before, after))
        found.append(Spectrum(f"{label} {name}".strip(), *pair))
    return found
