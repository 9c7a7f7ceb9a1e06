"""Double quantisation: the float32 scales themselves as 8-bit codes, in blocks of 256.

Two layouts, both decoded by the same ``map[code] * nested_scale + offset`` (and by bitsandbytes):

- plain, bitsandbytes' own: the mean is taken off, then the signed dynamic map;
- signed, for scales of either sign: no offset, and a map of two mirrored logarithmic ladders. The dynamic map
  would spend its finest steps around zero, where signed scales have none.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.spec import NESTED_BLOCK_SIZE as BLOCK

_TINY = 1e-38
# smallest step of a signed ladder, as a fraction of the largest scale of 256. 0.1 (steps of 1.8 %) serves
# ordinary weights; the others keep weights whose scales spread wider, and the best for the tensor is taken
_LADDERS = (0.1, 0.03, 0.01, 0.001)


@functools.cache
def _dynamic_map(device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        values = [0.0, 1.0]
        for exponent in range(7):
            edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
            means = (edges[:-1] + edges[1:]) / 2.0
            step = (10 ** (exponent - 6)) * means
            values += step.tolist() + (-step).tolist()
        return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """bitsandbytes' signed dynamic 8-bit map, float32 (256,), ascending from -.9930 to 1; a fresh tensor.

    Source: Dettmers 2016, arXiv:1511.04561; equal to ``bitsandbytes.functional.create_dynamic_map()``.
    """
    return _dynamic_map(torch.device(device)).clone()


def ladder_map(lowest: float, device: torch.device | str = "cpu") -> Tensor:
    """Float32 (256,), ascending: +-logspace from ``lowest`` to 1, 128 steps on each side, no zero."""
    exponents = torch.linspace(0, 1, 128, dtype=torch.float64)
    positive = (lowest ** (1 - exponents)).to(torch.float32)
    return torch.cat([-positive.flip(0), positive]).to(device)


class Nested(NamedTuple):
    """Double-quantised scales.

    Attributes:
        codes: uint8 (n_blocks,).
        scales: float32 (ceil(n_blocks / 256),), one for 256 codes.
        offset: float32 ().
        map: float32 (256,), the value of each code.
    """

    codes: Tensor
    scales: Tensor
    offset: Tensor
    map: Tensor


def double_quantize(scales: Tensor, *, signed: bool = False) -> Nested:
    """Scales to 8-bit codes, nearest level, ties to the lower one.

    Args:
        scales: float32 (n_blocks,).
        signed: Use the layout for scales of either sign. The plain layout takes them too, but coarsely.

    The codes follow the exact nearest rule. bitsandbytes' CPU encoder uses a 65,536-cell table instead and
    differs from it (and from its own CUDA code) by one level in about 0.2 % of the codes.
    """
    if signed:
        offset = torch.zeros((), device=scales.device)
        ladders = torch.stack([ladder_map(lowest, scales.device) for lowest in _LADDERS])  # (4, 256)
        tried = [_encode(scales, ladder) for ladder in ladders]
        errors = torch.stack(
            [
                (double_dequantize(codes, nested, offset, ladder) - scales).square().sum()
                for (codes, nested), ladder in zip(tried, ladders, strict=True)
            ]
        )
        best = errors.argmin()  # stays on the device: no synchronisation
        return Nested(torch.stack([codes for codes, _ in tried])[best], tried[0][1], offset, ladders[best])
    offset = scales.mean() if scales.numel() else torch.zeros((), device=scales.device)
    mapping = dynamic_map(scales.device)
    codes, nested = _encode(scales - offset, mapping)
    return Nested(codes, nested, offset, mapping)


def double_dequantize(codes: Tensor, nested_scales: Tensor, offset: Tensor, mapping: Tensor) -> Tensor:
    """``map[code] * nested_scale + offset``, float32 (n_blocks,); product and sum are rounded separately."""
    values = torch.index_select(mapping, 0, codes.int())  # (n_blocks,)
    whole = values.numel() - values.numel() % BLOCK
    values[:whole].view(-1, BLOCK).mul_(nested_scales[: whole // BLOCK, None])
    if whole < values.numel():
        values[whole:].mul_(nested_scales[whole // BLOCK])
    return values.add_(offset)


def _encode(values: Tensor, mapping: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest codes of ``values`` (n,) in blocks of 256 and their absmax (ceil(n / 256),)."""
    short = -values.numel() % BLOCK
    blocks = F.pad(values, (0, short)).view(-1, BLOCK)
    nested = blocks.abs().amax(1) if blocks.numel() else values.new_empty(0)
    x = (blocks * nested.clamp(min=_TINY).reciprocal()[:, None]).clamp_(-1, 1)
    codes = torch.bucketize(x, (mapping[:-1] + mapping[1:]) / 2, out_int32=True).to(torch.uint8)
    return codes.view(-1)[: values.numel()], nested
