"""The fused quantised-LoRA function against the product written out, forward and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qlora_engine.fused import lora_linear
from quant.linear import QuantLinear
from quant.spec import QuantSpec
from quant.tensor import quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def layer(rows: int = 48, columns: int = 96, spec: QuantSpec | None = None, bias: bool = True) -> QuantLinear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    q = quantize(weight, spec or QuantSpec())
    return QuantLinear.from_quantized(q, torch.randn(rows, generator=generator) if bias else None).to(DEVICE)


def inputs(*shape: int, rows: int = 48, columns: int = 96, rank: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = [
        torch.randn(size, generator=generator) for size in ((*shape, columns), (rank, columns), (rows, rank))
    ]
    x, A, B = (tensor.to(DEVICE).requires_grad_() for tensor in made)
    return x, A, B


@pytest.mark.parametrize(
    "spec", [QuantSpec(), QuantSpec("int3", 32, True), QuantSpec("uint2"), QuantSpec("nf4", 128)]
)
@pytest.mark.parametrize("shape", [(1,), (2, 5), (63,)])
def test_lora_linear_equals_the_product_written_out(spec: QuantSpec, shape: tuple[int, ...]) -> None:
    base, (x, A, B) = layer(spec=spec), inputs(*shape)
    y = lora_linear(x, base, A, B, 2.0)
    expected = x @ base.dequantize().t() + base.bias + 2.0 * (x @ A.t()) @ B.t()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    dy = torch.randn_like(y)
    for got, want in zip(
        torch.autograd.grad(y, (x, A, B), dy), torch.autograd.grad(expected, (x, A, B), dy), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-4)


def test_dropout_is_the_same_in_backward_and_scales_what_is_kept() -> None:
    base, (x, A, B) = layer(bias=False), inputs(400)
    torch.manual_seed(3)
    y = lora_linear(x, base, A, B, 1.5, dropout=0.25)
    # the mask, read off an adapter that passes its input through
    torch.manual_seed(3)
    eye = torch.eye(96, device=DEVICE)
    zero = QuantLinear.from_quantized(quantize(torch.zeros(96, 96), QuantSpec())).to(DEVICE)
    dropped = lora_linear(x.detach(), zero, eye, eye, 1.0, dropout=0.25)
    mask = (dropped != 0).float()
    assert 0.70 < float(mask.mean()) < 0.80
    torch.testing.assert_close(dropped, x.detach() * mask / 0.75)
    expected = x @ base.dequantize().t() + 1.5 * (x * mask / 0.75 @ A.t()) @ B.t()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    dy = torch.randn_like(y)
    for got, want in zip(
        torch.autograd.grad(y, (x, A, B), dy), torch.autograd.grad(expected, (x, A, B), dy), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_mask_again(use_reentrant: bool) -> None:
    base, (x, A, B) = layer(), inputs(50)

    def run(x: Tensor) -> Tensor:
        return lora_linear(x, base, A, B, 1.0, dropout=0.5)

    def gradients(through_checkpoint: bool) -> list[Tensor]:
        torch.manual_seed(5)
        y = checkpoint(run, x, use_reentrant=use_reentrant) if through_checkpoint else run(x)
        for leaf in (x, A, B):
            leaf.grad = None
        y.square().sum().backward()
        return [leaf.grad.clone() for leaf in (x, A, B)]

    for got, want in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(got, want)


def test_frozen_input_and_factors_get_no_gradient() -> None:
    base, (x, A, B) = layer(), inputs(7)
    x.requires_grad_(False)
    A.requires_grad_(False)
    lora_linear(x, base, A, B, 1.0).sum().backward()
    assert x.grad is None
    assert A.grad is None
    assert B.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_its_rounding(dtype: torch.dtype) -> None:
    base, (x, A, B) = layer(), inputs(33)
    y = lora_linear(x.to(dtype), base, A, B, 1.0)
    exact = (x @ base.dequantize().t() + base.bias + (x @ A.t()) @ B.t()).detach()
    assert y.dtype == dtype
    # rounding x, W, A, B and h to the format's unit u, sums in float32: a few u of the result's norm
    assert float((y.detach().float() - exact).norm() / exact.norm()) < 4 * torch.finfo(dtype).eps
    y.float().sum().backward()
    assert A.grad is not None
    assert A.grad.dtype == torch.float32


def test_autocast_sets_the_dtype() -> None:
    base, (x, A, B) = layer(), inputs(5)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert lora_linear(x, base, A, B, 1.0).dtype == torch.bfloat16
    assert lora_linear(x, base, A, B, 1.0).dtype == torch.float32
