"""What a user can choose for ``qlora-merge``, checked once, as one frozen value."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from quant import QuantSpec, formats

from .checkpoint import parse_size
from .errors import InputError
from .options import DTYPES, choice


@dataclass(frozen=True)
class MergeOptions:
    """What a user can choose.

    Attributes:
        dtype: Of the result; "auto": dense tensors keep theirs, quantised ones get the model's.
        requantize: Format of the merged linear layers, or None for dense ones.
        block_size, double_quant: Of the format.
        safe: Refuse a result that is not finite.
        max_shard_size: Bytes of a weight file.

    Raises:
        InputError: a value that is not allowed.
    """

    dtype: str = "auto"
    requantize: str | None = None
    block_size: int = 64
    double_quant: bool = False
    safe: bool = False
    max_shard_size: int = 5_000_000_000

    def __post_init__(self) -> None:
        choice("--dtype", self.dtype, DTYPES)
        object.__setattr__(self, "max_shard_size", parse_size(self.max_shard_size))
        if self.requantize is not None:
            choice("--requantize", self.requantize, formats.names())
            try:
                self.spec  # noqa: B018 - its checks are the point
            except (ValueError, TypeError) as error:
                raise InputError(str(error)) from error

    @property
    def spec(self) -> QuantSpec:
        """Of requantised layers."""
        assert self.requantize is not None
        return QuantSpec(self.requantize, self.block_size, self.double_quant)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return dataclasses.asdict(self)
