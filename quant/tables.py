"""A format's numbers as tensors on a device: levels, thresholds between them, and their order."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from quant import formats
from quant.formats import Format


class Tables(NamedTuple):
    """Attributes:
    levels: float32 (2**bits,), by code.
    thresholds: float32 (2**bits - 1,), midpoints of neighbouring levels in ascending order.
    order: uint8 (2**bits,), the code of the k-th smallest level (equal levels by code).
    """

    levels: Tensor
    thresholds: Tensor
    order: Tensor


def tables(fmt: Format, device: torch.device) -> Tables:
    """The tables of ``fmt`` on ``device``, built once."""
    return _tables(fmt.name, device)


@functools.cache
def _tables(name: str, device: torch.device) -> Tables:
    fmt = formats.get(name)
    # a table outlives the mode it was first asked for in, and inference tensors can't be used in autograd
    with torch.inference_mode(False), torch.no_grad():
        levels = torch.tensor(fmt.levels, dtype=torch.float32)
        order = sorted(range(len(fmt.levels)), key=lambda code: (fmt.levels[code], code))
        ranked = levels[order]
        thresholds = (ranked[:-1] + ranked[1:]) / 2
        return Tables(
            levels.to(device), thresholds.to(device), torch.tensor(order, dtype=torch.uint8, device=device)
        )
