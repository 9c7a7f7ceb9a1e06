"""One tensor of a merge's result: what it is made from, and how."""

from __future__ import annotations

from dataclasses import dataclass

from quant import QuantSpec

from .base_on_disk import StoredWeight
from .disk_adapter import ModulePart
from .expert_layout import Slab
from .safetensors_io import DTYPE_BITS, TensorEntry


@dataclass(frozen=True)
class Job:
    """One tensor (or quantised weight) of the result.

    Attributes:
        name: Of the dense tensor.
        kind: "copy" (as it is, perhaps in another dtype), "merge", "dequantise" or "quantise".
        dtype: safetensors' name, of a dense result.
        shape: Of the dense result.
        stored: The base's weight, if there is one.
        entry: The tensor that is copied.
        part: What the adapter does to it.
        bias: The weight is a bias: the part adds its own bias and nothing else.
        spec: Of a quantised result.
        keep_codes: The base's codes go into the result as they are.
        slab: Which part of a stack of experts the tensor is, where the part belongs to the stack.
        experts: The quantised experts that become the tensor.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    stored: StoredWeight | None = None
    entry: TensorEntry | None = None
    part: ModulePart | None = None
    bias: bool = False
    spec: QuantSpec | None = None
    keep_codes: bool = False
    slab: Slab | None = None
    experts: tuple[StoredWeight, ...] = ()

    @property
    def is_stack(self) -> bool:
        """Whether it is all experts in one tensor, which are merged one by one."""
        return self.slab is not None and self.slab.expert is None

    @property
    def numel(self) -> int:
        """Elements of the dense tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def numel_at_once(self) -> int:
        """Elements that are in memory together."""
        return self.numel // max(self.shape[0], 1) if self.is_stack else self.numel

    @property
    def nbytes(self) -> int:
        """Bytes of the result (bitsandbytes' small tables not counted)."""
        if self.kind == "quantise":
            assert self.spec is not None
            return self.spec.nbytes(self.numel)
        return self.numel * DTYPE_BITS[self.dtype] // 8
