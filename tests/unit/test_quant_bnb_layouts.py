"""bitsandbytes' layouts by hand: the CPU's shuffled one, block sizes, and what is not quantised yet."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quant import QuantSpec, quantize
from quant.bnb_format import (
    BNB_BLOCK_SIZES,
    from_quant_state,
    int8_statistics,
    misread_on_cpu,
    why_not_bnb,
)


def shuffled(codes: torch.Tensor) -> torch.Tensor:
    """Nibbles (rows, columns) as bitsandbytes' CPU kernels keep them.

    For each 32 rows and each two columns there are 32 bytes: their low nibbles are the first half of these 64
    codes (row by row), their high nibbles are the rest.
    """
    rows, columns = codes.shape
    found: list[int] = []
    for row in range(0, rows, 32):
        for column in range(0, columns, 2):
            group = [int(codes[row + r, column + c]) for r in range(32) for c in range(2)]
            found += [low | high << 4 for low, high in zip(group[:32], group[32:])]
    return torch.tensor(found, dtype=torch.uint8)


@pytest.mark.parametrize("shape", [(32, 64), (64, 128), (96, 64)])
def test_shuffled_codes_are_put_in_order(shape: tuple[int, int]) -> None:
    q = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)), QuantSpec("nf4", 64))
    blocks = shape[1] // 64
    state = SimpleNamespace(
        quant_type="nf4",
        shape=shape,
        blocksize=64,
        original_dtype=torch.float32,
        packing_format_for_cpu=True,
        absmax=q.scales.view(shape[0], blocks).t().contiguous(),
    )
    again = from_quant_state(shuffled(q.unpacked_codes().view(shape)), state)
    assert torch.equal(again.unpacked_codes(), q.unpacked_codes())
    assert torch.equal(again.dequantize(), q.dequantize())


def test_block_sizes() -> None:
    assert BNB_BLOCK_SIZES == (32, 64, 128, 256, 512, 1024, 2048, 4096)
    for size in BNB_BLOCK_SIZES:
        assert why_not_bnb(QuantSpec("nf4", size)) is None
    assert "block sizes 32, 64, 128, 256, 512, 1024, 2048, 4096, not 16" in (
        why_not_bnb(QuantSpec("nf4", 16)) or ""
    )
    assert "holds fp4 and nf4, not int4" in (why_not_bnb(QuantSpec("int4", 64)) or "")


@pytest.mark.parametrize(
    ("shape", "misread"),
    [
        ((4, 64), False),
        ((4, 96), True),
        ((96,), False),
        ((3, 4, 128), False),
        ((3, 4, 65), False),
        ((3, 4, 80), True),
        ((4, 32), True),
    ],
)
def test_which_shapes_the_cpu_kernels_misread(shape: tuple[int, ...], misread: bool) -> None:
    assert misread_on_cpu(QuantSpec("nf4", 64), shape) is misread


@pytest.mark.parametrize(
    ("weight", "scb"),
    [
        (torch.zeros(2, 2, dtype=torch.int8), None),
        (torch.zeros(2, 2), torch.ones(2)),
        (torch.zeros(2, 2), None),
    ],
)
def test_int8_layer_that_is_not_quantised_yet(weight: torch.Tensor, scb: Any) -> None:
    module: Any = SimpleNamespace(weight=weight, state=SimpleNamespace(SCB=scb))
    with pytest.raises(ValueError, match="not quantised yet"):
        int8_statistics(module)


def test_int8_statistics_lie_with_the_weight_or_the_state() -> None:
    weight, scb = torch.ones(2, 4, dtype=torch.int8), torch.ones(2)
    module: Any = SimpleNamespace(weight=weight, state=SimpleNamespace(SCB=scb))
    assert int8_statistics(module)[1] is scb
