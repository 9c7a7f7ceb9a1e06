"""The values that a quantised matrix may take, looked at column by column.

Rounding in a metric walks over columns while the scales lie in blocks of the flattened row-major weight. A
:class:`Grid` joins the two: it knows the levels of a format, the scale (and zero) of every block, and hands
out those that apply to a set of columns, whether or not a row is a whole number of blocks.

All matrices here are transposed, (in_features, out_features), so that one column of the weight is
contiguous and one step of a sweep works on all rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant import QuantSpec
from quant.tables import tables


@dataclass(frozen=True)
class Grid:
    """Levels, scales and zeros of one quantised matrix: value = (levels[code] - zero) * scale.

    Attributes:
        levels: Codebook, (n_levels,) float32, indexed by code, in any order.
        scales: One a block, (n_blocks,) float32, **as stored** (after double quantisation). May be negative.
        zeros: One a block in units of the levels, (n_blocks,) float32, or None for symmetric formats.
        shape: (out_features, in_features) of the weight.
        block_size: Consecutive elements of the flattened row-major weight that share a scale.
    """

    levels: Tensor
    scales: Tensor
    zeros: Tensor | None
    shape: tuple[int, int]
    block_size: int

    def __post_init__(self) -> None:
        out_features, in_features = self.shape
        n_blocks = -(-out_features * in_features // self.block_size)
        if self.scales.shape != (n_blocks,):
            raise ValueError(
                f"weight {self.shape} in blocks of {self.block_size} has {n_blocks} scales, "
                f"got {tuple(self.scales.shape)}"
            )
        if self.zeros is not None and self.zeros.shape != (n_blocks,):
            raise ValueError(f"zeros must be ({n_blocks},), got {tuple(self.zeros.shape)}")

    @classmethod
    def of(cls, spec: QuantSpec, shape: tuple[int, int], scales: Tensor, zeros: Tensor | None = None) -> Grid:
        """The grid of a spec; ``zeros`` as ``quant`` stores them, uint8 fixed point."""
        levels = tables(spec.fmt, scales.device).levels
        dense = None if zeros is None else zeros.float() / 2 ** (8 - spec.bits)
        return cls(levels, scales, dense, shape, spec.block_size)

    @property
    def rows_are_whole_blocks(self) -> bool:
        """True if no block straddles two rows."""
        return self.shape[1] % self.block_size == 0

    def with_scales(self, scales: Tensor) -> Grid:
        return replace(self, scales=scales)

    def blocks_of(self, columns: Tensor) -> Tensor:
        """Block number of every element of some columns: (n,) int64 -> (n, out_features) int64."""
        out_features, in_features = self.shape
        row_start = torch.arange(out_features, device=columns.device) * in_features
        return (row_start + columns[:, None]) // self.block_size

    def columns(self, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros that apply to some columns, each (n, out_features); zeros None if symmetric."""
        return self._spread(self.scales, columns), self._spread_zeros(columns)

    def _spread(self, per_block: Tensor, columns: Tensor) -> Tensor:
        """One value a block -> one an element of some columns, (n, out_features)."""
        if self.rows_are_whole_blocks:
            by_row = per_block.view(self.shape[0], -1)  # (out, blocks of a row)
            return by_row.T[columns // self.block_size]
        return per_block[self.blocks_of(columns)]

    def _spread_zeros(self, columns: Tensor) -> Tensor | None:
        return None if self.zeros is None else self._spread(self.zeros, columns)

    def _all_columns(self) -> Tensor:
        return torch.arange(self.shape[1], device=self.scales.device)

    def unit_values(self, codes: Tensor) -> Tensor:
        """levels[code] - zero for transposed codes (in_features, out_features): the value at scale 1."""
        units = self.levels[codes.int()]
        zeros = self._spread_zeros(self._all_columns())
        return units if zeros is None else units.sub_(zeros)

    def values(self, codes: Tensor) -> Tensor:
        """Dequantise transposed codes: (in_features, out_features) integers -> float32 of the same shape."""
        return self.unit_values(codes).mul_(self._spread(self.scales, self._all_columns()))
