"""An adapter's product for one matrix of a stack of experts, oriented and cut as that matrix lies on disk."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from .disk_adapter import ModulePart
from .expert_layout import Slab
from .safetensors_io import TensorEntry

_KEPT = 4  # A and B of two stacks: tensors of experts come in turns of gate, up and down


def expert_entry(entry: TensorEntry, expert: int) -> TensorEntry:
    """One matrix of a stack (experts, a, b) on disk."""
    size = entry.nbytes // entry.shape[0]
    return dataclasses.replace(entry, shape=entry.shape[1:], begin=entry.begin + expert * size, nbytes=size)


class StackFactors:
    """Reads the factors of stacks, and keeps those of the last few: each is asked for once an expert."""

    def __init__(self) -> None:
        self._read: dict[tuple[str, int], Tensor] = {}

    def of(self, part: ModulePart, slab: Slab, expert: int) -> tuple[Tensor, Tensor]:
        """(L, R), float32, with ``part.scaling * L @ R`` what is added to the expert's matrix on disk.

        Args:
            part: Of a stack: A (rank * experts, in) with the experts one below the other, B (out, rank *
                experts) with the experts fastest.
            slab: Which part of the Parameter the matrix is.
            expert: Which expert.
        """
        assert part.A is not None
        assert part.B is not None
        rank = part.rank
        A = self._tensor(part.A)[expert * rank : (expert + 1) * rank].float()  # (rank, in)
        B = self._tensor(part.B)[:, expert :: part.experts].float()  # (out, rank)
        left, right = (A.t(), B.t()) if part.in_out else (B, A)
        left = left[slab.start : slab.stop]
        return (right.t(), left.t()) if slab.transposed else (left, right)

    def _tensor(self, entry: TensorEntry) -> Tensor:
        key = (str(entry.path), entry.begin)
        if key not in self._read:
            while len(self._read) >= _KEPT:
                del self._read[next(iter(self._read))]
            self._read[key] = entry.read()
        return self._read[key]
