"""The fused MLP, the shared q, k, v, and the kernels between their products, against float64.

As in test_products.py, memory that was not written is NaN. Triton's interpreter truncates to bfloat16 where a
GPU rounds: twice the error.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from qlora_engine import fused_products
from qlora_engine.fused_products import Part, shared_input, swiglu_mlp
from quant import QuantSpec, quantize
from quant.backends import triton_blocks
from quant.linear import QuantLinear
from quant.linear_op import TENSOR_NAMES, Weight
from tests.reference.float64 import BOUNDS, DEVICE, DTYPES, TRUNCATED, error, weight

SPECS = [QuantSpec(), QuantSpec("int3", 32, True), QuantSpec("uint2"), QuantSpec("bof4", 64)]


pytestmark = pytest.mark.usefixtures("poisoned")


def part(rows: int, columns: int, rank: int, spec: QuantSpec, scaling: float) -> tuple[Part, list[Tensor]]:
    """A layer with its adapter, and W, A and B in float64."""
    layer = QuantLinear.from_quantized(quantize(torch.randn(rows, columns) * columns**-0.5, spec)).to(DEVICE)
    A = (torch.randn(rank, columns) * columns**-0.5).to(DEVICE).requires_grad_()
    B = (torch.randn(rows, rank) * 0.5).to(DEVICE).requires_grad_()
    packed = Weight(tuple(getattr(layer, name) for name in TENSOR_NAMES), spec, layer.shape)
    exact = [weight(layer.quantized()), *(t.detach().cpu().double().requires_grad_() for t in (A, B))]
    return Part(packed, A, B, scaling), exact


def one(X: Tensor, exact: list[Tensor], scaling: float) -> Tensor:
    W, A, B = exact
    return X @ W.t() + scaling * (X @ A.t()) @ B.t()


def compare(
    got: tuple[Tensor, ...], want: tuple[Tensor, ...], x: Tensor, X: Tensor, parts: list[Part], exact: list
) -> None:
    """Outputs and all gradients."""
    # two or three products follow each other, each adds its rounding
    bound = 3 * TRUNCATED * BOUNDS[x.dtype]
    grads = [torch.randn_like(y) for y in got]
    leaves = [x, *(leaf for p in parts for leaf in (p.A, p.B))]
    exact_leaves = [X, *(leaf for e in exact for leaf in e[1:])]
    for mine, true in zip(got, want, strict=True):
        assert mine.dtype == x.dtype
        assert error(mine, true.detach()) < bound
    mine_grads = torch.autograd.grad(got, leaves, grads)
    true_grads = torch.autograd.grad(want, exact_leaves, [g.cpu().double() for g in grads])
    for number, (mine, true) in enumerate(zip(mine_grads, true_grads, strict=True)):
        assert error(mine, true) < bound, number


@pytest.mark.parametrize("most", [4096, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_swiglu_mlp(spec: QuantSpec, dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ten tokens at once, and the activation for four, four and two of them."""
    monkeypatch.setattr(fused_products, "_MOST_TOKENS", most)
    for hidden, width, ranks in ((64, 96, (4, 4, 4)), (48, 80, (3, 8, 5)), (16, 16, (1, 2, 3))):
        gate, up, down = made = [
            part(width, hidden, ranks[0], spec, 2.0),
            part(width, hidden, ranks[1], spec, 0.5),
            part(hidden, width, ranks[2], spec, 1.5),
        ]
        x = torch.randn(2, 5, hidden, device=DEVICE).to(dtype).requires_grad_()
        X = x.detach().cpu().double().requires_grad_()
        y = swiglu_mlp(x, gate[0], up[0], down[0])
        inner = torch.nn.functional.silu(one(X, gate[1], 2.0)) * one(X, up[1], 0.5)
        compare((y,), (one(inner, down[1], 1.5),), x, X, [p for p, _ in made], [e for _, e in made])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_shared_input(spec: QuantSpec, dtype: torch.dtype) -> None:
    for columns, rows, tokens in ((64, (64, 32, 32), 10), (50, (17, 1, 33), 1)):
        made = [part(n, columns, rank, spec, 1.5) for n, rank in zip(rows, (4, 3, 6), strict=True)]
        x = torch.randn(tokens, columns, device=DEVICE).to(dtype).requires_grad_()
        X = x.detach().cpu().double().requires_grad_()
        parts, exact = [p for p, _ in made], [e for _, e in made]
        compare(shared_input(x, *parts), tuple(one(X, e, 1.5) for e in exact), x, X, parts, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 75), (2, 1024), (2, 1500)])
def test_swiglu_kernels(tokens: int, width: int, dtype: torch.dtype) -> None:
    """Strided rows, sizes around a program's block, values from which exp over- and underflows."""
    storage = torch.full((tokens + 1, 2 * width + 9), float("nan"), device=DEVICE, dtype=dtype)
    gate_up = storage[:tokens, 3 : 2 * width + 6]
    gate_up[:, : 2 * width] = torch.randn(tokens, 2 * width) * 3
    if width > 1:
        gate_up[0, 0] = 90.0
        gate_up[-1, width - 1] = -90.0
    g, u = gate_up[:, : 2 * width].cpu().double().split(width, 1)
    g.requires_grad_()
    u.requires_grad_()
    want = torch.nn.functional.silu(g) * u
    out = triton_blocks.swiglu(gate_up, torch.empty(tokens, width, device=DEVICE, dtype=dtype))
    bound = TRUNCATED * BOUNDS[dtype]
    assert error(out, want.detach()) < bound
    grad = torch.randn(tokens, width, device=DEVICE).to(dtype)
    want_g, want_u = torch.autograd.grad(want, (g, u), grad.cpu().double())
    triton_blocks.swiglu_backward(gate_up, grad)
    assert error(gate_up[:, :width], want_g) < bound
    assert error(gate_up[:, width : 2 * width], want_u) < bound
    assert error(grad, want.detach()) < bound  # the output again
    assert storage.isnan().sum() == storage.numel() - tokens * 2 * width  # nothing beside was touched


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 1023, 1025, 5000])
def test_dropout_kernel(numel: int, dtype: torch.dtype, accumulate: bool) -> None:
    x, p = torch.randn(numel, device=DEVICE).to(dtype), 0.25
    ones = torch.ones(numel, device=DEVICE)
    kept = triton_blocks.dropout(ones, p, 7, torch.empty_like(ones)).cpu().double() != 0
    if numel > 1000:
        assert abs(float(kept.double().mean()) - (1 - p)) < 5 * (p * (1 - p) / numel) ** 0.5
    before = torch.randn(numel, device=DEVICE).to(dtype)
    out = before.clone() if accumulate else torch.empty_like(x)
    triton_blocks.dropout(x, p, 7, out, accumulate=accumulate)
    want = x.cpu().double() / (1 - p) * kept + (before.cpu().double() if accumulate else 0.0)
    assert float((out.cpu().double() - want).norm()) <= TRUNCATED * BOUNDS[dtype] * float(want.norm())
