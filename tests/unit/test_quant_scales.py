"""quant.scales, quant.search and quant.nested: the rules, their errors, the nested layouts."""

import math

import pytest
import torch

from quant import formats, search
from quant.nested import double_dequantize, double_quantize, dynamic_map, ladder_map
from quant.scales import absmax_scales, search_nested_scales, search_scales
from quant.spec import QuantSpec
from quant.tensor import encode, from_codes

FORMATS = formats.names()
SYMMETRIC = [name for name in FORMATS if not formats.get(name).affine]


def block_errors(w, spec, scales, zeros, importance=None):
    """Squared error by block, weighted, in float64, of the nearest codes under the given scales."""
    q = from_codes(encode(w, spec, scales, zeros), scales, spec, w.shape, w.dtype, zeros)
    error = (q.dequantize(torch.float32).double() - w.double()).square()
    if importance is not None:
        error = error * importance.double().expand_as(w)
    flat = error.flatten()
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % spec.block_size))
    return flat.view(-1, spec.block_size).sum(1)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_absmax_scales_put_the_largest_on_the_outermost_level(name):
    fmt = formats.get(name)
    w = torch.randn(4, 64)
    scales, zeros = absmax_scales(w, QuantSpec(name))
    assert zeros is None
    assert torch.allclose(scales.abs() * fmt.unit, w.abs().amax(1))


def test_absmax_scales_of_affine_formats_span_the_range_and_zero():
    w = torch.stack([torch.linspace(-1, 3, 64), torch.linspace(2, 5, 64), torch.linspace(-5, -2, 64)])
    scales, zeros = absmax_scales(w, QuantSpec("uint4"))
    assert torch.allclose(scales, torch.tensor([4.0, 5.0, 5.0]) / 15)
    assert zeros.tolist() == [60, 0, 240]  # 1/4 of 15, nothing, all of it, in sixteenths


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_search_scales_never_loses_to_absmax(name, signed, weighted):
    torch.manual_seed(3)
    w = torch.distributions.StudentT(4.0).sample((50, 100)) * torch.logspace(-3, 3, 50)[:, None]
    importance = torch.rand(100) ** 4 if weighted else None
    for block_size in (16, 64, 1024):
        spec = QuantSpec(name, block_size)
        before = block_errors(w, spec, *absmax_scales(w, spec), importance)
        after = block_errors(w, spec, *search_scales(w, spec, signed, importance), importance)
        assert (after <= before * (1 + 1e-4)).all()
        if spec.bits <= 4:
            assert after.sum() < 0.97 * before.sum()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("signed", [False, True])
def test_search_scales_comes_near_the_best_of_a_fine_grid(name, signed):
    """Against 400 multiples of absmax, each ranked exactly after one least-squares fit, in float64."""
    fmt = formats.get(name)
    if fmt.affine:
        return _affine_is_near_a_fine_grid(name)
    torch.manual_seed(0)
    w = torch.randn(200, 64)
    spec = QuantSpec(name)
    base, _ = absmax_scales(w, spec)
    best = block_errors(w, spec, base, None)
    for m in torch.linspace(0.05, 1.3, 200).tolist():
        for sign in (1, -1) if signed else (1,):
            scales = base * m * sign
            levels = torch.tensor(fmt.levels, dtype=torch.float64)[encode(w, spec, scales).int()].view(
                w.shape
            )
            fit = (w.double() * levels).sum(1) / levels.square().sum(1).clamp(min=1e-30)
            best = torch.minimum(best, block_errors(w, spec, fit.float(), None))
    found = block_errors(w, spec, *search_scales(w, spec, signed))
    gain = 1.02 if spec.bits < 8 else 1.1  # 18 candidates for 200; at 8 bits the error is jagged
    assert found.sum() <= gain * best.sum()


def _affine_is_near_a_fine_grid(name):
    torch.manual_seed(0)
    w = torch.randn(100, 64)
    spec, fmt = QuantSpec(name), formats.get(name)
    base, base_zeros = absmax_scales(w, spec)
    best = block_errors(w, spec, base, base_zeros)
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    for p in torch.linspace(0.2, 1.05, 18).tolist():
        for q in torch.linspace(0.2, 1.05, 18).tolist():
            scales = (high * q - low * p) / fmt.unit
            zeros = (-low * p / scales * 2 ** (8 - fmt.bits)).round().clamp(0, 255).to(torch.uint8)
            best = torch.minimum(best, block_errors(w, spec, scales, zeros))
    found = block_errors(w, spec, *search_scales(w, spec))
    assert found.sum() <= 1.02 * best.sum()


@pytest.mark.parametrize("name", ["nf4", "int3", "uint4", "fp4"])
def test_importance_may_be_a_row_or_a_matrix(name):
    w, h = torch.randn(6, 100), torch.rand(100)
    spec = QuantSpec(name, 32)
    by_column = search_scales(w, spec, True, h)
    by_element = search_scales(w, spec, True, h.expand(6, 100).contiguous())
    for a, b in zip(by_column, by_element, strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("name", FORMATS)
def test_importance_of_zero_and_of_any_size_is_harmless(name):
    w = torch.randn(6, 64)
    spec = QuantSpec(name)
    base = absmax_scales(w, spec)
    for a, b in zip(search_scales(w, spec, True, torch.zeros(64)), base, strict=True):
        assert a is b is None or torch.equal(a, b)
    h = torch.rand(64)
    expected = search_scales(w, spec, False, h)
    for factor in (2.0**-100, 2.0**100):
        found = search_scales(w, spec, False, h * factor)
        assert torch.equal(found[0], expected[0])
    dead = torch.zeros(64)
    dead[5] = 1.0  # one live column: it alone must come out right
    errors = block_errors(w, spec, *search_scales(w, spec, True, dead), dead)
    assert (errors <= 1e-6 * w[:, 5].square() + 1e-12).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_search_scales_neither_overflows_nor_vanishes(name, factor):
    w = torch.randn(4, 64)
    spec = QuantSpec(name)
    expected, found = search_scales(w, spec, True)[0], search_scales(w * factor, spec, True)[0]
    assert torch.allclose(found / factor, expected, rtol=1e-4)


def test_multipliers_are_those_that_are_tried():
    fmt = formats.get("nf4")
    grid = search.multipliers(fmt, False)
    assert grid == sorted(grid)
    assert (grid[0], grid[-1]) == (pytest.approx(0.45), pytest.approx(1.3))
    assert search.multipliers(fmt, True) == grid + [-m for m in grid]


# Double quantisation


def test_dynamic_map_is_as_it_was_defined():
    """Dettmers 2016: 2**e means of equal parts of [0.1, 1], times 10**(e - 6), both signs; 0 and 1."""
    values = [0.0, 1.0]
    for e in range(7):
        parts = 2**e
        means = [0.1 + 0.9 * (i + 0.5) / parts for i in range(parts)]
        values += [sign * mean * 10.0 ** (e - 6) for mean in means for sign in (1, -1)]
    torch.testing.assert_close(
        dynamic_map().double(), torch.tensor(sorted(values)).double(), rtol=1e-6, atol=0
    )


def test_the_plain_layout_is_the_default():
    scales = torch.rand(300) + 0.5
    assert torch.equal(double_quantize(scales).map, dynamic_map())


def test_dynamic_map_is_ascending_and_has_zero_and_one():
    mapping = dynamic_map()
    assert mapping.shape == (256,)
    assert (mapping.diff() > 0).all()
    assert mapping[127] == 0
    assert mapping[255] == 1
    mapping.zero_()
    assert dynamic_map()[255] == 1, "a caller's copy must not be the cached one"


@pytest.mark.parametrize("lowest", [0.1, 0.001])
def test_ladder_map_is_mirrored(lowest):
    mapping = ladder_map(lowest)
    assert torch.equal(mapping, -mapping.flip(0))
    assert mapping[255] == 1
    assert mapping[128] == pytest.approx(lowest)
    ratios = mapping[129:] / mapping[128:-1]
    assert torch.allclose(ratios, torch.full_like(ratios, lowest ** (-1 / 127)))


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 1000])
@pytest.mark.parametrize("signed", [False, True])
def test_double_quantize_is_the_nearest_level(count, signed):
    scales = torch.rand(count) + 0.2
    if signed:
        scales *= torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    nested = double_quantize(scales, signed=signed)
    assert nested.codes.dtype == torch.uint8
    assert nested.scales.shape == (math.ceil(count / 256),)
    dense = double_dequantize(*nested)
    for group in range(nested.scales.numel()):
        part = slice(256 * group, 256 * (group + 1))
        values = nested.map.double() * nested.scales[group].double() + nested.offset.double()
        best = (values[None] - scales[part, None].double()).abs().amin(1)
        assert ((dense[part].double() - scales[part].double()).abs() <= best + 1e-6).all()


def test_double_quantize_of_equal_scales_is_exact():
    for signed in (False, True):
        for value in (0.37, 0.0):
            nested = double_quantize(torch.full((300,), value), signed=signed)
            assert torch.allclose(double_dequantize(*nested), torch.full((300,), value), rtol=1e-6)


def test_double_quantize_signed_takes_a_ladder_as_long_as_the_scales_need():
    wide = torch.logspace(-2.5, 0, 256)
    nested = double_quantize(wide, signed=True)
    error = (double_dequantize(*nested) - wide).square().sum()
    assert nested.map[128] < 0.1
    assert error < 0.1 * (wide.clamp(min=0.1) - wide).square().sum(), "the shortest ladder would do no better"
    narrow = torch.linspace(0.5, 1, 256)
    nested = double_quantize(narrow, signed=True)
    dense = double_dequantize(*nested)
    assert nested.map[128] == pytest.approx(0.1)
    assert ((dense - narrow).abs() <= 0.01 * narrow).all()


@pytest.mark.parametrize("name", ["nf4", "int8", "uint4", "nf2"])
@pytest.mark.parametrize("signed", [False, True])
def test_search_nested_scales_never_loses(name, signed):
    torch.manual_seed(0)
    w = torch.randn(100, 100)
    spec = QuantSpec(name, 16)
    scales, zeros = search_scales(w, spec, signed and not formats.get(name).affine)
    nested = double_quantize(scales, signed=signed)
    moved = search_nested_scales(w, spec, nested, zeros)
    assert (moved.codes.int() - nested.codes.int()).abs().max() <= 2
    before = block_errors(w, spec, double_dequantize(*nested), zeros)
    after = block_errors(w, spec, double_dequantize(*moved), zeros)
    assert (after <= before * (1 + 1e-4) + 1e-12).all()
    assert after.sum() < before.sum()


@pytest.mark.parametrize("shape", [(100,), (3, 100), (2, 3, 100)])
def test_importance_is_of_columns_or_of_elements(shape: tuple[int, ...]) -> None:
    """Of weights of any number of dimensions; one a column is the same as it repeated for every row."""
    w, columns = torch.randn(shape), torch.rand(100) ** 4
    spec = QuantSpec("nf3", 16)
    by_column, _ = search_scales(w, spec, importance=columns)
    by_element, _ = search_scales(w, spec, importance=columns.expand(shape).contiguous())
    assert torch.equal(by_column, by_element)
    assert not torch.equal(by_column, search_scales(w, spec)[0])
    for bad in (torch.ones(99), torch.ones(1, 100), torch.ones(())):
        with pytest.raises(ValueError, match="importance has shape"):
            search_scales(w, spec, importance=bad)
