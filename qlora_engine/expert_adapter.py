"""The factors of single experts as one adapter has them: stacked, under the keys of nested wrappers.

Source: PEFT's ParamWrapper. A (rank * experts, in) has the experts one below the other, B (out, rank *
experts) has them fastest; of several adapted Parameters of a module the first is wrapped innermost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter_io import factor_names
from .safetensors_io import DTYPE_BITS, DenseTensor, TensorEntry


def stack_paths(stacks: Iterable[str]) -> dict[str, str]:
    """Adapted Parameter -> the path that its factors have in the file.

    Args:
        stacks: Full names, those of a module in its order.
    """
    owners: dict[str, list[str]] = {}
    for stack in stacks:
        owner, _, leaf = stack.rpartition(".")
        owners.setdefault(owner, []).append(leaf)
    return {
        f"{owner}.{leaf}": owner + ".base_layer" * depth
        for owner, leaves in owners.items()
        for depth, leaf in enumerate(reversed(leaves))
    }


@dataclass(frozen=True)
class StackedFactor:
    """One factor of all experts, to be written.

    Attributes:
        name: In the file.
        parts: The experts' factors in order, of one shape: (rank, in) for A, (out, rank) for B.
        is_b: Which of the two it is.
    """

    name: str
    parts: Sequence[TensorEntry]
    is_b: bool

    @property
    def dtype(self) -> str:
        """safetensors' name."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        rows, columns = self.parts[0].shape
        count = len(self.parts)
        return (rows, columns * count) if self.is_b else (rows * count, columns)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.shape[0] * self.shape[1] * DTYPE_BITS[self.dtype] // 8

    def chunks(self) -> Iterator[bytes | memoryview]:
        """A expert by expert; B, whose elements are interleaved, at once."""
        if not self.is_b:
            for part in self.parts:
                yield from part.chunks()
            return
        whole = torch.stack([part.read() for part in self.parts], dim=-1)  # (out, rank, experts)
        yield from DenseTensor(self.name, whole.flatten(1)).chunks()


def stacked_factors(stack: str, path: str, factors: Sequence[Sequence[TensorEntry]]) -> list[StackedFactor]:
    """What the file has of a stack.

    Args:
        stack: The Parameter.
        path: See ``stack_paths``.
        factors: Of each expert in order A and B, under the names of a Linear at the stack's path and number.
    """
    sides = []
    for number, pair in enumerate(factors):
        by_name = {entry.name: entry for entry in pair}
        sides.append([by_name[name] for name in factor_names(f"{stack}.{number}", "linear")])
    names = factor_names(path, "linear")
    return [StackedFactor(name, [pair[n] for pair in sides], bool(n)) for n, name in enumerate(names)]


def of_expert(A: Tensor, B: Tensor, number: int, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) of one expert, views of the stacked ones."""
    return A[number * rank : (number + 1) * rank], B[:, number :: A.shape[0] // rank]
