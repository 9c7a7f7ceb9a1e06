"""quant.tensor: quantise, encode, decode, the fields' checks and the state dict."""

import copy
import dataclasses

import pytest
import torch

from quant import formats
from quant.spec import QuantSpec
from quant.tensor import SCALE_RULES, QuantizedTensor, encode, from_codes, quantize

SHAPES = [(), (1,), (63,), (5, 64), (7, 100), (3, 5, 17), (0,), (4, 0)]
SPECS = [QuantSpec(name, 16, dq) for name in formats.names() for dq in (False, True)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("rule", SCALE_RULES)
def test_quantize_keeps_shape_dtype_and_values(spec, rule):
    torch.manual_seed(0)
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            w = torch.randn(shape).to(dtype)
            q = quantize(w, spec, scales=rule)
            assert q.shape == w.shape
            assert q.dtype == dtype
            assert q.spec == spec
            assert q.numel == w.numel()
            dense = q.dequantize()
            assert dense.shape == w.shape
            assert dense.dtype == dtype
            assert torch.equal(q.dequantize(torch.float32).to(dtype), dense)
            if w.numel() >= 64:
                error = (dense.float() - w.float()).norm() / w.float().norm()
                assert error < {2: 0.85, 3: 0.4, 4: 0.2, 8: 0.03}[spec.bits], (shape, dtype)
            assert q.nbytes == spec.nbytes(w.numel())
            assert q.bits_per_weight == spec.bits_per_weight(w.numel())


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("name", formats.names())
@pytest.mark.parametrize("double_quant", [False, True])
def test_zero_blocks_and_constant_blocks(name, rule, double_quant):
    w = torch.randn(10, 64)
    w[1] = 0
    w[2] = 0.37
    w[3] = -2.5
    w[4:6] = 0
    q = quantize(w, QuantSpec(name, 64, double_quant), scales=rule)
    dense = q.dequantize()
    assert torch.isfinite(dense).all()
    assert (dense[[1, 4, 5]] == 0).all()
    if not double_quant:
        # a constant is exact up to a rounding, but where its own sign has no level to reach it with
        for row in (2, 3):
            assert (dense[row] - w[row]).abs().max() <= 1e-6 * w[row, 0].abs()


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_quantize_of_nothing_but_zeros(rule):
    for spec in SPECS:
        for numel in (1, 16, 40):
            assert (quantize(torch.zeros(numel), spec, scales=rule).dequantize() == 0).all()


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["nf4", "fp4", "uint4", "int8", "nf3"])
def test_quantize_names_the_tensor_that_is_not_finite(rule, bad, name):
    for numel, at in ((640, 300), (70, 69)):
        w = torch.randn(numel)
        w[at] = bad
        with pytest.raises(
            ValueError, match=rf"weight 'model\.q_proj' \({numel},\) has 1 elements that are NaN"
        ):
            quantize(w, QuantSpec(name), scales=rule, name="model.q_proj")


def test_quantize_refuses_other_input():
    w = torch.randn(4, 64)
    with pytest.raises(ValueError, match="unknown scale rule 'max'; known rules: absmax, mse, signed-mse"):
        quantize(w, QuantSpec(), scales="max")
    with pytest.raises(TypeError, match=r"weight 'x' is torch\.float64; allowed: torch\.float32"):
        quantize(w.double(), QuantSpec(), name="x")
    with pytest.raises(ValueError, match="importance has no effect on absmax"):
        quantize(w, QuantSpec(), importance=torch.ones(64))
    with pytest.raises(ValueError, match=r"importance has shape \(4,\); allowed: \(64,\) or \(4, 64\)"):
        quantize(w, QuantSpec(), scales="mse", importance=torch.ones(4))
    for bad in (-1.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="negative, NaN or inf"):
            quantize(w, QuantSpec(), scales="mse", importance=torch.full((64,), bad))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_of_a_search_are_the_nearest_to_the_scales_as_stored(spec):
    w = torch.randn(20, 96)
    q = quantize(w, spec, scales="signed-mse")
    assert torch.equal(q.unpacked_codes(), encode(w, spec, q.dense_scales(), q.zeros))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_from_codes_rebuilds(spec):
    w = torch.randn(9, 50)
    plain = QuantSpec(spec.format, spec.block_size)
    q = quantize(w, plain)
    again = from_codes(q.unpacked_codes(), q.scales, spec, w.shape, w.dtype, q.zeros)
    assert torch.equal(again.codes, q.codes)
    if spec.double_quant:
        direct = quantize(w, spec)
        assert all(torch.equal(again.state_dict()[key], value) for key, value in direct.state_dict().items())
    else:
        assert torch.equal(again.dequantize(), q.dequantize())


def test_from_codes_double_quantises_negative_scales_in_the_signed_layout():
    codes = torch.randint(0, 16, (64 * 300,), dtype=torch.uint8)
    scales = torch.linspace(0.5, 1, 300) * torch.tensor([1.0, -1.0]).repeat(150)
    q = from_codes(codes, scales, QuantSpec("nf4", 64, True), (300, 64), torch.float32)
    assert ((q.dense_scales() - scales).abs() <= 0.01 * scales.abs()).all()
    assert q.nested_offset == 0


def test_from_codes_and_encode_refuse_wrong_sizes():
    spec, w = QuantSpec("nf4"), torch.randn(2, 64)
    codes, scales = torch.zeros(128, dtype=torch.uint8), torch.ones(2)
    with pytest.raises(ValueError, match=r"127 codes for a weight of shape \(2, 64\)"):
        from_codes(codes[1:], scales, spec, w.shape, w.dtype)
    with pytest.raises(ValueError, match=r"scales must be float32 \(2,\), got torch.float32 \(3,\)"):
        from_codes(codes, torch.ones(3), spec, w.shape, w.dtype)
    with pytest.raises(ValueError, match="scales must be float32"):
        encode(w, spec, scales.half())
    with pytest.raises(ValueError, match="nf4 has no zeros"):
        encode(w, spec, scales, torch.zeros(2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint4 needs zeros"):
        encode(w, QuantSpec("uint4"), scales)
    with pytest.raises(ValueError, match=r"zeros must be uint8 \(2,\)"):
        encode(w, QuantSpec("uint4"), scales, torch.zeros(3, dtype=torch.uint8))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", [(40, 64), (41, 50), (300, 17), (12, 3, 10)])
def test_dequantize_rows_are_the_rows(spec, shape):
    q = quantize(torch.randn(shape), spec)
    dense = q.dequantize()
    rows = shape[0]
    for start, stop in ((0, rows), (0, 1), (3, 3), (1, 7), (rows - 5, rows), (rows // 2, rows // 2 + 2)):
        for dtype in (None, torch.bfloat16):
            expected = dense[start:stop] if dtype is None else dense[start:stop].to(dtype)
            assert torch.equal(q.dequantize_rows(start, stop, dtype), expected)
            workspace = torch.full(expected.shape, torch.nan, dtype=expected.dtype)
            found = q.dequantize_rows(start, stop, out=workspace)
            assert found is workspace
            assert torch.equal(found, expected)


def test_dequantize_rows_beyond_the_first_group_of_nested_scales():
    q = quantize(torch.randn(600, 64), QuantSpec("nf4", 16, True))  # 2400 scales, ten groups
    dense = q.dequantize()
    for start in (0, 63, 64, 65, 599):
        assert torch.equal(q.dequantize_rows(start, 600), dense[start:])


def test_dequantize_refuses_a_wrong_out():
    q = quantize(torch.randn(4, 64), QuantSpec())
    with pytest.raises(ValueError, match=r"out must be contiguous, \(4, 64\)"):
        q.dequantize(out=torch.empty(64, 4))
    with pytest.raises(ValueError, match="out must be contiguous"):
        q.dequantize(out=torch.empty(64, 4).t())
    with pytest.raises(ValueError, match=r"torch.bfloat16; got \(4, 64\), torch.float32"):
        q.dequantize(torch.bfloat16, out=torch.empty(4, 64))
    for start, stop in ((-1, 2), (3, 2), (0, 5)):
        with pytest.raises(ValueError, match=rf"rows {start} \.\.\. {stop} of a weight of shape \(4, 64\)"):
            q.dequantize_rows(start, stop)
    with pytest.raises(ValueError, match="rows 0"):
        quantize(torch.randn(64), QuantSpec()).dequantize_rows(0, 1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_state_dict_round_trips_and_shares_storage(spec):
    q = quantize(torch.randn(6, 50), spec)
    state = q.state_dict()
    again = QuantizedTensor.from_state_dict(state, q.shape, q.dtype, q.spec)
    assert torch.equal(again.dequantize(), q.dequantize())
    assert again.codes.data_ptr() == q.codes.data_ptr()
    assert set(state) == {key for key in state if state[key] is getattr(q, key)}
    reshaped = {key: value.reshape(-1, 1) for key, value in state.items()}
    assert torch.equal(
        QuantizedTensor.from_state_dict(reshaped, q.shape, q.dtype, spec).dequantize(), q.dequantize()
    )
    moved = q.to("cpu")
    assert moved.device == torch.device("cpu")
    assert torch.equal(copy.deepcopy(q).dequantize(), moved.dequantize())


def test_from_state_dict_refuses_what_does_not_fit():
    q = quantize(torch.randn(6, 64), QuantSpec("nf4", 64, True))
    state = q.state_dict()

    def build(spec=q.spec, shape=q.shape, **changes):
        return QuantizedTensor.from_state_dict({**state, **changes}, shape, q.dtype, spec)

    with pytest.raises(ValueError, match=r"unknown tensors \['absmax'\]; known: codes, scales"):
        build(absmax=q.scales)
    with pytest.raises(ValueError, match=r"missing tensors \['codes'\]"):
        QuantizedTensor.from_state_dict({"scales": q.scales}, q.shape, q.dtype, q.spec)
    without = {key: value for key, value in state.items() if key != "nested_map"}
    with pytest.raises(ValueError, match="needs nested_map"):
        QuantizedTensor.from_state_dict(without, q.shape, q.dtype, q.spec)
    with pytest.raises(ValueError, match="has no nested_scales"):
        build(spec=QuantSpec("nf4"), scales=q.dense_scales())
    with pytest.raises(TypeError, match=r"scales must be torch\.uint8, got torch\.float32"):
        build(scales=q.dense_scales())
    with pytest.raises(ValueError, match=r"codes has 192 elements; \(7, 64\) as QuantSpec.* takes 224"):
        build(shape=(7, 64))


@pytest.mark.parametrize("scales", ["absmax", "signed-mse"])
@pytest.mark.parametrize("name", ["int4", "uint4", "int8", "bof4"])
def test_values_beyond_float16_are_refused_in_every_kind_of_format(name: str, scales: str) -> None:
    """Whole-number formats reach far beyond their scale: it alone says nothing."""
    beyond = 0
    for seed in range(12):
        w = torch.rand(4, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        w[:, 0] = 1 if seed % 2 else -1
        w = (w.abs() if seed % 3 == 0 else w) * 65504
        decoded = quantize(w, QuantSpec(name), scales=scales).dequantize()
        if decoded.abs().max() > 65504:
            beyond += 1
            with pytest.raises(ValueError, match=r"would have values up to .*, beyond float16's 65504"):
                quantize(w.half(), QuantSpec(name), scales=scales)
        else:
            assert quantize(w.half(), QuantSpec(name), scales=scales).dequantize().isfinite().all()
    assert beyond > 0 or (scales == "absmax" and not name.startswith("u"))  # whose largest value is a level


def test_an_offset_may_have_come_with_a_dimension():
    q = quantize(torch.randn(40, 64), QuantSpec("nf4", 64, double_quant=True))
    tensors = {**q.state_dict(), "nested_offset": q.nested_offset.reshape(1)}
    again = QuantizedTensor.from_state_dict(tensors, q.shape, q.dtype, q.spec)
    assert again.nested_offset.shape == ()
    assert torch.equal(again.dequantize(), q.dequantize())


def test_quantised_weights_are_told_apart_by_identity_and_are_not_changed():
    w = torch.randn(4, 64)
    one, other = quantize(w, QuantSpec("nf4")), quantize(w, QuantSpec("nf4"))
    assert one == one
    assert one != other
    assert len({one, other}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.codes = other.codes
