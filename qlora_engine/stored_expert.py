"""The experts of a checkpoint as matrices to quantise, one by one, however the disk keeps them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .architecture import Architecture, ModuleInfo
from .checkpoint import Checkpoint
from .expert_layout import Slab, expert_slabs
from .expert_merge import expert_entry
from .expert_stack import is_stack, multiplies_in_out
from .safetensors_io import DTYPE_BITS, FLOAT_DTYPES, TensorEntry


@dataclass(frozen=True)
class ExpertEntry:
    """One expert's matrix as the model has it, put together from where it lies; reads like a TensorEntry.

    Attributes:
        name: The stacked Parameter and the expert's number.
        dtype: safetensors' name.
        shape: (a, b) of the Parameter's matrices.
        expert: Its number.
        parts: Tensors on disk with their places, by rows.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    expert: int
    parts: tuple[tuple[TensorEntry, Slab], ...]

    @property
    def stack(self) -> str:
        """The Parameter."""
        return self.name.rpartition(".")[0]

    @property
    def path(self) -> Path:
        """A file that it is in."""
        return self.parts[0][0].path

    @property
    def sources(self) -> tuple[str, ...]:
        """Names on disk."""
        return tuple(entry.name for entry, _ in self.parts)

    @property
    def numel(self) -> int:
        """Weights in it."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.numel * DTYPE_BITS[self.dtype] // 8

    def read(self) -> Tensor:
        """The matrix (a, b), in memory of its own.

        Raises:
            ReadError: a file is not what its header said.
        """
        rows = []
        for entry, slab in self.parts:
            own = entry if slab.expert is not None else expert_entry(entry, self.expert)
            tensor = own.read()
            rows.append(tensor.mT if slab.transposed else tensor)
        return torch.cat(rows) if len(rows) > 1 else rows[0].contiguous()


def expert_matrices(
    checkpoint: Checkpoint, architecture: Architecture
) -> tuple[list[tuple[ModuleInfo, ExpertEntry]], list[str]]:
    """Every expert that can be quantised, as a layer; and the stacked Parameters that cannot, by name.

    A layer's path is that of the Parameter and its number. Those with (in, out) matrices are of kind
    "conv1d".
    """
    slabs = expert_slabs(architecture, {name: entry.shape for name, entry in checkpoint.tensors.items()})
    by_parameter: dict[str, list[tuple[TensorEntry, Slab]]] = {}
    for name, slab in slabs.items():
        by_parameter.setdefault(slab.parameter, []).append((checkpoint.tensors[name], slab))
    modules = dict(architecture._model.named_modules())
    found: list[tuple[ModuleInfo, ExpertEntry]] = []
    left: list[str] = []
    for parameter, whole in architecture.parameters.items():
        owner, leaf = modules.get(parameter.rpartition(".")[0]), parameter.rpartition(".")[2]
        if len(whole) != 3 or owner is None or not is_stack(owner, leaf):
            continue
        parts = by_parameter.get(parameter, [])
        dtypes = {entry.dtype for entry, _ in parts}
        if len(dtypes) != 1 or not dtypes <= set(FLOAT_DTYPES):
            left.append(parameter)
            continue
        (dtype,) = dtypes
        in_out = multiplies_in_out(owner)
        shape = (whole[2], whole[1]) if in_out else (whole[1], whole[2])
        for number in range(whole[0]):
            mine = sorted(_of_expert(parts, number), key=lambda part: part[1].start)
            path = f"{parameter}.{number}"
            module = ModuleInfo(path, "conv1d" if in_out else "linear", shape)
            found.append((module, ExpertEntry(path, dtype, whole[1:], number, tuple(mine))))
    return found, left


def _of_expert(parts: Iterable[tuple[TensorEntry, Slab]], number: int) -> list[tuple[TensorEntry, Slab]]:
    return [(entry, slab) for entry, slab in parts if slab.expert in (None, number)]
