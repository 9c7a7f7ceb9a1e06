"""QuantLinear and QuantEmbedding: values, gradients, storage, copies, compilation."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quant import QuantizedTensor, QuantSpec, formats, linear_op, quantize
from quant.linear import QuantEmbedding, QuantLinear

# Rows of 128 and 64 hold whole blocks, rows of 96 and 63 do not, and 63 elements do not even end on a byte.
SHAPES = [(96, 128), (40, 96), (50, 63), (1, 64)]
SPECS = [QuantSpec(name, 64, nested) for name in formats.names() for nested in (False, True)]


def layer(spec: QuantSpec, shape: tuple[int, int], bias: bool = True) -> tuple[QuantLinear, Tensor]:
    q = quantize(torch.randn(shape), spec)
    parameter = nn.Parameter(torch.randn(shape[0])) if bias else None
    return QuantLinear.from_quantized(q, parameter), q.dequantize(torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_linear_forward_and_gradients(spec: QuantSpec, shape: tuple[int, int]) -> None:
    module, dense = layer(spec, shape)
    x = torch.randn(2, 5, shape[1], requires_grad=True)
    y = module(x)
    torch.testing.assert_close(y, x @ dense.t() + module.bias, rtol=1e-5, atol=1e-4)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad @ dense, rtol=1e-5, atol=1e-4)
    assert module.bias is not None
    torch.testing.assert_close(module.bias.grad, grad.sum((0, 1)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_embedding_rows_equal_the_table(spec: QuantSpec, shape: tuple[int, int]) -> None:
    q = quantize(torch.randn(shape), spec)
    module = QuantEmbedding.from_quantized(q, padding_idx=0)
    index = torch.randint(0, shape[0], (3, 4))
    assert torch.equal(module(index), q.dequantize(torch.float32)[index])
    assert module(torch.empty(0, dtype=torch.long)).shape == (0, shape[1])


def test_many_tiles_make_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_op, "_TILE_ELEMENTS", 300)
    module, dense = layer(QuantSpec("nf4", 64, True), (50, 128))
    x = torch.randn(7, 128, requires_grad=True)
    y = module(x)
    y.sum().backward()
    torch.testing.assert_close(y, x @ dense.t() + module.bias, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad, dense.sum(0).expand(7, -1), rtol=1e-5, atol=1e-4)


def test_forward_never_holds_the_dense_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_op, "_TILE_ELEMENTS", 1024)
    largest = 0
    before = QuantizedTensor.dequantize_rows

    def rows(self: QuantizedTensor, start: int, stop: int, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal largest
        largest = max(largest, (stop - start) * self.shape[1])
        return before(self, start, stop, *args, **kwargs)

    module, _ = layer(QuantSpec(), (512, 256))
    monkeypatch.setattr(QuantizedTensor, "dequantize_rows", rows)
    monkeypatch.setattr(QuantizedTensor, "dequantize", lambda *a, **k: pytest.fail("the whole weight"))
    module(torch.randn(3, 256, requires_grad=True)).sum().backward()
    assert 0 < largest <= 1024


def test_nothing_dense_is_kept_for_backward() -> None:
    module, _ = layer(QuantSpec(), (256, 256))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        module(torch.randn(4, 256, requires_grad=True))
    assert sum(kept) == module.codes.nbytes + module.scales.nbytes  # not even the input: the weight is frozen


def test_backward_reads_what_was_saved() -> None:
    """Codes that are swapped between forward and backward (streamed weights) must not give other
    gradients."""
    module, dense = layer(QuantSpec(), (64, 64), bias=False)
    packed: list[Tensor] = []

    def pack(t: Tensor) -> int:
        packed.append(t.clone())
        return len(packed) - 1

    x = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: packed[i]):
        y = module(x)
    module.codes.data.zero_()
    y.sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(3, -1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    module, dense = layer(QuantSpec(), (64, 128), bias=False)
    x = torch.randn(5, 128).to(dtype).requires_grad_()
    y = module(x)
    assert y.dtype == dtype
    exact = x.detach().double() @ dense.double().t()
    # One rounding of weights and output to 8 (bf16) or 11 bits, sums of 128 terms in float32.
    tolerance = 4 * torch.finfo(dtype).eps
    assert (y.double() - exact).norm() <= tolerance * exact.norm()
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


def test_fp32_tiles_where_the_cpu_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_op, "_cpu_has_half", lambda dtype: False)
    module, dense = layer(QuantSpec(), (64, 128), bias=False)
    x = torch.randn(5, 128).bfloat16()
    assert torch.equal(module(x), (x.float() @ dense.t()).bfloat16())


@pytest.mark.parametrize("transposed", [False, True])
def test_few_tokens_are_multiplied_in_float32(monkeypatch: pytest.MonkeyPatch, transposed: bool) -> None:
    """Also where the CPU has bfloat16: up to eight tokens, however many features there are."""
    monkeypatch.setattr(linear_op, "_cpu_has_half", lambda dtype: True)
    module, dense = layer(QuantSpec(), (64, 128), bias=False)
    for tokens in (8, 9):
        x = torch.randn(tokens, 128).bfloat16().requires_grad_()
        y = module(x)
        grad = torch.randn_like(y)
        y.backward(grad)
        found, left, right = (x.grad, grad, dense) if transposed else (y, x, dense.t())
        assert found is not None
        assert torch.equal(found, (left.float() @ right).bfloat16()) == (tokens == 8)


def test_compute_dtype_and_autocast() -> None:
    module, dense = layer(QuantSpec(), (64, 128), bias=False)
    x = torch.randn(5, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    module.compute_dtype = torch.bfloat16
    y = module(x)
    assert y.dtype == torch.float32
    assert not torch.equal(y, x @ dense.t())
    assert (y - x @ dense.t()).norm() < 0.02 * y.norm()


def test_casts_leave_the_scales_alone() -> None:
    module, dense = layer(QuantSpec("nf4", 64, True), (64, 128))
    bits = {name: p.clone() for name, p in module.named_parameters() if name != "bias"}
    for cast in (module.half, module.bfloat16, module.double, lambda: module.to(torch.float32)):
        cast()
        assert all(torch.equal(getattr(module, name), value) for name, value in bits.items())
    assert torch.equal(module.dequantize(torch.float32), dense)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(clone: Any) -> None:
    module, _ = layer(QuantSpec("int3", 32), (64, 96))
    other = clone(module)
    x = torch.randn(2, 96)
    assert torch.equal(other(x), module(x))
    assert other.codes.data_ptr() != module.codes.data_ptr()
    assert other.spec == module.spec


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_state_dict_round_trip(spec: QuantSpec, shape: tuple[int, int]) -> None:
    module, dense = layer(spec, shape)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = QuantLinear(shape[1], shape[0], spec)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.dequantize(torch.float32), dense)
    assert all(
        p.dtype == torch.uint8 and not p.requires_grad for n, p in other.named_parameters() if n != "bias"
    )


def test_half_a_layer_is_an_error_even_if_not_strict() -> None:
    module, _ = layer(QuantSpec("nf4", 64, True), (64, 128))
    model = nn.Sequential(module)
    state = model.state_dict()
    del state["0.nested_scales"]
    with pytest.raises(RuntimeError, match=r"'0' is incomplete: missing 0\.nested_scales"):
        model.load_state_dict(state, strict=False)
    assert model.load_state_dict({}, strict=False).missing_keys  # nothing of the layer is fine


def test_set_quantized_refuses_another_shape_or_spec() -> None:
    module, _ = layer(QuantSpec(), (64, 128))
    for other in (
        quantize(torch.randn(64, 64), QuantSpec()),
        quantize(torch.randn(64, 128), QuantSpec("fp4")),
    ):
        with pytest.raises(ValueError, match="expected"):
            module.set_quantized(other)


def test_from_quantized_shares_storage() -> None:
    q = quantize(torch.randn(64, 128), QuantSpec())
    module = QuantLinear.from_quantized(q)
    assert module.codes.data_ptr() == q.codes.data_ptr()
    assert module.scales.data_ptr() == q.scales.data_ptr()
    assert module.quantized().codes.data_ptr() == q.codes.data_ptr()


def test_rows_are_the_first_dimension_where_a_row_is_self_contained() -> None:
    assert layer(QuantSpec(), (96, 128))[0].codes.shape == (96, 64)
    assert layer(QuantSpec(), (96, 128))[0].scales.shape == (96, 8)
    assert layer(QuantSpec(), (40, 96))[0].codes.shape == (1920, 1)


def test_compiles_without_a_break() -> None:
    module, _ = layer(QuantSpec("nf4", 64, True), (64, 128))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, y = (torch.randn(3, 128).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    module(x).square().sum().backward()
    compiled(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    module, dense = layer(QuantSpec(), (64, 64), bias=False)
    x = torch.randn(3, 64, requires_grad=True)
    checkpoint(module, x, use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(3, -1), rtol=1e-5, atol=1e-4)


def test_meta_device() -> None:
    module = QuantLinear(128, 64, QuantSpec(), device="meta")
    assert module(torch.empty(2, 3, 128, device="meta")).shape == (2, 3, 64)
    filled, dense = layer(QuantSpec(), (64, 128))
    module.load_state_dict(filled.state_dict(), assign=True)
    assert torch.equal(module.dequantize(torch.float32), dense)


def test_threads_have_workspaces_of_their_own() -> None:
    module, dense = layer(QuantSpec(), (256, 256), bias=False)
    inputs = [torch.randn(4, 256) for _ in range(4)]
    results: dict[int, Tensor] = {}

    def run(i: int) -> None:
        for _ in range(20):
            results[i] = module(inputs[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(inputs):
        torch.testing.assert_close(results[i], x @ dense.t(), rtol=1e-5, atol=1e-4)


def test_weight_is_what_readers_expect() -> None:
    module, dense = layer(QuantSpec(), (64, 128))
    assert torch.equal(module.weight, dense)
    embedding = QuantEmbedding.from_quantized(
        quantize(torch.randn(8, 64).half(), QuantSpec()), embed_scale=2.0
    )
    assert embedding.weight.dtype == torch.float16
    assert torch.equal(embedding(torch.tensor([3])), embedding.weight[3:4] * 2.0)
    assert "nf4, block_size=64" in repr(embedding)
    assert "in_features=128" in repr(module)


@pytest.mark.parametrize("spec", [QuantSpec("nf4", 64), QuantSpec("int8", 64, True)], ids=str)
def test_a_weight_is_decoded_into_rows_that_lie_apart(spec: QuantSpec) -> None:
    q = quantize(torch.randn(6, 128), spec)
    tensors = tuple(getattr(q, name) for name in linear_op.TENSOR_NAMES)
    weight = linear_op.Weight(tensors, spec, q.shape, "same")
    room = torch.full((8, 200), torch.nan)
    found = weight.decode(room[1:5, 40:168], first=2)
    assert torch.equal(found, q.dequantize()[2:])
    assert found.data_ptr() == room[1, 40:].data_ptr()
    assert int(room.isnan().sum()) == room.numel() - found.numel()
