"""Float8 products: against their definition written out, in layers; Triton's kernels to a step of float8."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_engine.fused import lora_linear
from quant import QuantizedTensor, QuantSpec, formats, fp8, quantize
from quant.linear import QuantLinear

WHY_NOT = fp8.unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
E4M3 = torch.float8_e4m3fn
SPECS = [QuantSpec(name, 64, nested) for name in formats.names() for nested in (False, True)]


def decoded(q: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """W8 as float32 and the row scales."""
    out = torch.empty(tuple(q.shape), dtype=E4M3)
    scales = fp8.weight(q, out, transposed=False)
    return out.float(), scales


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", [(48, 64), (32, 80)])
def test_weight_is_within_half_a_step_and_never_beyond_448(spec: QuantSpec, shape: tuple[int, int]) -> None:
    q = quantize(torch.randn(shape) * torch.rand(shape[0], 1).exp(), spec)
    dense = q.dequantize(torch.float32)
    w8, scales = decoded(q)
    assert w8.isfinite().all()
    # e4m3: three bits after the leading one, steps of 2^-9 below 2^-6
    step = torch.maximum((dense / scales[:, None]).abs() * 2**-4, torch.tensor(2.0**-10))
    assert ((w8 - dense / scales[:, None]).abs() <= step * 1.001).all()
    turned = torch.empty(shape[::-1], dtype=E4M3)
    assert torch.equal(fp8.weight(q, turned, transposed=True), scales)
    assert torch.equal(turned.float().t(), w8)
    if shape[1] % 64 == 0 and spec.format == "nf4" and not spec.double_quant:
        assert (w8.abs().amax(1) == fp8.LARGEST).all()  # the bound is reached where blocks hold their absmax


def test_rows_are_quantised_to_their_largest() -> None:
    x = torch.randn(5, 64) * torch.tensor([1e-8, 1.0, 1e4, 0.0, 1.0])[:, None]
    x[4, 7] = float("nan")
    x8, scales = fp8.quantize_rows(x)
    assert (x8.float().abs().amax(1)[:3] == 448).all()
    assert not x8[3].float().any()
    assert x8[4].float().isnan().all()
    back = x8[:3].float() * scales[:3, None]
    assert ((back - x[:3]).abs() <= x[:3].abs() * 2**-4 + scales[:3, None] * 2**-10).all()
    factor = torch.rand(64)
    assert torch.equal(
        fp8.quantize_rows(x[:3], factor)[0].float(), fp8.quantize_rows(x[:3] * factor)[0].float()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec("int3", 32, True), QuantSpec("uint2")], ids=str)
def test_linear_is_the_product_of_float8_values(spec: QuantSpec, dtype: torch.dtype) -> None:
    q = quantize(torch.randn(48, 96), spec)
    module = QuantLinear.from_quantized(q, torch.randn(48))
    module.compute = "fp8"
    x = torch.randn(2, 5, 96).to(dtype).requires_grad_()
    y = module(x)
    w8, scales = decoded(q)
    x8, x_scales = fp8.quantize_rows(x.detach().reshape(-1, 96))
    expected = (x8.float() * x_scales[:, None]) @ (w8 * scales[:, None]).t() + module.bias
    eps = torch.finfo(dtype).eps
    rounding = {"rtol": 4 * eps, "atol": max(40 * eps, 5e-5)}  # the latter: float32 sums in another order
    torch.testing.assert_close(y.float(), expected.view(2, 5, 48), **rounding)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    d8, d_scales = fp8.quantize_rows(dy.reshape(-1, 48), scales)
    torch.testing.assert_close(dx.float(), ((d8.float() * d_scales[:, None]) @ w8).view(2, 5, 96), **rounding)
    # and near the exact product: two factors of 4 significant bits
    dense = q.dequantize(torch.float32)
    exact, exact_dx = x.detach().float() @ dense.t() + module.bias, dy.float() @ dense
    assert 0.005 < (y.float() - exact).norm() / exact.norm() < 0.06
    assert 0.005 < (dx.float() - exact_dx).norm() / exact_dx.norm() < 0.06
    assert y.dtype == dx.dtype == dtype
    assert "compute=fp8" in repr(module)


def test_the_fused_function_uses_the_same_products() -> None:
    module = QuantLinear.from_quantized(quantize(torch.randn(48, 96), QuantSpec()))
    module.compute = "fp8"
    x, A, B = torch.randn(7, 96, requires_grad=True), torch.randn(4, 96), torch.randn(48, 4)
    y, z = lora_linear(x, module, A, B, 0.5), module(x) + 0.5 * (x @ A.t()) @ B.t()
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-4)
    dy = torch.randn_like(y)
    got, want = (torch.autograd.grad(out, x, dy)[0] for out in (y, z))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_compiles_without_a_break() -> None:
    module = QuantLinear.from_quantized(quantize(torch.randn(48, 96), QuantSpec("nf4", 32, True)))
    module.compute = "fp8"
    x = torch.randn(3, 96, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))
    compiled(x).sum().backward()
    assert x.grad is not None


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"the weight is \(48, 90\); both must be multiples of 16"):
        fp8.check(torch.device("cpu"), (48, 90))
    with pytest.raises(RuntimeError, match=r"not on 'meta'"):
        fp8.check(torch.device("meta"), (48, 96))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(RuntimeError, match=r"A100 has no float8 tensor cores: .* 8\.0, needed 8\.9"):
        fp8.check(torch.device("cuda", 7), (48, 96))
    fp8.unavailable.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fp8.unavailable(torch.device("cuda", 7)) is None
    fp8.unavailable.cache_clear()


# ---- Triton's kernels. A quotient may differ in its last bit, which moves a tie by one step.


def float8_steps(a: Tensor, b: Tensor) -> int:
    """Largest distance of two float8 tensors in steps."""
    bits = [t.view(torch.uint8).int() for t in (a, b)]
    signed = [torch.where(v >= 128, 128 - v, v) for v in bits]
    return int((signed[0] - signed[1]).abs().max())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_triton_decodes_the_same_weight(spec: QuantSpec) -> None:
    pytest.importorskip("triton")
    from quant.backends import triton_fp8

    for shape in ((48, 144), (33, 64), (17, 75)):
        q = quantize(torch.randn(shape), spec)
        fields = (q.codes, q.scales, q.zeros, q.nested_scales, q.nested_offset, q.nested_map)
        want = torch.empty(shape, dtype=E4M3)
        want_scales = fp8.weight(q, want, transposed=False)
        scales = triton_fp8.row_scales(fields, shape, q.spec.fmt, 64, fp8.LARGEST, fp8._TINY)
        torch.testing.assert_close(scales, want_scales, rtol=1e-6, atol=0)
        for transposed in (False, True):
            out = torch.full(shape[::-1] if transposed else shape, float("nan")).to(E4M3)
            triton_fp8.decode(fields, shape, q.spec.fmt, 64, want_scales, out, transposed=transposed)
            assert float8_steps((out.t() if transposed else out).contiguous(), want) <= 1


@pytest.mark.parametrize("columns", [1, 75, 5000])
def test_triton_quantises_the_same_rows(columns: int) -> None:
    pytest.importorskip("triton")
    from quant.backends import triton_fp8

    x = torch.randn(6, columns + 3)[:, 3:] * torch.tensor([1e-8, 1.0, 1e4, 0.0, 1.0, 1.0])[:, None]
    for factor in (None, torch.rand(columns)):
        x8, scales = triton_fp8.quantize_rows(x, factor, fp8.LARGEST, fp8._TINY)
        want, want_scales = fp8.quantize_rows(x, factor)
        torch.testing.assert_close(scales, want_scales, rtol=1e-6, atol=0)
        assert float8_steps(x8, want) <= 1
    x[5, 0] = float("nan")
    assert triton_fp8.quantize_rows(x, None, fp8.LARGEST, fp8._TINY)[1].isnan().tolist() == [False] * 5 + [
        True
    ]
