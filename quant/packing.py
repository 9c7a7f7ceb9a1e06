"""2-, 3-, 4- and 8-bit codes to bytes and back.

A big-endian bit stream: the first code takes the highest bits of the first byte. At 4 bits this is
bitsandbytes' "high nibble first"; at 3 bits eight codes fill three bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_GROUP = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}  # codes and bytes of the smallest whole group


def packed_bytes(numel: int, bits: int) -> int:
    """Bytes that ``numel`` codes of ``bits`` bits take."""
    _check_bits(bits)
    return -(-numel * bits // 8)


def pack(codes: Tensor, bits: int, *, fill: int = 0) -> Tensor:
    """Pack codes into bytes.

    Args:
        codes: uint8, any shape, each below 2**bits (not checked); taken in row-major order.
        bits: 2, 3, 4 or 8.
        fill: Code that fills the last byte (bitsandbytes pads NF4 with 7, the code of zero).

    Returns:
        uint8 (ceil(numel * bits / 8),).

    Raises:
        ValueError: another width. TypeError: ``codes`` is not uint8.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be uint8, got {codes.dtype}")
    flat = codes.reshape(-1)
    if bits == 8:
        return flat.clone()
    numel, (group, _) = flat.numel(), _GROUP[bits]
    if numel % group:
        flat = F.pad(flat, (0, group - numel % group), value=fill)
    c = flat.view(-1, group)  # (n_groups, group)
    if bits == 4:
        return (c[:, 0] << 4) | c[:, 1]
    if bits == 2:
        return (c[:, 0] << 6) | (c[:, 1] << 4) | (c[:, 2] << 2) | c[:, 3]
    packed = torch.empty((c.shape[0], 3), dtype=torch.uint8, device=c.device)
    # uint8 shifts drop the bits that leave the byte, which is what the stream needs
    packed[:, 0] = (c[:, 0] << 5) | (c[:, 1] << 2) | (c[:, 2] >> 1)
    packed[:, 1] = (c[:, 2] << 7) | (c[:, 3] << 4) | (c[:, 4] << 1) | (c[:, 5] >> 2)
    packed[:, 2] = (c[:, 5] << 6) | (c[:, 6] << 3) | c[:, 7]
    return packed.view(-1)[: packed_bytes(numel, bits)]


def unpack(packed: Tensor, bits: int, numel: int) -> Tensor:
    """The first ``numel`` codes of a packed stream.

    Args:
        packed: uint8, at least ceil(numel * bits / 8) bytes; taken in row-major order.
        bits: 2, 3, 4 or 8.
        numel: Codes wanted.

    Returns:
        uint8 (numel,).

    Raises:
        ValueError: another width, or too few bytes. TypeError: ``packed`` is not uint8.
    """
    need = packed_bytes(numel, bits)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed codes must be uint8, got {packed.dtype}")
    flat = packed.reshape(-1)
    if flat.numel() < need:
        raise ValueError(f"{flat.numel()} bytes hold fewer than {numel} codes of {bits} bits ({need} bytes)")
    flat = flat[:need]
    if bits == 8:
        return flat.clone()
    group, size = _GROUP[bits]
    if need % size:
        flat = F.pad(flat, (0, size - need % size))
    codes = torch.empty((flat.numel() // size, group), dtype=torch.uint8, device=flat.device)
    if bits in (2, 4):
        for i in range(group):
            codes[:, i] = (flat >> (8 - bits * (i + 1))) & (2**bits - 1)
    else:
        b = flat.view(-1, 3)
        codes[:, 0] = b[:, 0] >> 5
        codes[:, 1] = (b[:, 0] >> 2) & 7
        codes[:, 2] = ((b[:, 0] << 1) & 6) | (b[:, 1] >> 7)
        codes[:, 3] = (b[:, 1] >> 4) & 7
        codes[:, 4] = (b[:, 1] >> 1) & 7
        codes[:, 5] = ((b[:, 1] << 2) & 4) | (b[:, 2] >> 6)
        codes[:, 6] = (b[:, 2] >> 3) & 7
        codes[:, 7] = b[:, 2] & 7
    return codes.view(-1)[:numel]


def _check_bits(bits: int) -> None:
    if bits not in _GROUP:
        raise ValueError(f"{bits} bits a code; allowed: {', '.join(map(str, _GROUP))}")
