"""Plain torch, any device, fast on a CPU; equal to ``reference`` to the bit.

Decoding gathers one table row a byte (or 12 bits, for 3-bit codes): two or four float32 at once, moved as one
int64 or complex128. Encoding cuts the axis into cells that hold at most one threshold each: a table says how
many thresholds lie below a cell and which one to compare with. Two neighbours share a gather. Everything runs
over chunks whose buffers stay in the cache and are reused; fresh pages cost as much as the arithmetic.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from quant import formats
from quant.backends import reference
from quant.formats import Format
from quant.packing import packed_bytes
from quant.tables import tables

_CHUNK = {"cpu": 1 << 17}  # elements in flight: 2 MiB of buffers
_CHUNK_ELSEWHERE = 1 << 24
_MARGIN = (
    2.0**-8
)  # a threshold's least distance from a cell's edge, in cells: 16 times the rounding error there
_MAX_PAIR_CELLS = 128  # two cell numbers in an int16


def unavailable(device: torch.device, fmt: Format, block_size: int) -> str | None:
    """Why this backend can't serve such a tensor; None: it can, always."""
    return None


# Encoding


class _Cells(NamedTuple):
    """Cell of x: floor(x * per_unit + offset), clamped to [0, n_cells). No threshold is near an edge.

    ``thresholds`` float32 (n_cells,) and ``ranks`` uint8 (n_cells,): the cell's threshold (inf: none) and how
    many lie below the cell. ``pairs`` and ``pair_ranks`` (256 * n_cells,): the same for two neighbours, by
    cell + 256 * next cell: two float32 as one int64, two uint8 as one int16; empty if cells are many.
    """

    per_unit: float
    offset: Tensor
    n_cells: int
    thresholds: Tensor
    ranks: Tensor
    pairs: Tensor
    pair_ranks: Tensor


@functools.cache
def _cells(name: str, device: torch.device) -> _Cells:
    with torch.inference_mode(False), torch.no_grad():
        thresholds = tables(formats.get(name), torch.device("cpu")).thresholds
        for power, shift in itertools.product(range(-7, 12), (0.0, 0.5)):
            at = thresholds.double() * 2.0**power + shift
            cells = at.floor()
            edge = torch.minimum(at - cells, cells + 1 - at)
            if cells.unique().numel() == at.numel() and edge.min() >= _MARGIN:
                break
        else:
            raise ValueError(f"format {name!r}: thresholds too close for a table of cells")
        first, count = int(cells[0]), int(cells[-1] - cells[0]) + 1
        table = torch.full((count,), math.inf)
        table[(cells - first).long()] = thresholds
        ranks = torch.cat([torch.zeros(1), table.isfinite().cumsum(0)[:-1]]).to(torch.uint8)
        pairs, pair_ranks = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int16)
        if count <= _MAX_PAIR_CELLS:
            both = torch.arange(256 * count)
            left, right = (both % 256).clamp(max=count - 1), both // 256
            pairs = torch.stack([table[left], table[right]], 1).view(torch.int64).view(-1)
            pair_ranks = torch.stack([ranks[left], ranks[right]], 1).view(torch.int16).view(-1)
        return _Cells(
            2.0**power,
            torch.tensor(shift - first),
            count,
            table.to(device),
            ranks.to(device),
            pairs.to(device),
            pair_ranks.to(device),
        )


class Encoder:
    """Buffers and tables that encode up to ``chunk`` elements at a time."""

    def __init__(self, fmt: Format, device: torch.device, chunk: int) -> None:
        self.fmt = fmt
        self.sorted_codes = list(fmt.levels) == sorted(fmt.levels) and len(set(fmt.levels)) == len(fmt.levels)
        self.order = tables(fmt, device).order
        self.one_per_unit = fmt.bits == 8 and all(b - a == 1 for a, b in itertools.pairwise(fmt.levels))
        self.cells = None if self.one_per_unit else _cells(fmt.name, device)
        self.x = torch.empty(chunk, device=device)
        self.y = torch.empty(chunk, device=device)
        self.index = torch.empty(chunk, dtype=torch.int32, device=device)
        self.code = torch.empty(chunk, dtype=torch.uint8, device=device)
        self.above = torch.empty(chunk, dtype=torch.bool, device=device)

    def encode(self, numel: int, out: Tensor) -> None:
        """Pack the codes of ``self.x[:numel]``, in units of the levels, into ``out``; spoils x and y."""
        _pack(self.codes(numel), self.fmt.bits, self.index.view(torch.uint8), out)

    def codes(self, numel: int) -> Tensor:
        """The codes of ``self.x[:numel]`` in units of the levels, uint8, a buffer; spoils x and y."""
        x, y, index = self.x[:numel], self.y[:numel], self.index[:numel]
        codes, above = self.code[:numel], self.above[:numel]
        if self.cells is None:  # the levels are consecutive integers: round half down, without a table
            torch.floor(x, out=y)
            y.add_(0.5)
            x.gt_(y)
            y.add_(x).sub_(self.fmt.levels[0] + 0.5).clamp_(0, len(self.fmt.levels) - 1)
            index.copy_(y)
            return codes.copy_(index)  # float32 to uint8 in one step is four times slower
        cells = self.cells
        torch.add(cells.offset, x, alpha=cells.per_unit, out=y)
        y.clamp_(0, cells.n_cells - 0.5)
        index.copy_(y)  # rounds towards zero
        if cells.pairs.numel():
            codes.copy_(index)
            half = index[: numel // 2]
            half.copy_(codes.view(torch.int16))
            torch.index_select(cells.pairs, 0, half, out=y.view(torch.int64))
            torch.index_select(cells.pair_ranks, 0, half, out=codes.view(torch.int16))
        else:
            index.clamp_(min=0)  # a NaN would be out of range
            torch.index_select(cells.thresholds, 0, index, out=y)
            torch.index_select(cells.ranks, 0, index, out=codes)
        above.copy_(x.gt_(y))  # comparing into float32 and narrowing is three times faster than into bool
        codes.add_(above.view(torch.uint8))
        if not self.sorted_codes:
            index.copy_(codes)
            torch.index_select(self.order, 0, index, out=codes)
        return codes


def quantize(weight: Tensor, fmt: Format, block_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """As ``reference.quantize``."""
    flat = weight.reshape(-1)
    blocks = -(-flat.numel() // block_size)
    scales = torch.empty(blocks, device=flat.device)
    zeros = torch.empty(blocks, dtype=torch.uint8, device=flat.device) if fmt.affine else None
    return _encode(flat, fmt, block_size, scales, zeros, choose_scales=True), scales, zeros


def encode(weight: Tensor, fmt: Format, block_size: int, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """As ``reference.encode``."""
    return _encode(weight.reshape(-1), fmt, block_size, scales, zeros, choose_scales=False)


def _encode(
    flat: Tensor, fmt: Format, block_size: int, scales: Tensor, zeros: Tensor | None, *, choose_scales: bool
) -> Tensor:
    """Packed codes; with ``choose_scales`` the absmax rule's scales and zeros are written first."""
    packed = torch.empty(packed_bytes(flat.numel(), fmt.bits), dtype=torch.uint8, device=flat.device)
    whole = flat.numel() - flat.numel() % block_size
    chunk = min(_CHUNK.get(flat.device.type, _CHUNK_ELSEWHERE), whole)
    encoder = Encoder(fmt, flat.device, chunk) if whole else None
    for start in range(0, whole, chunk or 1):
        assert encoder is not None
        stop = min(start + chunk, whole)
        here = slice(start // block_size, stop // block_size)
        x, y = (buffer[: stop - start].view(-1, block_size) for buffer in (encoder.x, encoder.y))
        piece = flat[start:stop].view(-1, block_size)  # (n, block_size)
        if piece.dtype != torch.float32:
            piece = x.copy_(piece)
        zero = None if zeros is None else zeros[here]
        if choose_scales and (fmt.affine or fmt.signed):
            scales[here], some_zeros = reference.absmax_scales(piece, fmt, block_size)
            if zero is not None and some_zeros is not None:
                zero.copy_(some_zeros)
        elif choose_scales:
            torch.abs(piece, out=y)
            torch.amax(y, 1, out=scales[here])
            if fmt.unit != 1:
                scales[here] /= scales.new_full((1,), fmt.unit)  # on CUDA a number would be multiplied
        torch.mul(piece, reference.away_from_zero(scales[here]).reciprocal_()[:, None], out=x)
        if zero is not None:
            x.add_(reference.dense_zeros(zero, fmt)[:, None])
        encoder.encode(stop - start, packed[start * fmt.bits // 8 : stop * fmt.bits // 8])
    if whole < flat.numel():  # the short last block has its own arithmetic
        if choose_scales:
            scales[-1:], last_zeros = reference.absmax_scales(flat[whole:], fmt, block_size)
            if zeros is not None and last_zeros is not None:
                zeros[-1:] = last_zeros
        last = None if zeros is None else zeros[-1:]
        packed[whole * fmt.bits // 8 :] = reference.encode(flat[whole:], fmt, block_size, scales[-1:], last)
    return packed


def _pack(codes: Tensor, bits: int, scratch: Tensor, out: Tensor) -> None:
    """``packing.pack`` on whole words (little-endian: the first code is a word's lowest byte).

    ``codes`` uint8, a multiple of 16; ``scratch`` uint8, at least twice as many bytes.
    """
    numel = codes.numel()
    if bits == 8:
        out.copy_(codes)
        return
    word = {2: torch.int32, 3: torch.int64, 4: torch.int16}[bits]
    v, a, b = (buffer.view(word) for buffer in (codes, scratch[:numel], scratch[numel : 2 * numel]))
    if bits == 4:
        torch.bitwise_left_shift(v, 4, out=a).bitwise_or_(torch.bitwise_right_shift(v, 8, out=b))
        out.copy_(a)  # keeps the lowest byte
    elif bits == 2:
        torch.bitwise_left_shift(v, 6, out=a)
        for shift in (4, 14, 24):
            a.bitwise_or_(torch.bitwise_right_shift(v, shift, out=b))
        out.copy_(a)
    else:  # neighbours are joined to 6, 12, 24 bits, the first always on top
        for left, right, mask in (
            (3, 8, 0x003F003F003F003F),
            (6, 16, 0x00000FFF00000FFF),
            (12, 32, 0xFFFFFF),
        ):
            torch.bitwise_right_shift(v, right, out=b)
            v = torch.bitwise_left_shift(v, left, out=a).bitwise_or_(b).bitwise_and_(mask)
        triples = out.view(-1, 3)
        for i in range(3):
            triples[:, i].copy_(torch.bitwise_right_shift(v, 16 - 8 * i, out=b))


# Decoding


class _Rows(NamedTuple):
    """``table``: one row of values an index, as one wide number; ``values`` float32 in a row."""

    table: Tensor
    values: int


@functools.cache
def _rows(name: str, device: torch.device) -> _Rows:
    fmt = formats.get(name)
    with torch.inference_mode(False), torch.no_grad():
        levels = tables(fmt, torch.device("cpu")).levels
        values = {2: 4, 3: 4, 4: 2, 8: 1}[fmt.bits]
        index = torch.arange(2 ** (fmt.bits * values))
        shifts = range(fmt.bits * (values - 1), -1, -fmt.bits)  # the first code is in the highest bits
        rows = torch.stack([levels[(index >> shift) & (2**fmt.bits - 1)] for shift in shifts], 1)
        return _Rows(rows.view(_WIDE[values]).view(-1).to(device), values)


_WIDE = {1: torch.float32, 2: torch.int64, 4: torch.complex128}


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, fmt: Format, block_size: int, start: int, out: Tensor
) -> Tensor:
    """As ``reference.dequantize``."""
    flat = out.view(-1)
    stop = start + flat.numel()
    first = min(-(-start // block_size) * block_size, stop)  # whole blocks are first ... last
    last = max(stop - stop % block_size, first)
    for a, b in ((start, first), (last, stop)):
        if a < b:
            reference.dequantize(codes, scales, zeros, fmt, block_size, a, flat[a - start : b - start])
    if first == last:
        return out
    rows = _rows(fmt.name, flat.device)
    wide = _WIDE[rows.values]
    chunk = min(_CHUNK.get(flat.device.type, _CHUNK_ELSEWHERE), last - first)
    index = torch.empty(chunk // rows.values, dtype=torch.int32, device=flat.device)
    main = flat[first - start : last - start]
    direct = main.dtype == torch.float32 and main.storage_offset() % rows.values == 0
    buffer = None if direct else torch.empty(chunk, device=flat.device)
    for a in range(first, last, chunk):
        b = min(a + chunk, last)
        target = main[a - first : b - first]
        values = target if buffer is None else buffer[: b - a]
        picks = index[: (b - a) // rows.values]
        part = codes[a * fmt.bits // 8 : b * fmt.bits // 8]
        if fmt.bits == 3:
            _index_triples(part.view(-1, 3), picks.view(-1, 2))
        else:
            picks.copy_(part)
        torch.index_select(rows.table, 0, picks, out=values.view(wide))
        blocks, here = values.view(-1, block_size), slice(a // block_size, b // block_size)
        if zeros is not None:
            blocks.sub_(reference.dense_zeros(zeros[here], fmt)[:, None])
        blocks.mul_(scales[here, None])
        if values is not target:
            target.copy_(values)
    return out


def _index_triples(triples: Tensor, out: Tensor) -> None:
    """Bytes (n, 3) of eight 3-bit codes to two 12-bit indices, int32 (n, 2)."""
    out[:, 0] = triples[:, 0]
    middle = triples[:, 1].int()  # (n,)
    out[:, 0].bitwise_left_shift_(4).bitwise_or_(middle >> 4)
    out[:, 1] = middle.bitwise_and_(15).bitwise_left_shift_(8).bitwise_or_(triples[:, 2])
