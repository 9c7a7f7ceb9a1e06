"""The truth: every backend's codes and values are defined by these few lines of plain torch.

Works on every device, a chunk of blocks at a time, and makes no attempt to be fast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quant import packing
from quant.formats import Format
from quant.tables import tables

TINY = 1e-38  # smallest divisor, bitsandbytes' constant
_CHUNK = 1 << 20  # elements in flight; whole blocks, so a multiple of every block size


def unavailable(device: torch.device, fmt: Format, block_size: int) -> str | None:
    """Why this backend can't serve such a tensor; None: it can, always."""
    return None


def quantize(weight: Tensor, fmt: Format, block_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Absmax scales (affine: the block's range) and the nearest codes.

    Args:
        weight: float32, bfloat16 or float16, any shape; taken flattened, row-major, computed in float32.
        fmt: Format.
        block_size: Elements a block; the last block may be short.

    Returns:
        packed codes uint8 (ceil(numel * bits / 8),), scales float32 (n_blocks,), zeros uint8 (n_blocks,) or
        None. NaN and inf are not looked for: they show as a non-finite scale.
    """
    flat = weight.reshape(-1)
    scales, zeros = absmax_scales(flat, fmt, block_size)
    return encode(flat, fmt, block_size, scales, zeros), scales, zeros


def absmax_scales(weight: Tensor, fmt: Format, block_size: int) -> tuple[Tensor, Tensor | None]:
    """Scales (float32 (n_blocks,)) and, affine, zeros (uint8 (n_blocks,)) of the absmax rule.

    A short last block that is all zero gets the scale 1e-38 / unit, not 0, as bitsandbytes' CPU code does.
    """
    flat = weight.reshape(-1)
    scales, zeros = [], []
    for start in range(0, flat.numel(), _CHUNK):
        blocks, short = _blocks(flat[start : start + _CHUNK], block_size)  # (n, block_size)
        if fmt.affine:
            low = blocks.amin(1).clamp_(max=0)  # zero stays in the range: a zero point must be in [0, unit]
            high = blocks.amax(1).clamp_(min=0)
            scale = _over(high - low, fmt.unit)
            zeros.append(quantize_zeros(-low / scale.clamp(min=TINY), fmt))
        elif fmt.signed:
            low, high = blocks.amin(1), blocks.amax(1)
            largest = torch.where(high >= -low, high, low)
            scale = _over(largest, fmt.unit)
        else:
            largest = blocks.abs().amax(1)
            if short:
                largest[-1].clamp_(min=TINY)
            scale = _over(largest, fmt.unit)
        scales.append(scale)
    if not scales:
        empty = torch.empty(0, device=flat.device)
        return empty, empty.to(torch.uint8) if fmt.affine else None
    return torch.cat(scales), torch.cat(zeros) if fmt.affine else None


def _over(values: Tensor, unit: float) -> Tensor:
    """True division: on CUDA torch multiplies by the rounded reciprocal of a number, but not of a tensor."""
    return values / values.new_full((1,), unit)


def quantize_zeros(zeros: Tensor, fmt: Format) -> Tensor:
    """Real zero points in [0, unit] to fixed point: uint8, in steps of 2**(bits - 8)."""
    return (zeros * 2 ** (8 - fmt.bits)).round_().clamp_(0, 255).to(torch.uint8)


def dense_zeros(zeros: Tensor, fmt: Format) -> Tensor:
    """Fixed-point zero points to float32, in units of the levels."""
    return zeros.float() * 2.0 ** (fmt.bits - 8)


def encode(weight: Tensor, fmt: Format, block_size: int, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Nearest codes under given scales, packed; a tie goes to the lower level.

    Args:
        weight: As for ``quantize``.
        fmt: Format.
        block_size: Elements a block.
        scales: float32 (n_blocks,), of either sign.
        zeros: uint8 (n_blocks,), affine formats only.

    Returns:
        uint8 (ceil(numel * bits / 8),).
    """
    flat = weight.reshape(-1)
    levels = tables(fmt, flat.device)
    packed = torch.empty(packing.packed_bytes(flat.numel(), fmt.bits), dtype=torch.uint8, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        piece = flat[start : start + _CHUNK]
        first, last = start // block_size, -(-(start + piece.numel()) // block_size)
        zero = None if zeros is None else zeros[first:last]
        x = normalise(piece, fmt, block_size, scales[first:last], zero)  # (numel of the piece,)
        codes = levels.order[torch.bucketize(x, levels.thresholds, out_int32=True)]
        part = packing.pack(codes, fmt.bits, fill=fmt.zero_code)
        packed[start * fmt.bits // 8 :][: part.numel()] = part
    return packed


def normalise(weight: Tensor, fmt: Format, block_size: int, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """The weight in units of its levels, float32 (numel,).

    Whole blocks are multiplied by the rounded reciprocal of the scale, a short last block is divided by the
    scale: bitsandbytes' CPU arithmetic, to the bit.
    """
    flat = weight.reshape(-1)
    blocks, short = _blocks(flat, block_size)
    scale = away_from_zero(scales)[:, None]  # (n, 1)
    x = blocks * scale.reciprocal()
    if short:
        x[-1] = blocks[-1] / scale[-1]
    if zeros is not None:
        x = x + dense_zeros(zeros, fmt)[:, None]
    return x.view(-1)[: flat.numel()]


def away_from_zero(scales: Tensor) -> Tensor:
    """The scales as divisors: those below 1e-38 in magnitude become 1e-38 of the same sign (0: positive)."""
    tiny = torch.full_like(scales, TINY).copysign_(scales)
    return torch.where(scales.abs() < TINY, tiny, scales)


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, fmt: Format, block_size: int, start: int, out: Tensor
) -> Tensor:
    """``(levels[code] - zero) * scale`` in float32, rounded once to ``out``'s dtype.

    Args:
        codes: uint8, packed, flat.
        scales: float32 (n_blocks,).
        zeros: uint8 (n_blocks,), affine formats only.
        fmt: Format.
        block_size: Elements a block.
        start: First element wanted.
        out: Contiguous, any float dtype; receives ``out.numel()`` elements.

    Returns:
        ``out``.
    """
    levels = tables(fmt, codes.device).levels
    flat = out.view(-1)
    stop = start + flat.numel()
    for block_start in range(start - start % block_size, stop, _CHUNK):
        block_stop = min(block_start + _CHUNK, stop)
        first, last = block_start // block_size, -(-block_stop // block_size)
        part = codes[block_start * fmt.bits // 8 : -(-block_stop * fmt.bits // 8)]
        picked = levels[packing.unpack(part, fmt.bits, block_stop - block_start).int()]
        blocks, _ = _blocks(picked, block_size)  # (n, block_size)
        if zeros is not None:
            blocks = blocks - dense_zeros(zeros[first:last], fmt)[:, None]
        values = (blocks * scales[first:last, None]).view(-1)[: block_stop - block_start]
        skip = max(start - block_start, 0)
        flat[block_start + skip - start : block_stop - start] = values[skip:]
    return out


def _blocks(flat: Tensor, block_size: int) -> tuple[Tensor, bool]:
    """Float32 blocks (n, block_size), the last padded with zeros, and whether it was short."""
    short = flat.numel() % block_size
    values = flat.float()
    if short:
        values = F.pad(values, (0, block_size - short))
    return values.view(-1, block_size), bool(short)
