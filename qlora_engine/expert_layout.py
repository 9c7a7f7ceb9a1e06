"""Where the matrices of stacked experts lie in a checkpoint: a tensor each, or all in one.

In memory transformers 5 holds the experts of a layer as one Parameter (experts, a, b). On disk that may be
one tensor, too, or a matrix for every expert, gate and up apart. Which it is follows from transformers' own
table of conversions; the few operations that it is made of for experts are read here, not run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .architecture import Architecture, ModuleInfo
from .expert_stack import is_stack, multiplies_in_out

_NOTHING = ("Force16BytesAlignment",)  # steps that leave values and shape: gpt-oss in transformers 5.0


@dataclass(frozen=True)
class Slab:
    """What part of a stacked Parameter P (experts, a, b) one tensor on disk is: P[expert, start:stop].

    Attributes:
        parameter: Name of P in memory.
        expert: Number of the expert; None: all of them, and the tensor has three dimensions.
        start, stop: Rows of each matrix.
        transposed: On disk the last two dimensions are (b, a).
    """

    parameter: str
    expert: int | None
    start: int
    stop: int
    transposed: bool = False

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Of the tensor on disk, P having the shape ``whole``."""
        rows, columns = self.stop - self.start, whole[2]
        matrix = (columns, rows) if self.transposed else (rows, columns)
        return matrix if self.expert is not None else (whole[0], *matrix)


def is_stored_in_out(architecture: Architecture, path: str) -> bool:
    """Whether the module ``path`` keeps the matrices of its stacks as (in, out), as gpt-oss does."""
    return bool(getattr(architecture._model.get_submodule(path), "is_transposed", False))


def expert_module(architecture: Architecture, path: str) -> tuple[str, ModuleInfo] | None:
    """The stacked Parameter, and as a module the expert that ``path`` means: the Parameter's and a number."""
    parameter, _, number = path.rpartition(".")
    holder, _, leaf = parameter.rpartition(".")
    whole = architecture.parameters.get(parameter, ())
    if len(whole) != 3 or not number.isdecimal() or int(number) >= whole[0]:
        return None
    owner = architecture._model.get_submodule(holder)
    if not is_stack(owner, leaf):
        return None
    if multiplies_in_out(owner):
        return parameter, ModuleInfo(path, "conv1d", (whole[2], whole[1]))
    return parameter, ModuleInfo(path, "linear", (whole[1], whole[2]))


def expert_slabs(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Slab]:
    """Where each tensor of a checkpoint belongs, for those that are parts of stacked Parameters.

    Args:
        architecture: Of the model.
        shapes: Of the tensors on disk, by name.

    Returns:
        By name on disk. A Parameter that is not wholly made of such tensors, each in its place once, is left
        out: by another conversion, or because the shapes contradict it.
    """
    found: dict[str, dict[str, Slab]] = {}
    broken: set[str] = set()
    for name, home in architecture.homes(shapes).items():
        whole = architecture.parameters.get(home.parameter, ())
        if len(whole) != 3:
            continue
        if not home.converted:
            slab: Slab | None = Slab(home.parameter, None, 0, whole[1])
        else:
            slab = _slab(home.parameter, home.converter, home.pattern, name, shapes, whole)
        if slab is None or slab.shape(whole) != shapes[name]:
            broken.add(home.parameter)
        else:
            found.setdefault(home.parameter, {})[name] = slab
    return {
        name: slab
        for parameter, slabs in found.items()
        if parameter not in broken and _covers(slabs, architecture.parameters[parameter])
        for name, slab in slabs.items()
    }


def _slab(
    parameter: str,
    converter: Any,
    pattern: str | None,
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    whole: tuple[int, ...],
) -> Slab | None:
    """The place of the tensor ``name``; None where the conversion is none of those known here."""
    patterns = list(converter.source_patterns)
    steps = [
        (type(step).__name__, getattr(step, "dim", None))
        for step in converter.operations
        if type(step).__name__ not in _NOTHING
    ]
    if pattern not in patterns or len(converter.target_patterns) != 1:
        return None
    if steps == [("Transpose", None)] and len(patterns) == 1:
        step = converter.operations[0]
        same = getattr(step, "check_dims", False) and shapes[name] == whole
        swaps = {step.dim0 % 3, step.dim1 % 3} == {1, 2}
        return Slab(parameter, None, 0, whole[1], transposed=not same) if swaps else None
    merged = ("MergeModulelist", 0) in steps
    rest = [step for step in steps if step != ("MergeModulelist", 0)]
    if rest != ([("Concatenate", 1)] if len(patterns) > 1 else []):
        return None
    numbered = [_tail(other) for other in patterns]
    number = re.search(rf"(\d+){re.escape(numbered[patterns.index(pattern)])}$", name) if merged else None
    if merged and number is None:
        return None
    stem = name[: number.start(1)] if number is not None else name[: -len(numbered[patterns.index(pattern)])]
    start = 0
    for other in numbered[: patterns.index(pattern)]:
        sibling = shapes.get(f"{stem}{number[1] if number is not None else ''}{other}")
        if sibling is None:
            return None
        start += sibling[-2]
    expert = int(number[1]) if number is not None else None
    return Slab(parameter, expert, start, start + shapes[name][-2]) if len(shapes[name]) > 1 else None


def _tail(pattern: str) -> str:
    """What follows the expert's number, or the last of the names where there is none."""
    plain = pattern.replace("\\.", ".").removesuffix("$")
    return plain.rpartition("*")[2] if "*" in plain else plain


def _covers(slabs: Mapping[str, Slab], whole: tuple[int, ...]) -> bool:
    """Whether the slabs fill the Parameter and no two overlap."""
    runs: dict[int, list[tuple[int, int]]] = {}
    for slab in slabs.values():
        for expert in range(whole[0]) if slab.expert is None else [slab.expert]:
            runs.setdefault(expert, []).append((slab.start, slab.stop))
    if sorted(runs) != list(range(whole[0])):
        return False
    for run in runs.values():
        position = 0
        for start, stop in sorted(run):
            if start != position:
                return False
            position = stop
        if position != whole[1]:
            return False
    return True
