"""The search for block scales with less squared error: a grid of candidates, then least squares.

A block is put in units of its absmax scale first, so that every candidate is one number for all blocks, and
squares neither overflow nor vanish. The grid is ranked by the error that is left with the best scale for its
codes, on a finely tabulated codebook; only the refinements round exactly. No value leaves the device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.backends import reference
from quant.backends.lookup import Encoder
from quant.backends.reference import TINY
from quant.formats import Format
from quant.nested import Nested
from quant.tables import tables

# What is tried, as multiples of the absmax scale: (lowest, highest, steps), in equal ratios. On Gaussian and
# t(5) samples in blocks of 64 and 1024, with least squares after it: 98 % or more of what 125 steps gain.
_GRID = {2: (0.08, 1.1, 16), 3: (0.2, 1.25, 16), 4: (0.45, 1.3, 18), 8: (0.96, 1.15, 12)}
# affine: what is kept of the range on either side of zero
_AFFINE_GRID = {
    2: (0.2, 0.3, 0.4, 0.52, 0.66, 0.85),
    3: (0.42, 0.54, 0.65, 0.76, 0.87, 1.0),
    4: (0.6, 0.7, 0.79, 0.87, 0.94, 1.0),
    8: (0.96, 0.98, 1.0, 1.02),
}
_REFINEMENTS = 3
_NESTED_STEPS = (0, -1, 1, -2, 2)
_CELLS_PER_UNIT = 1024  # the tabulated codebook's resolution: beyond 256 no block's error moved by 1e-4
_CHUNK = {"cpu": 1 << 17}  # elements in flight: buffers that stay in a CPU's cache
_CHUNK_ELSEWHERE = 1 << 24

Pick = Callable[[int, int], Tensor]


def multipliers(fmt: Format, signed: bool) -> list[float]:
    """What the search tries as multiples of the absmax scale; ``signed``: the same with a minus too."""
    lowest, highest, steps = _GRID[fmt.bits]
    grid = [lowest * (highest / lowest) ** (i / (steps - 1)) for i in range(steps)]
    return grid + [-m for m in grid] * signed


def search(
    weight: Tensor, fmt: Format, block_size: int, signed: bool, pick: Pick | None
) -> tuple[Tensor, Tensor | None]:
    """Scales float32 (n_blocks,) and zeros uint8 (n_blocks,) or None; ``pick(start, stop)``: importance."""
    flat = weight.reshape(-1)
    blocks = -(-flat.numel() // block_size)
    scales = torch.empty(blocks, device=flat.device)
    zeros = torch.empty(blocks, dtype=torch.uint8, device=flat.device) if fmt.affine else None
    work = _Workspace(flat, fmt, block_size, pick)
    for here, base, base_zeros in work.chunks():
        if zeros is not None and base_zeros is not None:
            rel, zeros[here] = _search_affine(work, base_zeros)
        else:
            rel = _search_symmetric(work, signed)
        scales[here] = torch.where(rel == 1, base, base * rel)
    return scales, zeros


def search_nested(
    weight: Tensor,
    fmt: Format,
    block_size: int,
    zeros: Tensor | None,
    nested: Nested,
    pick: Pick | None,
) -> Tensor:
    """The codes of double-quantised scales, each the best of itself and its neighbours: uint8 (n_blocks,)."""
    codes, nested_scales, offset, mapping = nested
    chosen = codes.clone()
    work = _Workspace(weight.reshape(-1), fmt, block_size, pick)
    for here, _, _ in work.chunks():
        group = torch.arange(here.start, here.stop, device=codes.device) // 256
        outer, middle = nested_scales[group], codes[here].int()  # (n,)
        zero = None if zeros is None else reference.dense_zeros(zeros[here], fmt)[:, None]
        best, best_error = middle, torch.full_like(outer, math.inf)
        for step in _NESTED_STEPS:
            code = (middle + step).clamp_(0, 255)
            error, _ = work.error((mapping[code] * outer + offset) / work.unit, zero)
            better = error < best_error
            best, best_error = torch.where(better, code, best), torch.where(better, error, best_error)
        chosen[here] = best.to(torch.uint8)
    return chosen


class _Workspace:
    """One chunk of blocks at a time, in units of their absmax scales, and the buffers to try scales on it.

    ``v`` (n, block_size): the chunk. ``h``: its importance, or None. ``hv``: their product. Padding weighs
    nothing.
    """

    def __init__(self, flat: Tensor, fmt: Format, block_size: int, pick: Pick | None) -> None:
        self.flat, self.fmt, self.block_size, self.pick = flat, fmt, block_size, pick
        whole = -(-flat.numel() // block_size) * block_size
        self.size = min(_CHUNK.get(flat.device.type, _CHUNK_ELSEWHERE), whole)
        self.encoder = Encoder(fmt, flat.device, self.size)
        self.buffers = [torch.empty(self.size, device=flat.device) for _ in range(4)]
        self.consecutive = all(b - a == 1 for a, b in zip(fmt.levels, fmt.levels[1:]))
        # what a fit explains tells candidates apart until it is all but 1e-5 of the block: float32 has 1e-7
        self.coarse = fmt.bits < 8
        reach = fmt.unit / _GRID[fmt.bits][0]
        self.reach = 0 if self.consecutive else int(reach * _CELLS_PER_UNIT) + 2
        self.shift = torch.tensor(float(self.reach))
        self.table = self.mirrored = self.levels = flat.new_empty(0, dtype=torch.float32)
        if not self.consecutive:
            self.levels = tables(fmt, flat.device).levels
            middles = torch.arange(-self.reach, self.reach, device=flat.device) + 0.5
            self.table = nearest(middles / _CELLS_PER_UNIT, fmt)
            self.mirrored = self.table.flip(0)

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """The blocks' numbers, their absmax scales and zeros; ``v``, ``h`` and ``hv`` become theirs."""
        flat, block_size = self.flat, self.block_size
        for start in range(0, flat.numel(), self.size or 1):
            piece = flat[start : start + self.size]
            stop = start + piece.numel()
            base, zeros = reference.absmax_scales(piece, self.fmt, block_size)
            h = None if self.pick is None else self.pick(start, stop)
            if short := -piece.numel() % block_size:
                h = F.pad(torch.ones_like(piece, dtype=torch.float32) if h is None else h, (0, short))
                piece = F.pad(piece, (0, short))
            self.count = base.numel()
            self.unit = torch.where(base.abs() < TINY, torch.ones_like(base), base)
            self.v, self.hv, self.c, self.t = (
                buffer[: piece.numel()].view(-1, block_size) for buffer in self.buffers
            )
            torch.mul(self.v.copy_(piece.view(-1, block_size)), self.unit.reciprocal()[:, None], out=self.v)
            self.v.nan_to_num_(
                0.0, 0.0, 0.0
            )  # no index out of range; the block's scale is not finite and shows it
            self.h = None
            if h is None:
                self.hv = self.v
            else:
                h = h.view(-1, block_size)
                self.h = h / h.amax(1, keepdim=True).clamp_(min=TINY)
                torch.mul(self.v, self.h, out=self.hv)
            yield slice(start // block_size, start // block_size + self.count), base, zeros

    def sums(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """sum(h v c) and sum(h c c) by block, (n,)."""
        num = torch.mul(self.hv, c, out=self.t).sum(1)
        torch.mul(c, c, out=self.t)
        return num, (self.t if self.h is None else self.t.mul_(self.h)).sum(1)

    def nearly(self, m: float) -> Iterator[Tensor]:
        """The levels nearest to v / m, then to v / -m, but for values within a cell's half of a threshold."""
        c = self.c
        if self.consecutive:
            lowest, highest = self.fmt.levels[0], self.fmt.levels[-1]
            r = torch.mul(self.v, 1 / m, out=self.encoder.x[: c.numel()].view_as(c)).round_()
            yield torch.clamp(r, lowest, highest, out=c)
            yield torch.clamp(r, -highest, -lowest, out=c).neg_()
            return
        index = self.encoder.index[: c.numel()]
        torch.add(self.shift, self.v, alpha=_CELLS_PER_UNIT / m, out=c)
        index.copy_(c.view(-1))
        for table in (self.table, self.mirrored):
            torch.index_select(table, 0, index, out=c.view(-1))
            yield c

    def error(self, rel: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
        """The exact squared error by block (n,) with ``rel`` (n,) as scales, and the levels less ``zero``."""
        numel = self.v.numel()
        x = self.encoder.x[:numel].view_as(self.v)
        torch.mul(self.v, reference.away_from_zero(rel).reciprocal()[:, None], out=x)
        if zero is not None:
            x.add_(zero)
        codes = self.encoder.codes(numel)
        c = self.c
        if self.consecutive:
            c.view(-1).copy_(codes)
            c.add_(self.fmt.levels[0])
        else:
            index = self.encoder.index[:numel].copy_(codes)
            torch.index_select(self.levels, 0, index, out=c.view(-1))
        if zero is not None:
            c.sub_(zero)
        return self.residual(c, rel, None), c

    def residual(self, c: Tensor, s: Tensor, b: Tensor | None) -> Tensor:
        """sum(h (s c + b - v)**2) by block, (n,)."""
        t = torch.mul(c, s[:, None], out=self.t).sub_(self.v)
        if b is not None:
            t.add_(b[:, None])
        t.mul_(t)
        return (t if self.h is None else t.mul_(self.h)).sum(1)


def nearest(x: Tensor, fmt: Format) -> Tensor:
    """The nearest levels, float32, of ``x`` in units of the levels."""
    t = tables(fmt, x.device)
    return t.levels[t.order.int()][torch.bucketize(x, t.thresholds, out_int32=True)]


def _ratio(num: Tensor, den: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where(den > TINY, num / den.clamp(min=TINY), otherwise)


def _search_symmetric(work: _Workspace, signed: bool) -> Tensor:
    """The best scale of each block as a multiple of its absmax scale, (n,)."""
    one = work.v.new_ones(work.count)
    best, best_gain = one, torch.full_like(one, 0.0 if work.coarse else -math.inf)
    for m in multipliers(work.fmt, False):
        for c in itertools.islice(work.nearly(m), 2 if signed else 1):
            num, den = work.sums(c)
            fit = _ratio(num, den, one)
            gain = num * fit if work.coarse else -work.residual(c, fit, None)
            better = gain > best_gain
            best_gain, best = torch.where(better, gain, best_gain), torch.where(better, fit, best)
    chosen, (chosen_error, _) = one, work.error(one, None)
    for _ in range(_REFINEMENTS):
        error, c = work.error(best, None)
        better = error < chosen_error
        chosen, chosen_error = torch.where(better, best, chosen), torch.where(better, error, chosen_error)
        best = _ratio(*work.sums(c), best)
    return chosen


def _search_affine(work: _Workspace, base_zeros: Tensor) -> tuple[Tensor, Tensor]:
    """The best scale of each block as a multiple of its range's, (n,), and its zero point, uint8 (n,)."""
    fmt, top = work.fmt, work.fmt.unit
    one, zero = work.v.new_ones(work.count), reference.dense_zeros(base_zeros, fmt)
    low, high = -zero, top - zero
    total = one * work.block_size if work.h is None else work.h.sum(1).clamp_(min=TINY)
    v_sum = work.hv.sum(1)
    best, best_zero = one, zero
    best_gain = torch.full_like(one, 0.0 if work.coarse else -math.inf)
    for p, q in itertools.product(_AFFINE_GRID[fmt.bits], repeat=2):
        scale = ((high * q - low * p) / top).clamp_(min=TINY)
        c = torch.mul(work.v, scale.reciprocal()[:, None], out=work.c).sub_((low * p / scale)[:, None])
        c.round_().clamp_(0, top)
        s, b, gain = _fit_line(work, c, v_sum, total)
        if not work.coarse:
            gain = -work.residual(c, s, b)
        better = (gain > best_gain) & (s > 0)
        best_gain, best = torch.where(better, gain, best_gain), torch.where(better, s, best)
        best_zero = torch.where(better, -b / s, best_zero)
    chosen, chosen_zeros, (chosen_error, _) = one, base_zeros, work.error(one, zero[:, None])
    for _ in range(_REFINEMENTS):
        zeros = reference.quantize_zeros(best_zero, fmt)
        zero = reference.dense_zeros(zeros, fmt)[:, None]
        _, c = work.error(best, zero)
        best = _ratio(*work.sums(c), best)  # the scale that goes with the zero point as stored
        error, c = work.error(best, zero)
        better = error < chosen_error
        chosen, chosen_error = torch.where(better, best, chosen), torch.where(better, error, chosen_error)
        chosen_zeros = torch.where(better, zeros, chosen_zeros)
        s, b, _ = _fit_line(work, c.add_(zero), v_sum, total)
        best, best_zero = torch.where(s > 0, s, best), torch.where(s > 0, -b / s, best_zero)
    return chosen, chosen_zeros


def _fit_line(work: _Workspace, c: Tensor, v_sum: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares v = s c + b: s, b and the error that s takes off, each (n,)."""
    num, den = work.sums(c)
    c_sum = (c if work.h is None else torch.mul(c, work.h, out=work.t)).sum(1)
    cc, cv = den - c_sum * c_sum / total, num - c_sum * v_sum / total
    s = torch.where(cc > TINY, cv / cc.clamp(min=TINY), torch.zeros_like(cc))
    return s, (v_sum - s * c_sum) / total, s * cv
