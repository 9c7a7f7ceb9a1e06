"""The column sweep's kernel against the plain loop, interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from qlora_engine.rounding import sweep
from quant import formats
from quant.backends import triton_rounding
from quant.tables import tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", ["nf4", "nf2", "int3", "uint4", "fp4"])
@pytest.mark.parametrize(("columns", "rows"), [(128, 64), (37, 33), (1, 5)])
def test_sweep_columns(name: str, columns: int, rows: int) -> None:
    fmt, generator = formats.get(name), torch.Generator().manual_seed(columns)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    levels = tables(fmt, torch.device("cpu")).levels.sort(stable=True)[0]
    scales = random(columns, rows)
    scales[:, 0] = 0.0  # a block of zeros
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    zeros = torch.rand(columns, rows, generator=generator) * fmt.unit if fmt.affine else None
    arguments = [
        random(columns, rows) * scales.abs().mean(),
        random(columns, rows),
        random(columns, columns) / columns,
        scales,
        inverse,
        zeros,
        levels,
        (levels[1:] + levels[:-1]) / 2,
    ]
    ranks, values = sweep._sweep_columns(*arguments)
    got_ranks, got_values = triton_rounding.sweep_columns(
        *(None if a is None else a.to(DEVICE).contiguous() for a in arguments)
    )
    # sums in another order can put a value on the other side of a midpoint, and its row with it
    same = (got_ranks.cpu() == ranks).all(0)
    assert float(same.float().mean()) >= 0.9
    torch.testing.assert_close(got_values.cpu()[:, same], values[:, same], rtol=1e-5, atol=1e-6)
    assert torch.isfinite(got_values).all()
