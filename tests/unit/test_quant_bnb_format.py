"""quant.bnb_format without bitsandbytes: what is written, read, refused. Parity is in tests/parity."""

import json
from types import SimpleNamespace

import pytest
import torch

from quant import bnb_format
from quant.spec import QuantSpec
from quant.tensor import quantize

NAME = "model.layers.0.q_proj.weight"


def state_of(tensors):
    key = next(key for key in tensors if "quant_state" in key)
    return json.loads(bytes(tensors[key].numpy()).decode())


@pytest.mark.parametrize("fmt", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("rule", ["absmax", "signed-mse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_from_bnb_inverts_to_bnb(fmt, double_quant, rule, dtype):
    w = torch.randn(12, 50).to(dtype)
    q = quantize(w, QuantSpec(fmt, 32, double_quant), scales=rule)
    tensors = bnb_format.to_bnb(NAME, q)
    assert bnb_format.is_bnb(NAME, tensors)
    again = bnb_format.from_bnb(NAME, {**tensors, "other": torch.ones(1)})
    assert (again.shape, again.dtype, again.spec) == (q.shape, q.dtype, q.spec)
    for key, value in q.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    assert again.codes.data_ptr() == q.codes.data_ptr(), "read without a copy"
    for key in tensors:
        assert key == NAME or key.removeprefix(NAME) in bnb_format.BNB_SUFFIXES


def test_to_bnb_writes_the_documented_layout():
    q = quantize(torch.randn(10, 64).bfloat16(), QuantSpec("nf4", 64, True))
    tensors = bnb_format.to_bnb(NAME, q)
    shapes = {key.removeprefix(NAME): (value.dtype, tuple(value.shape)) for key, value in tensors.items()}
    text = shapes.pop(".quant_state.bitsandbytes__nf4")
    assert text[0] == torch.uint8
    assert shapes == {
        "": (torch.uint8, (320, 1)),
        ".absmax": (torch.uint8, (10,)),
        ".quant_map": (torch.float32, (16,)),
        ".nested_absmax": (torch.float32, (1,)),
        ".nested_quant_map": (torch.float32, (256,)),
    }
    assert state_of(tensors) == {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": [10, 64],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": float(q.nested_offset),
    }


def test_to_bnb_refuses_what_bitsandbytes_lacks():
    with pytest.raises(
        ValueError, match=f"cannot store '{NAME}' for bitsandbytes: .*holds fp4 and nf4, not int4"
    ):
        bnb_format.to_bnb(NAME, quantize(torch.randn(4, 64), QuantSpec("int4")))
    with pytest.raises(ValueError, match=r"block sizes 32, 64, .*, not 16"):
        bnb_format.to_bnb(NAME, quantize(torch.randn(4, 64), QuantSpec("nf4", 16)))
    assert bnb_format.why_not_bnb(QuantSpec("fp4", 4096)) is None


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_from_bnb_reads_codes_stored_as_floats(storage):
    q = quantize(torch.randn(16, 64), QuantSpec("nf4"))
    tensors = bnb_format.to_bnb(NAME, q)
    tensors[NAME] = tensors[NAME].view(-1).view(storage).view(-1, 1)
    assert torch.equal(bnb_format.from_bnb(NAME, tensors).codes, q.codes)


def broken(change):
    tensors = bnb_format.to_bnb(NAME, quantize(torch.randn(4, 64), QuantSpec("nf4", 64, True)))
    key = f"{NAME}.quant_state.bitsandbytes__nf4"
    state = state_of(tensors)
    change(tensors, state)
    if key in tensors and not isinstance(tensors[key], bytes):
        tensors[key] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    elif key in tensors:
        tensors[key] = torch.frombuffer(bytearray(tensors[key]), dtype=torch.uint8)
    return tensors


BROKEN = {
    "no absmax": (lambda t, s: t.pop(f"{NAME}.absmax"), "absmax"),
    "no codes": (lambda t, s: t.pop(NAME), "KeyError"),
    "no nested map": (lambda t, s: t.pop(f"{NAME}.nested_quant_map"), "nested_quant_map"),
    "no shape": (lambda t, s: s.pop("shape"), "shape"),
    "other type": (lambda t, s: s.update(quant_type="nf5"), "nf5"),
    "other dtype": (lambda t, s: s.update(dtype="float99"), "float99"),
    "no dtype": (lambda t, s: s.update(dtype="load"), "dtype 'load'"),
    "other block size": (lambda t, s: s.update(blocksize=48), "48"),
    "other nested block size": (lambda t, s: s.update(nested_blocksize=128), "128"),
    "no json": (lambda t, s: t.update({f"{NAME}.quant_state.bitsandbytes__nf4": b"{nonsense"}), "JSON"),
    "other shape": (lambda t, s: s.update(shape=[4, 65]), "codes has 128 elements"),
    "short absmax": (lambda t, s: t.update({f"{NAME}.absmax": t[f"{NAME}.absmax"][:3]}), "scales has 3"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_from_bnb_refuses_broken_tensors_by_name(case):
    change, says = BROKEN[case]
    tensors = broken(change)
    with pytest.raises(ValueError, match=says) as caught:
        bnb_format.from_bnb(NAME, tensors)
    assert NAME in str(caught.value)


def test_from_bnb_refuses_what_is_not_quantised():
    assert not bnb_format.is_bnb(NAME, {NAME: torch.ones(4)})
    with pytest.raises(ValueError, match=r"is no bitsandbytes weight: neither .*quant_state.* nor .*SCB"):
        bnb_format.from_bnb(NAME, {NAME: torch.ones(4)})


# LLM.int8


@pytest.mark.parametrize(("columns", "block_size"), [(64, 64), (96, 32), (576, 64), (8192, 4096), (48, 16)])
def test_from_bnb_reads_int8(columns, block_size):
    codes = torch.randint(-127, 128, (5, columns), dtype=torch.int8)
    scb = torch.rand(5) + 0.1
    prefix = NAME.removesuffix("weight")
    tensors = {NAME: codes, prefix + "SCB": scb, prefix + "weight_format": torch.tensor(0, dtype=torch.uint8)}
    assert bnb_format.is_bnb(NAME, tensors)
    q = bnb_format.from_bnb(NAME, tensors, dtype=torch.bfloat16)
    assert q.spec == QuantSpec("int8", block_size)
    assert q.dtype == torch.bfloat16
    expected = codes.double() * scb.double()[:, None] / 127
    assert torch.allclose(q.dequantize(torch.float32).double(), expected, rtol=1e-6)
    assert torch.equal(q.dequantize(torch.float32), bnb_format.dequantize_int8(codes, scb, torch.float32))


def test_int8_of_odd_rows_is_dense_or_refused():
    codes, scb = torch.randint(-127, 128, (5, 50), dtype=torch.int8), torch.rand(5)
    with pytest.raises(ValueError, match=r"\(5, 50\): a row is no multiple of 16"):
        bnb_format.from_int8(codes, scb, torch.float32)
    expected = codes.double() * scb.double()[:, None] / 127
    assert torch.allclose(bnb_format.dequantize_int8(codes, scb, torch.float32).double(), expected, rtol=1e-6)
    for weight, statistics in ((codes.float(), scb), (codes, scb[:4]), (codes.view(-1), scb)):
        with pytest.raises(ValueError, match=r"LLM\.int8 needs an int8 matrix"):
            bnb_format.from_int8(weight, statistics, torch.float32)
    tensors = {"a.weight": codes, "a.SCB": scb, "a.weight_format": torch.tensor(1)}
    with pytest.raises(ValueError, match="weight_format 1; only row-major"):
        bnb_format.from_bnb("a.weight", tensors)


# Objects in memory, by their attributes


def fake_state(q, **changes):
    state2 = None
    if q.spec.double_quant:
        state2 = SimpleNamespace(absmax=q.nested_scales, code=q.nested_map, blocksize=256)
    fields = {
        "absmax": q.scales,
        "shape": q.shape,
        "dtype": q.dtype,
        "blocksize": q.spec.block_size,
        "quant_type": q.spec.format,
        "nested": q.spec.double_quant,
        "offset": q.nested_offset,
        "state2": state2,
    }
    return SimpleNamespace(**fields | changes)


@pytest.mark.parametrize("double_quant", [False, True])
def test_from_quant_state_shares_storage(double_quant):
    q = quantize(torch.randn(8, 64), QuantSpec("nf4", 64, double_quant))
    adopted = bnb_format.from_quant_state(q.codes.view(-1, 1), fake_state(q))
    for key, value in q.state_dict().items():
        assert adopted.state_dict()[key].data_ptr() == value.data_ptr()
    assert torch.equal(adopted.dequantize(), q.dequantize())


def test_from_quant_state_refuses_by_name():
    q = quantize(torch.randn(8, 64), QuantSpec("nf4", 64, True))
    with pytest.raises(ValueError, match="q_proj is not quantised yet"):
        bnb_format.from_quant_state(q.codes, None, name="q_proj")
    with pytest.raises(ValueError, match="q_proj: unknown quant_type 'nf5'; known: "):
        bnb_format.from_quant_state(q.codes, fake_state(q, quant_type="nf5"), name="q_proj")
    other = SimpleNamespace(absmax=q.nested_scales, code=q.nested_map, blocksize=128)
    with pytest.raises(ValueError, match="nested blocks of 128, not 256"):
        bnb_format.from_quant_state(q.codes, fake_state(q, state2=other), name="q_proj")
    with pytest.raises(ValueError, match="'q_proj': codes has 255"):
        bnb_format.from_quant_state(q.codes[1:], fake_state(q), name="q_proj")


def test_int8_statistics_are_found_where_a_forward_left_them():
    weight = torch.nn.Parameter(torch.randint(-127, 128, (4, 32), dtype=torch.int8), requires_grad=False)
    scb = torch.rand(4)
    module = SimpleNamespace(weight=weight, state=SimpleNamespace(SCB=scb))
    q = bnb_format.from_linear8bit(module, torch.float16)
    assert torch.equal(q.dequantize(torch.float32), bnb_format.dequantize_int8(weight, scb, torch.float32))
    with pytest.raises(ValueError, match="not quantised yet"):
        bnb_format.int8_statistics(
            SimpleNamespace(weight=torch.randn(4, 32), state=SimpleNamespace(SCB=None))
        )
