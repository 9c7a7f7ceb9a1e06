"""Rounding column after column in a metric: GPTQ and coordinate descent.

Both minimise tr((W - Q) M (W - Q)^T) for a metric M (in, in) and are one loop: column c is rounded to the
level nearest to ``base[c] + sum_{i<c} drift[i] * feedback[i, c]``. They differ in what drifts (the rounding
error of column i, or its change) and in the feedback (a triangular factor of M, or M over its diagonal).
The loop over 64-128 columns is :func:`_sweep_columns`; what reaches later columns is one matrix product a
block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from .grid import Grid
from .metric import feedback_factor

# Columns in one inner loop: the product that feeds the rest is then wide enough for BLAS and the block of
# errors (128 x out_features) still fits a CPU's level-2 cache.
BLOCK_COLUMNS = 128
# A step of the loop takes 10 to 100 us on one core; on a busy one, a barrier of two threads took 100 to 400.
_ROWS_ALONE = 2048


@dataclass(frozen=True)
class Feedback:
    """Order in which GPTQ takes the columns, and what each takes up of the errors before it.

    Attributes:
        order: Columns by decreasing diag(M), (in,) int64.
        factor: Unit upper triangular in that order, (in, in) float32.
    """

    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, metric: Tensor, damping: float = 0.01) -> Feedback:
        """Factorise a positive semi-definite metric (in, in), its diagonal raised by a share of its mean."""
        order = torch.argsort(metric.diagonal(), descending=True, stable=True)
        return cls(order, feedback_factor(metric, order, damping))


def gptq(target: Tensor, grid: Grid, metric: Tensor | Feedback) -> Tensor:
    """Round ``target`` in a metric, feeding every column's error forward (GPTQ with a codebook).

    With M = U U^T, U upper triangular in the order of the columns, the error is
    sum_j U_jj^2 (e_j + sum_{i<j} e_i U_ij / U_jj)^2, so column j is rounded after adding the second term.
    This equals feeding forward through the Cholesky factor of M^-1 and needs no inverse.

    Args:
        target: Transposed weight to approximate, (in_features, out_features) float32.
        grid: Levels and fixed scales.
        metric: Positive semi-definite (in_features, in_features) float32, damped by 0.01 of its mean; or its
            Feedback, which serves any number of targets and grids.

    Returns:
        Transposed codes, (in_features, out_features) uint8.

    Source: Frantar et al., arXiv:2210.17323; the factorisation without an inverse as in QuIP,
        arXiv:2307.13304.
    """
    in_features = target.shape[0]
    feedback = metric if isinstance(metric, Feedback) else Feedback.of(metric)
    order, factor = feedback.order, feedback.factor
    ordered = target[order]
    codes = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
    errors = torch.empty_like(target)  # (in, out), in processing order
    rounder = _Rounder(grid)
    for start in range(0, in_features, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, in_features)
        columns = order[start:stop]
        base = anchor = ordered[start:stop]
        if start:
            base = torch.addmm(anchor, factor[:start, start:stop].T, errors[:start])
        block_codes, values = rounder(rounder.steps(columns), base, anchor, factor[start:stop, start:stop])
        codes[columns] = block_codes
        errors[start:stop] = anchor - values
    return codes


def coordinate_descent(
    target: Tensor, codes: Tensor, grid: Grid, metric: Tensor, *, sweeps: int = 1
) -> Tensor:
    """Improve codes one column at a time; tr(E M E^T) never rises (exactly: up to float32 rounding).

    For column c the best value given all others is t = Q_c + (E M)_c / M_cc, and since the cost is a parabola
    about t the best level is the nearest one. A column with M_cc = 0 keeps its codes.

    Args:
        target: Transposed weight to approximate, (in_features, out_features) float32.
        codes: Transposed codes to start from, (in_features, out_features) uint8. Not modified.
        grid: Levels and fixed scales.
        metric: Positive semi-definite (in_features, in_features) float32.
        sweeps: Passes over all columns.

    Returns:
        Transposed codes, (in_features, out_features) uint8.
    """
    descent = _Descent(target, codes, grid, metric)
    for _ in range(sweeps):
        descent.sweep()
    return descent.codes


def anneal(
    target: Tensor,
    codes: Tensor,
    grid: Grid,
    metric: Tensor,
    *,
    sweeps: int,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:
    """Coordinate descent with noise that dies down, to leave local minima; every row keeps its best codes.

    Before a column is rounded, Gaussian noise is added whose deviation is ``temperature`` times the mean
    distance of the levels, falling linearly to zero at the last sweep. A row's codes are replaced only by
    better ones, so that tr(E M E^T) does not rise in any row.

    Args:
        target: As for :func:`coordinate_descent`.
        codes: As for :func:`coordinate_descent`.
        grid: As for :func:`coordinate_descent`.
        metric: As for :func:`coordinate_descent`.
        sweeps: Passes over all columns, the last of them without noise.
        temperature: Deviation at the first sweep, in level distances.
        generator: Of the noise, on the device of ``target``.

    Returns:
        Transposed codes, (in_features, out_features) uint8.
    """
    descent = _Descent(target, codes, grid, metric)
    best = codes.clone()
    gained, most = torch.zeros_like(target[0]), torch.zeros_like(target[0])  # (out,)
    for i in range(sweeps):
        gained = gained - descent.sweep(temperature * (1 - (i + 1) / sweeps), generator)
        best = torch.where(gained > most, descent.codes, best)
        most = torch.maximum(gained, most)
    return best


class _Descent:
    """Codes, their values and errors while columns are changed one after another."""

    def __init__(self, target: Tensor, codes: Tensor, grid: Grid, metric: Tensor) -> None:
        self.codes = codes.clone()
        self.values = grid.values(codes)
        self.errors = target - self.values
        self._metric = metric
        diagonal = metric.diagonal()
        self._alive = diagonal > 0
        self._inverse = torch.where(self._alive, 1 / diagonal, torch.zeros_like(diagonal))
        self._rounder = _Rounder(grid)
        columns = torch.arange(target.shape[0], device=target.device)
        # the same in every sweep
        self._steps = [self._rounder.steps(block) for block in columns.split(BLOCK_COLUMNS)]

    def sweep(self, temperature: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """One pass over all columns; returns by how much every row's objective has changed, (out,)."""
        change = torch.zeros_like(self.errors[0])
        for number, steps in enumerate(self._steps):
            block = slice(number * BLOCK_COLUMNS, (number + 1) * BLOCK_COLUMNS)
            old, inverse = self.values[block], self._inverse[block]
            pull = self._metric[block] @ self.errors  # (n, out): (E M)_c as the block begins
            base = torch.addcmul(old, pull, inverse[:, None])
            square = self._metric[block, block]
            feedback = square * inverse
            codes, values = self._rounder(
                steps, base, old, feedback, temperature=temperature, generator=generator
            )
            alive = self._alive[block, None]
            self.codes[block] = torch.where(alive, codes, self.codes[block])
            values = torch.where(alive, values, old)
            moved = old - values
            # Moving E by m changes tr(E M E^T) by 2 m (E M)^T + m M m^T, row by row.
            change += (moved * torch.add(square @ moved, pull, alpha=2)).sum(0)
            self.errors[block] += moved
            self.values[block] = values
        return change


class _Steps(NamedTuple):
    """Of every element of some columns, each (n, out): the scale, its inverse (0 where it is 0), the zero."""

    scales: Tensor
    inverse: Tensor
    zeros: Tensor | None


class _Rounder:
    """Rounds blocks of columns on one grid, whose levels it has in order."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        # fp4's codes are not in the order of their values
        self.levels, self.code_of = torch.sort(grid.levels, stable=True)
        self.midpoints = (self.levels[1:] + self.levels[:-1]) / 2
        self.code_of = self.code_of.to(torch.uint8)
        self.distance = (self.levels[-1] - self.levels[0]) / len(self.midpoints)

    def steps(self, columns: Tensor) -> _Steps:
        """Scales and zeros of some columns, (n,) int64."""
        scales, zeros = self.grid.columns(columns)
        return _Steps(scales, torch.where(scales == 0, 0, 1 / scales), zeros)

    def __call__(
        self,
        steps: _Steps,
        base: Tensor,
        anchor: Tensor,
        feedback: Tensor,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Codes uint8 and values float32, (n, out)."""
        if temperature > 0:
            noise = torch.randn(base.shape, generator=generator, device=base.device).mul_(self.distance)
            base = torch.addcmul(base, noise, steps.scales, value=temperature)
        ranks, values = _sweep_columns(
            base.contiguous(),
            anchor.contiguous(),
            feedback.contiguous(),
            *steps,
            self.levels,
            self.midpoints,
        )
        return self.code_of[ranks], values


def _sweep_columns(
    base: Tensor,
    anchor: Tensor,
    feedback: Tensor,
    scales: Tensor,
    inverse: Tensor,
    zeros: Tensor | None,
    levels: Tensor,
    midpoints: Tensor,
) -> tuple[Tensor, Tensor]:
    """Round n columns in sequence, all rows at once: the inner loop, and nothing that waits for the host.

    Args:
        base: What each column would be rounded from if no column of the block drifted, (n, out) float32.
        anchor: What a column's drift is measured from: drift = anchor - value, (n, out) float32.
        feedback: Weight of column i's drift in column c's target, (n, n); only its part i < c is read.
        scales: Scale of every element, (n, out).
        inverse: 1 / scales, and 0 where the scale is 0.
        zeros: Zero of every element in units of the levels, (n, out), or None.
        levels: Levels in ascending order, (n_levels,).
        midpoints: Halfway between neighbouring levels, (n_levels - 1,).

    Returns:
        Index into ``levels``, (n, out) int32, and the values (level - zero) * scale, (n, out) float32.
    """
    if base.device.type == "cuda" and find_spec("triton") is not None:
        from quant.backends import triton_rounding

        return triton_rounding.sweep_columns(
            base, anchor, feedback, scales, inverse, zeros, levels, midpoints
        )
    with _few_threads(base.shape[1]):
        return _loop(base, anchor, feedback, scales, inverse, zeros, levels, midpoints)


@contextmanager
def _few_threads(rows: int) -> Iterator[None]:
    """One thread for steps of so few rows: each would wait for the other threads longer than it computes."""
    threads = torch.get_num_threads()
    if rows > _ROWS_ALONE or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _loop(
    base: Tensor,
    anchor: Tensor,
    feedback: Tensor,
    scales: Tensor,
    inverse: Tensor,
    zeros: Tensor | None,
    levels: Tensor,
    midpoints: Tensor,
) -> tuple[Tensor, Tensor]:
    """``_sweep_columns`` in torch's own operations."""
    drift = torch.empty_like(anchor)
    values = torch.empty_like(anchor)
    ranks = torch.empty(anchor.shape, dtype=torch.int32, device=anchor.device)
    feedback_by_column = feedback.T.contiguous()
    for c in range(base.shape[0]):
        target = base[c]
        if c:
            target = torch.addmv(target, drift[:c].T, feedback_by_column[c, :c])
        unit = target * inverse[c]
        if zeros is not None:
            unit += zeros[c]
        rank = torch.bucketize(unit, midpoints, out_int32=True)
        ranks[c] = rank
        level = levels[rank]
        if zeros is not None:
            level -= zeros[c]
        torch.mul(level, scales[c], out=values[c])
        torch.sub(anchor[c], values[c], out=drift[c])
    return ranks, values
