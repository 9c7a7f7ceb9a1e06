"""The fused MLP and the fused q, k, v against the layers called one by one: forward, gradients, switching."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from qlora_engine import fused, fused_blocks
from qlora_engine.fused_products import Part, shared_input, swiglu_mlp
from quant.linear import QuantLinear
from quant.linear_op import TENSOR_NAMES, Weight
from quant.spec import QuantSpec
from quant.tensor import quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def part(rows: int, columns: int, rank: int, seed: int, spec: QuantSpec, scaling: float) -> Part:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * columns**-0.5
    layer = QuantLinear.from_quantized(quantize(weight, spec)).to(DEVICE)
    A = (torch.randn(rank, columns, generator=generator) * columns**-0.5).to(DEVICE).requires_grad_()
    B = torch.randn(rows, rank, generator=generator).to(DEVICE).requires_grad_()
    packed = Weight(tuple(getattr(layer, name) for name in TENSOR_NAMES), spec, layer.shape)
    return Part(packed, A, B, scaling)


def one(x: Tensor, p: Part) -> Tensor:
    return x @ p.weight.quantized().dequantize().t() + p.scaling * (x @ p.A.t()) @ p.B.t()


def close(got: Tensor, want: Tensor) -> None:
    assert float((got - want).detach().norm() / want.detach().norm()) < 2e-5


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec("int3", 32, True), QuantSpec("uint2")])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (3, 8, 5)])
def test_swiglu_mlp(spec: QuantSpec, ranks: tuple[int, int, int]) -> None:
    gate, up = (part(96, 64, rank, seed, spec, 2.0) for seed, rank in enumerate(ranks[:2]))
    down = part(64, 96, ranks[2], 7, spec, 0.5)
    x = torch.randn(2, 5, 64, device=DEVICE, requires_grad=True)
    leaves = [x, *[leaf for p in (gate, up, down) for leaf in (p.A, p.B)]]
    y = swiglu_mlp(x, gate, up, down)
    want = one(nn.functional.silu(one(x, gate)) * one(x, up), down)
    close(y, want)
    dy = torch.randn_like(y)
    for got, expected in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True
    ):
        close(got, expected)


def test_second_derivatives_are_refused() -> None:
    """Decoded weights lie in a buffer that the next layer overwrites: they would be another layer's."""
    x = torch.randn(3, 64, device=DEVICE, requires_grad=True)
    gate, up = (part(96, 64, 4, seed, QuantSpec(), 2.0) for seed in range(2))
    for y in (swiglu_mlp(x, gate, up, part(64, 96, 4, 7, QuantSpec(), 0.5)), shared_input(x, gate, up)[0]):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            dx.square().sum().backward()


def test_no_tokens_have_gradients_of_zero() -> None:
    """As an expert has that no token reached."""
    parts = [part(96, 64, 4, 0, QuantSpec(), 1.0), part(96, 64, 4, 1, QuantSpec(), 1.0)]
    parts.append(part(64, 96, 4, 2, QuantSpec(), 1.0))
    x = torch.randn(0, 64, device=DEVICE, requires_grad=True)
    leaves = [x, *(leaf for p in parts for leaf in (p.A, p.B))]
    y = swiglu_mlp(x, *parts)
    assert y.shape == (0, 64)
    for leaf, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


def test_swiglu_mlp_refuses_a_second_backward() -> None:
    parts = [part(96, 64, 4, 0, QuantSpec(), 1.0), part(96, 64, 4, 1, QuantSpec(), 1.0)]
    y = swiglu_mlp(torch.randn(3, 64, device=DEVICE), *parts, part(64, 96, 4, 2, QuantSpec(), 1.0)).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        y.backward()


def test_shared_input() -> None:
    parts = [part(rows, 64, rank, rows, QuantSpec(), 1.5) for rows, rank in ((64, 4), (32, 4), (32, 6))]
    x = torch.randn(2, 5, 64, device=DEVICE, requires_grad=True)
    leaves = [x, *[leaf for p in parts for leaf in (p.A, p.B)]]
    outputs, wants = shared_input(x, *parts), [one(x, p) for p in parts]
    grads = [torch.randn_like(y) for y in outputs]
    for got, want in zip(outputs, wants, strict=True):
        close(got, want)
    for got, want in zip(
        torch.autograd.grad(outputs, leaves, grads), torch.autograd.grad(wants, leaves, grads), strict=True
    ):
        close(got, want)


@pytest.fixture
def llama(make_model, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A tiny quantised Llama with adapters, the fused paths allowed on the CPU too."""
    from qlora_engine import LoftQConfig, LoraConfig, get_peft_model

    monkeypatch.setattr(fused, "on_gpu", lambda x: True)
    config = LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=4)
    )
    return get_peft_model(make_model("llama"), config).to(DEVICE)


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    ids = torch.arange(24, device=DEVICE).reshape(2, 12)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


def test_enable_changes_nothing_but_the_path(llama, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    fused.set_fused(False)
    try:
        want_loss, want = loss_and_gradients(llama)
    finally:
        fused.set_fused(True)
    layers = llama.config.num_hidden_layers
    assert fused_blocks.enable(llama, norms=False) == 2 * layers
    assert fused_blocks.enable(llama, norms=False) == 0
    calls = {"mlp": 0, "qkv": 0}
    for name, target in (("mlp", "swiglu_mlp"), ("qkv", "shared_input")):
        real = getattr(fused_blocks, target)

        def counted(*args, name=name, real=real):  # type: ignore[no-untyped-def]
            calls[name] += 1
            return real(*args)

        monkeypatch.setattr(fused_blocks, target, counted)
    loss, got = loss_and_gradients(llama)
    assert calls == {"mlp": layers, "qkv": layers}
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=1e-5)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    twin = copy.deepcopy(llama)
    for module in twin.modules():
        if hasattr(module, "q_proj"):  # one group, which collects for all three
            assert (
                len({id(getattr(module, name)._shared_input[0]) for name in ("q_proj", "k_proj", "v_proj")})
                == 1
            )
    twin_loss, _ = loss_and_gradients(twin)
    assert torch.equal(twin_loss, loss)
    with llama.disable_adapter():
        assert not torch.equal(llama(input_ids=torch.arange(5, device=DEVICE)[None]).logits, loss)
    assert fused_blocks.disable(llama) == 2 * layers
    calls.update(mlp=0, qkv=0)
    loss_and_gradients(llama)
    assert calls == {"mlp": 0, "qkv": 0}


@pytest.mark.parametrize("replayed", [False, True])
def test_a_recomputed_layer_does_not_come_to_the_last_product(
    llama, replayed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    """Nothing of a layer's output is needed for its backward: down is decoded once forward, once backward.

    Graphs recompute the whole layer.
    """
    from qlora_engine.training import graphs, recompute
    from tests.unit.test_training_graphs import capture

    if replayed and DEVICE == "cuda":
        pytest.skip("a real graph decodes without a call that could be counted")
    want_loss, want = loss_and_gradients(llama)
    fused_blocks.enable(llama, norms=False)
    recompute.apply(llama, 2)
    llama.get_base_model().enable_input_require_grads()
    llama.train()
    if replayed:
        graphs.GraphedLayers(llama, capture)
        loss_and_gradients(llama)  # recorded
        loss_and_gradients(llama)  # captured
    shapes = []
    real = Weight.decode

    def decode(self: Weight, out: Tensor, *args: int) -> Tensor:
        if out.is_contiguous() or DEVICE == "cuda":  # elsewhere strided rows go by way of ones that are not
            shapes.append(self.shape)
        return real(self, out, *args)

    monkeypatch.setattr(Weight, "decode", decode)
    loss, got = loss_and_gradients(llama)
    config = llama.get_base_model().config
    down, up = (config.hidden_size, config.intermediate_size), (config.intermediate_size, config.hidden_size)
    assert shapes.count(torch.Size(down)) == 2 * (3 if replayed else 2)
    assert shapes.count(torch.Size(up)) == 2 * 2 * 3  # gate and up, and once more
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=1e-5)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
