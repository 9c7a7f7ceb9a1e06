"""QuantSpec: how a weight is quantised, as a small frozen value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from quant import formats
from quant.formats import Format

MIN_BLOCK_SIZE, MAX_BLOCK_SIZE = 16, 4096
NESTED_BLOCK_SIZE = 256  # bitsandbytes' block of double-quantised scales


@dataclass(frozen=True)
class QuantSpec:
    """Format, block size and whether the scales are quantised too.

    Attributes:
        format: One of ``quant.formats.names()``.
        block_size: Consecutive elements of the flattened row-major weight that share a scale; a power of
            two in [16, 4096], so that every block starts on a byte at every width.
        double_quant: Store the scales as 8-bit codes with one float32 scale per 256 of them.

    Raises:
        ValueError: unknown format, or a block size that is not allowed.
        TypeError: a field of the wrong type.
    """

    format: str = "nf4"
    block_size: int = 64
    double_quant: bool = False

    def __post_init__(self) -> None:
        formats.get(self.format)
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int):
            raise TypeError(f"block_size must be an int, got {self.block_size!r}")
        if not isinstance(self.double_quant, bool):
            raise TypeError(f"double_quant must be a bool, got {self.double_quant!r}")
        size = self.block_size
        if not MIN_BLOCK_SIZE <= size <= MAX_BLOCK_SIZE or size & (size - 1):
            raise ValueError(
                f"block_size {size} is not a power of two in [{MIN_BLOCK_SIZE}, {MAX_BLOCK_SIZE}]"
            )

    @property
    def fmt(self) -> Format:
        """The format's table."""
        return formats.get(self.format)

    @property
    def bits(self) -> int:
        """Bits a code, scales not counted."""
        return self.fmt.bits

    def n_blocks(self, numel: int) -> int:
        """Blocks in a weight of ``numel`` elements; the last may be short."""
        return -(-numel // self.block_size)

    def nbytes(self, numel: int) -> int:
        """Bytes that a weight of ``numel`` elements takes: codes, scales, zeros, nested scales and map."""
        blocks = self.n_blocks(numel)
        total = -(-numel * self.bits // 8) + (blocks if self.fmt.affine else 0)
        if not self.double_quant:
            return total + 4 * blocks
        return total + blocks + 4 * -(-blocks // NESTED_BLOCK_SIZE) + 4 * 256 + 4

    def bits_per_weight(self, numel: int | None = None) -> float:
        """Bits a weight, scales and zeros included.

        Args:
            numel: Elements of the weight; counts short blocks and the nested map too. None: the limit for a
                large weight (nf4, block 64: 4.5, double-quantised 4.127).
        """
        if numel is not None:
            return 8 * self.nbytes(numel) / numel if numel else 0.0
        scale = 8 + 32 / NESTED_BLOCK_SIZE if self.double_quant else 32
        return self.bits + (scale + (8 if self.fmt.affine else 0)) / self.block_size

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantSpec:
        """The inverse of ``to_dict``; missing fields take their default, unknown ones are a ValueError."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown QuantSpec fields {unknown}; known fields: {', '.join(sorted(known))}")
        return cls(**values)
