"""Quantising on a CPU with one loop that torch.compile makes: absmax, comparisons and packing in registers.

Asked for by name alone, never taken by ``auto``: the first tensor of a format and block size waits for a C++
compiler (4 to 20 s). Afterwards 4096 x 4096 NF4 takes half of ``lookup``'s time (benchmarks/NOTES.md).
Codes that share a byte are taken apart by strided views before they are compared, so that the loop packs
whole registers; packing neighbours afterwards made the same loop five times slower. Decoding is ``lookup``'s.
Equal to ``reference`` to the bit.
"""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quant.backends import lookup
from quant.formats import Format
from quant.packing import packed_bytes
from quant.tables import tables

_CHUNK = 1 << 20  # elements a call: one compiled shape for every tensor; what is left over is `lookup`'s
_COMPILERS = ("g++", "clang++", "c++", "cl")

dequantize = lookup.dequantize


def unavailable(device: torch.device, fmt: Format, block_size: int) -> str | None:
    """Why this backend can't serve such a tensor, or None."""
    if device.type != "cpu":
        return "it is for CPUs"
    ascending = all(a < b for a, b in itertools.pairwise(fmt.levels))
    if fmt.affine or fmt.signed or fmt.unit != 1 or fmt.bits not in (2, 4) or not ascending:
        return "it is for formats of 2 or 4 bits whose levels ascend to 1, such as nf4"
    if not any(map(shutil.which, _COMPILERS)):
        return f"it needs a C++ compiler ({', '.join(_COMPILERS)})"
    return None


def quantize(weight: Tensor, fmt: Format, block_size: int) -> tuple[Tensor, Tensor, None]:
    """As ``reference.quantize``."""
    flat = weight.reshape(-1)
    packed = torch.empty(packed_bytes(flat.numel(), fmt.bits), dtype=torch.uint8)
    scales = torch.empty(-(-flat.numel() // block_size))
    whole = flat.numel() - flat.numel() % _CHUNK
    for start in range(0, whole, _CHUNK):
        piece = flat[start : start + _CHUNK].view(-1, block_size)
        codes, absmax = _loop(fmt.name, block_size)(piece, _thresholds(fmt), fmt.bits)
        packed[start * fmt.bits // 8 :][: codes.numel()] = codes.view(-1)
        scales[start // block_size :][: absmax.numel()] = absmax
    if whole < flat.numel():
        codes, absmax, _ = lookup.quantize(flat[whole:], fmt, block_size)
        packed[whole * fmt.bits // 8 :] = codes
        scales[whole // block_size :] = absmax
    return packed, scales, None


def _thresholds(fmt: Format) -> tuple[float, ...]:
    return tuple(tables(fmt, torch.device("cpu")).thresholds.tolist())


@functools.cache
def _loop(name: str, block_size: int) -> Callable[..., Any]:
    """One compiled function for each format and block size: a shared one would run out of recompilations."""
    return torch.compile(_quantize_blocks, dynamic=False)


def _quantize_blocks(piece: Tensor, thresholds: tuple[float, ...], bits: int) -> tuple[Tensor, Tensor]:
    """Packed codes uint8 (n, block_size * bits / 8) and scales (n,) of blocks (n, block_size)."""
    blocks = piece.float()
    scales = blocks.abs().amax(1)
    factor = scales.clamp_min(1e-38).reciprocal()[:, None]
    together = 8 // bits  # codes in a byte, the first on top
    byte: Tensor | None = None
    for k in range(together):
        x = blocks[:, k::together] * factor
        rank = torch.zeros_like(x)  # in float32: narrowing once at the end keeps the loop in registers
        for threshold in thresholds:
            rank = rank + (x > threshold).to(torch.float32)
        byte = rank if byte is None else byte * 2**bits + rank
    assert byte is not None
    return byte.to(torch.int32).to(torch.uint8), scales
