"""The fast backend equals the reference to the bit: formats, ties, tails, offsets, dtypes, bad values."""

import pytest
import torch

from quant import formats
from quant.backends import lookup, reference
from quant.tables import tables

SIZES = [0, 1, 15, 16, 17, 63, 64, 65, 1000, 4096, 140001]  # the last is longer than one chunk
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(numel, fmt, dtype=torch.float32):
    """Gaussian, with the format's thresholds and their neighbours planted in blocks whose scale is one."""
    gen = torch.Generator().manual_seed(numel)
    w = torch.randn(numel, generator=gen)
    t = tables(fmt, w.device).thresholds
    far = torch.tensor(torch.inf)
    ties = torch.cat([t, torch.nextafter(t, far), torch.nextafter(t, -far)]) / fmt.unit
    count = min(numel, ties.numel())
    w[:count] = ties[:count]
    return w.to(dtype)


def same(a, b):
    return (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("name", formats.names())
@pytest.mark.parametrize("block_size", [16, 64, 4096])
def test_quantize_equals_reference(name, block_size):
    fmt = formats.get(name)
    for numel in SIZES:
        for dtype in DTYPES:
            w = weights(numel, fmt, dtype)
            expected, found = (b.quantize(w, fmt, block_size) for b in (reference, lookup))
            assert all(map(same, expected, found)), (numel, dtype)


@pytest.mark.parametrize("name", formats.names())
def test_encode_equals_reference_under_any_scales(name):
    fmt = formats.get(name)
    for numel in SIZES:
        w = weights(numel, fmt)
        gen = torch.Generator().manual_seed(1)
        scales = torch.randn(-(-numel // 64), generator=gen)
        scales[::5] *= 1e-3
        scales[1::7] = 0.0
        zeros = torch.randint(0, 256, scales.shape, generator=gen, dtype=torch.uint8) if fmt.affine else None
        for s, x in (
            (scales, w),
            (torch.ones_like(scales), w * fmt.unit),
            (-torch.ones_like(scales), w * fmt.unit),
        ):
            assert torch.equal(reference.encode(x, fmt, 64, s, zeros), lookup.encode(x, fmt, 64, s, zeros)), (
                numel
            )


@pytest.mark.parametrize("name", formats.names())
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_equals_reference_from_any_start(name, dtype):
    fmt = formats.get(name)
    for numel in SIZES:
        codes, scales, zeros = reference.quantize(weights(numel, fmt), fmt, 64)
        scales[::2] *= -1
        for start, stop in (
            (0, numel),
            (numel // 3, numel),
            (numel // 3, numel - numel // 4),
            (min(1, numel), numel),
        ):
            expected = torch.empty(stop - start, dtype=dtype)
            reference.dequantize(codes, scales, zeros, fmt, 64, start, expected)
            for offset in (0, 3):  # a view that no wide number is aligned with
                found = torch.full((stop - start + offset,), torch.nan, dtype=dtype)[offset:]
                lookup.dequantize(codes, scales, zeros, fmt, 64, start, found)
                assert torch.equal(expected, found), (numel, start, stop, offset)


@pytest.mark.parametrize("name", formats.names())
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_quantize_shows_bad_values_in_their_block_only(name, bad):
    fmt = formats.get(name)
    w = weights(640, fmt)
    w[200] = bad
    _, scales, _ = lookup.quantize(w, fmt, 64)
    assert (~torch.isfinite(scales)).nonzero().flatten().tolist() == [3]


# consecutive 8-bit integers are rounded without a table
TABULATED = [name for name in formats.names() if name not in ("int8", "uint8")]


@pytest.mark.parametrize("name", TABULATED)
def test_cells_hold_one_threshold_each_away_from_their_edges(name):
    cells = lookup._cells(name, torch.device("cpu"))
    thresholds = tables(formats.get(name), torch.device("cpu")).thresholds
    assert torch.equal(cells.thresholds[cells.thresholds.isfinite()], thresholds)
    at = thresholds.double() * cells.per_unit + cells.offset.double()
    # the float32 error of the cell number is half a unit in the last place of at most n_cells
    assert ((at - at.round()).abs() > 4 * cells.n_cells * 2.0**-24).all()
