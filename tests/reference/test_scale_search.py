"""The search for scales against a fine grid of scales and zero points, each rounded exactly in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant import QuantSpec, formats, quantize
from quant.formats import Format
from tests.reference.float64 import weight

BLOCK = 32
# Squared error of the search over that of the grid, measured 1.0006 (fp4) to 1.0072 (uint4), 1.048 at int8,
# where 12 multiples are tried and all but 1e-5 of a block is explained anyway. Absmax scales: 1.15 to 1.9.
BOUND = {2: 1.006, 3: 1.007, 4: 1.009, 8: 1.06}


def best_symmetric(v: Tensor, fmt: Format) -> Tensor:
    """Least squared error of the blocks ``v`` (n, BLOCK), over scales of either sign."""
    levels = torch.tensor(fmt.levels, dtype=torch.float32).double().sort()[0]
    base = v.abs().amax(1) / levels.abs().max()
    best = torch.full((v.shape[0],), torch.inf, dtype=torch.float64)
    for multiple in torch.linspace(0.15, 1.4, 500):
        for scale in (base * multiple, -base * multiple):
            rank = torch.bucketize(v / scale[:, None], (levels[1:] + levels[:-1]) / 2)
            best = torch.minimum(best, (levels[rank] * scale[:, None] - v).square().sum(1))
    return best


def best_affine(v: Tensor, fmt: Format) -> Tensor:
    """The same over parts of the range on either side of zero; zero points as they are stored."""
    low, high = v.amin(1).clamp(max=0), v.amax(1).clamp(min=0)
    best = torch.full((v.shape[0],), torch.inf, dtype=torch.float64)
    step = 2.0 ** (fmt.bits - 8)
    for below in torch.linspace(0.15, 1.05, 40):
        for above in torch.linspace(0.15, 1.05, 40):
            scale = ((high * above - low * below) / fmt.unit).clamp(min=1e-30)
            zero = (-low * below / scale / step).round().clamp(0, 255) * step
            codes = (v / scale[:, None] + zero[:, None]).round().clamp(0, fmt.unit)
            best = torch.minimum(best, ((codes - zero[:, None]) * scale[:, None] - v).square().sum(1))
    return best


@pytest.mark.parametrize("name", formats.names())
def test_search_is_as_good_as_a_fine_grid(name: str) -> None:
    fmt = formats.get(name)
    w = torch.randn(BLOCK * 300) * (torch.rand(BLOCK * 300) + 0.1)
    rule = "mse" if fmt.affine else "signed-mse"
    v = w.double().view(-1, BLOCK)
    found = (weight(quantize(w, QuantSpec(name, BLOCK), scales=rule)) - w.double()).square().sum()
    best = (best_affine if fmt.affine else best_symmetric)(v, fmt).sum()
    assert found < BOUND[fmt.bits] * best
