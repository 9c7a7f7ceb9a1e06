"""Every way in which a product with a packed weight is computed, forward and backward, against float64.

Memory that was not written is NaN here: torch fills new tensors with it, and the shared buffers are poisoned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_engine import LoraConfig, fused
from qlora_engine.lora import Embedding, Linear
from quant import QuantSpec, formats, linear_op, quantize
from quant.linear import QuantEmbedding, QuantLinear
from tests.reference.float64 import BOUNDS, DEVICE, DTYPES, error, weight

# Rows of whole blocks, rows of whole bytes, rows of neither; a single row, and a single column.
SHAPES = [(40, 128), (24, 72), (17, 75), (1, 50), (65, 1)]


pytestmark = pytest.mark.usefixtures("poisoned")


def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's way: a few rows of the weight at a time."""
    monkeypatch.setattr(linear_op, "_TILE_ELEMENTS", 300)


def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's way: all of the weight in a shared buffer."""
    monkeypatch.setattr(linear_op, "_whole", lambda device: True)


WAYS: list[Callable[[pytest.MonkeyPatch], None]] = [tiles, whole]


def test_the_memory_is_poisoned() -> None:
    assert torch.empty(1000).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", formats.names())
def test_linear(name: str, way: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    way(monkeypatch)
    for number, shape in enumerate(SHAPES):
        spec = QuantSpec(name, (16, 64)[number % 2], double_quant=number in (1, 2))
        q = quantize(torch.randn(shape), spec).to(DEVICE)
        bias = nn.Parameter(torch.randn(shape[0], device=DEVICE))
        module, W = QuantLinear.from_quantized(q, bias), weight(q)
        x = torch.randn(2, 3 + number, shape[1], device=DEVICE).to(dtype).requires_grad_()
        y = module(x)
        dy = torch.randn_like(y)
        dx, db = torch.autograd.grad(y, (x, bias), dy)
        assert y.dtype == dx.dtype == dtype
        X, D = x.detach().cpu().double(), dy.cpu().double()
        assert error(y, X @ W.t() + bias.detach().cpu().double()) < BOUNDS[dtype], shape
        assert error(dx, D @ W) < BOUNDS[dtype], shape
        assert error(db, D.sum((0, 1))) < BOUNDS[dtype], shape


@pytest.mark.parametrize("compute", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compute_dtype(dtype: torch.dtype, compute: torch.dtype) -> None:
    """The input's dtype comes out, whatever is computed in; the coarser of the two decides the error."""
    q = quantize(torch.randn(40, 128), QuantSpec("nf4", 64, True)).to(DEVICE)
    module, W = QuantLinear.from_quantized(q, None), weight(q)
    module.compute_dtype = compute
    x = torch.randn(9, 128, device=DEVICE).to(dtype).requires_grad_()
    y = module(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.dtype == dx.dtype == dtype
    bound = max(BOUNDS[dtype], BOUNDS[compute])
    assert error(y, x.detach().cpu().double() @ W.t()) < bound
    assert error(dx, W.sum(0).expand(9, -1)) < bound


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", formats.names())
def test_embedding(name: str, double_quant: bool) -> None:
    for shape in SHAPES:
        q = quantize(torch.randn(shape), QuantSpec(name, 16, double_quant)).to(DEVICE)
        index = torch.randint(shape[0], (2, 5), device=DEVICE)
        got = QuantEmbedding.from_quantized(q)(index)
        assert error(got, weight(q)[index.cpu()]) < BOUNDS[torch.float32], shape


# ---- with adapters


def adapted(spec: QuantSpec, config: LoraConfig, names: list[str], *, bias: bool) -> Linear:
    """A LoRA layer (24 x 72) with random factors, magnitudes and biases, its adapters all active."""
    q = quantize(torch.randn(24, 72), spec)
    base = QuantLinear.from_quantized(q, nn.Parameter(torch.randn(24)) if bias else None)
    layer = Linear(base, names[0], config, r=config.r, lora_alpha=config.lora_alpha)
    for number, name in enumerate(names[1:], 1):
        layer.update_layer(name, config.r + number, lora_alpha=3, config=config)
    layer.set_adapter(names)
    for name in names:
        for module in (layer.lora_A[name], layer.lora_B[name]):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.2)
        if config.use_dora:
            layer.lora_magnitude_vector[name].weight.data.uniform_(0.5, 5.0)
    return layer.to(DEVICE).train()


def masks(layer: Linear, x: Tensor, names: list[str], rate: float, *, fused_way: bool) -> list[Tensor]:
    """What each adapter's dropout multiplies its input by, drawn as the layer is about to draw it."""
    state, of_gpu = torch.get_rng_state(), torch.cuda.get_rng_state() if DEVICE == "cuda" else None
    found = []
    for _ in names:
        ones = torch.ones_like(x, dtype=torch.float32)
        if rate == 0.0:
            mask = ones
        elif fused_way:
            mask = fused._dropped(ones, rate, int(torch.randint(fused._MAX_SEED, (), device="cpu")))
        else:
            mask = torch.dropout(ones, rate, True)  # of x in the factors' float32
            assert isinstance(layer.lora_dropout[names[0]], nn.Dropout)
        zero_or_scaled = torch.tensor([0.0, 1.0 / (1.0 - rate)], device=mask.device)
        assert torch.isin(mask, zero_or_scaled).all()
        found.append(mask.cpu().double())
    torch.set_rng_state(state)
    if of_gpu is not None:
        torch.cuda.set_rng_state(of_gpu)
    return found


def written_out(layer: Linear, X: Tensor, dropped: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The layer's function in float64, and its leaves: factors, biases, magnitudes and the base's bias."""
    base, leaves = layer.get_base_layer(), []

    def leaf(parameter: Tensor) -> Tensor:
        leaves.append(parameter.detach().cpu().double().requires_grad_())
        return leaves[-1]

    W = weight(base.quantized())
    bias = torch.zeros(()) if base.bias is None else leaf(base.bias)
    y = X @ W.t() + bias
    for name, mask in zip(layer.active_adapters, dropped, strict=True):
        A, B, s = leaf(layer.lora_A[name].weight), leaf(layer.lora_B[name].weight), layer.scaling[name]
        kept = X * mask
        if layer.use_dora[name]:
            norm = (W + s * B @ A).norm(dim=1).detach()
            ratio = leaf(layer.lora_magnitude_vector[name].weight) / norm
            # without dropout each works on what the ones before it gave, as PEFT's do
            drops = isinstance(layer.lora_dropout[name], nn.Dropout)
            before = kept @ W.t() if drops else y - bias
            y = y + (ratio - 1) * before + s * ratio * ((kept @ A.t()) @ B.t())
        else:
            delta = (kept @ A.t()) @ B.t()
            if layer.lora_B[name].bias is not None:
                delta = delta + leaf(layer.lora_B[name].bias)
            y = y + s * delta
    return y, leaves


def parameters_of(layer: Linear) -> list[Tensor]:
    """The layer's parameters in the order of ``written_out``'s leaves."""
    base = layer.get_base_layer()
    found = [] if base.bias is None else [base.bias]
    for name in layer.active_adapters:
        found += [layer.lora_A[name].weight, layer.lora_B[name].weight]
        if layer.use_dora[name]:
            found.append(layer.lora_magnitude_vector[name].weight)
        elif layer.lora_B[name].bias is not None:
            found.append(layer.lora_B[name].bias)
    return found


KINDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "plain": ({}, ["a"]),
    "rslora": ({"use_rslora": True}, ["a"]),
    "dropout": ({"lora_dropout": 0.3}, ["a"]),
    "bias": ({"lora_bias": True}, ["a"]),
    "several": ({}, ["a", "b", "c"]),
    "several dropout": ({"lora_dropout": 0.5}, ["a", "b"]),
    "dora": ({"use_dora": True}, ["a"]),
    "dora dropout": ({"use_dora": True, "lora_dropout": 0.3}, ["a"]),
    "dora several": ({"use_dora": True}, ["a", "b"]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec("int3", 32, True), QuantSpec("uint2")], ids=str)
@pytest.mark.parametrize("on_gpu", [False, True], ids=["layer", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters(
    kind: str, on_gpu: bool, spec: QuantSpec, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, names = KINDS[kind]
    monkeypatch.setattr(fused, "on_gpu", lambda x: on_gpu)
    config = LoraConfig(r=4, lora_alpha=10, target_modules=["x"], **options)
    for bias in (False, True):
        layer = adapted(spec, config, names, bias=bias)
        x = torch.randn(2, 5, 72, device=DEVICE).to(dtype).requires_grad_()
        fused_way = on_gpu and fused.applies(layer, names, x)
        assert fused_way == (on_gpu and kind in ("plain", "rslora", "dropout"))
        dropped = masks(layer, x, names, options.get("lora_dropout", 0.0), fused_way=fused_way)
        y = layer(x)
        X = x.detach().cpu().double().requires_grad_()
        want, leaves = written_out(layer, X, dropped)
        dy = torch.randn_like(y)
        parameters = parameters_of(layer)
        assert y.dtype == dtype
        assert error(y, want.detach()) < BOUNDS[dtype]
        got = torch.autograd.grad(y, [x, *parameters], dy)
        wanted = torch.autograd.grad(want, [X, *leaves], dy.cpu().double())
        for parameter, mine, exact in zip(["x", *parameters], got, wanted, strict=True):
            # a sum of few terms may cancel: twice the bound of a product
            bound = 2 * BOUNDS[dtype]
            assert error(mine, exact) < bound, (bias, getattr(parameter, "shape", parameter))


@pytest.mark.parametrize("dora", [False, True])
def test_adapted_embedding(dora: bool) -> None:
    q = quantize(torch.randn(50, 24), QuantSpec("int3", 32, True)).to(DEVICE)
    config = LoraConfig(r=4, lora_alpha=10, target_modules=["x"], use_dora=dora)
    layer = Embedding(QuantEmbedding.from_quantized(q), "a", config, r=4, lora_alpha=10).to(DEVICE)
    A, B = layer.lora_embedding_A["a"], layer.lora_embedding_B["a"]
    nn.init.normal_(A)
    nn.init.normal_(B)
    index = torch.randint(50, (2, 7), device=DEVICE)
    y = layer(index)
    a, b = (tensor.detach().cpu().double().requires_grad_() for tensor in (A, B))
    W = weight(q)
    delta = layer.scaling["a"] * (b @ a).t()  # (rows, width)
    leaves, parameters = [a, b], [A, B]
    want = (W + delta)[index.cpu()]
    if dora:
        magnitude = layer.lora_magnitude_vector["a"].weight
        magnitude.data.uniform_(0.5, 5.0)
        y = layer(index)
        m = magnitude.detach().cpu().double().requires_grad_()
        want = want * (m / (W + delta).norm(dim=0).detach())
        leaves.append(m)
        parameters.append(magnitude)
    dy = torch.randn_like(y)
    assert error(y, want.detach()) < BOUNDS[torch.float32]
    got = torch.autograd.grad(y, parameters, dy)
    for mine, exact in zip(got, torch.autograd.grad(want, leaves, dy.cpu().double()), strict=True):
        assert error(mine, exact) < 2 * BOUNDS[torch.float32]
