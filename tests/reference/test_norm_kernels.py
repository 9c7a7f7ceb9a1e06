"""RMSNorm's and the rotary embedding's kernels against float64, forward and backward.

Memory that was not written is NaN. Triton's interpreter truncates to bfloat16 where a GPU rounds: twice the
error.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from qlora_engine.fused_norms import Norm, rms_norm, rotary
from quant.backends import triton_norms
from tests.reference.float64 import BOUNDS, DEVICE, DTYPES, TRUNCATED, error

pytestmark = pytest.mark.usefixtures("poisoned")


def exact_norm(x: Tensor, weight: Tensor, norm: Norm) -> Tensor:
    w = weight + 1 if norm.one_plus else weight
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * w


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [Norm(1e-5, False, True), Norm(1e-6, False, False), Norm(1e-6, True, False)])
def test_rms_norm(norm: Norm, dtype: torch.dtype) -> None:
    """Sizes around a program's tile, more dimensions, rows with gaps, and transposed input and gradient."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 1), (3, 64), (2, 5, 16), (70, 48), (2, 2049)):
        weight = (torch.rand(shape[-1], generator=generator) + 0.5).to(dtype).to(DEVICE)
        wide = torch.randn(*shape[:-1], shape[-1] + 3, generator=generator).to(dtype).to(DEVICE)
        for x in (wide[..., : shape[-1]], wide.transpose(0, -1)[: shape[-1]].transpose(0, -1).contiguous()):
            x = x.detach().requires_grad_()
            X = x.detach().cpu().double().requires_grad_()
            y = rms_norm(x, weight, norm)
            want = exact_norm(X, weight.cpu().double(), norm)
            assert (y.shape, y.dtype) == (x.shape, dtype)
            assert error(y, want.detach()) < TRUNCATED * BOUNDS[dtype]
            dy = (
                torch.randn(*shape[::-1], generator=generator)
                .to(dtype)
                .to(DEVICE)
                .permute(*range(len(shape))[::-1])
            )
            (dx,) = torch.autograd.grad(y, x, dy)
            (true,) = torch.autograd.grad(want, X, dy.cpu().double())
            assert dx.dtype == dtype
            if shape != (1, 1):  # of one column nothing but rounding is left
                assert error(dx, true) < 2 * TRUNCATED * BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary(dtype: torch.dtype) -> None:
    """The memory order of a projection's output, heads that are no power of two, angles for one or all."""
    generator = torch.Generator().manual_seed(1)
    for batch, heads, k_heads, length, size, rows in (
        (1, 1, 1, 1, 2, 1),
        (2, 3, 1, 5, 24, 1),
        (3, 4, 2, 3, 16, 3),
    ):
        q, k = (
            torch.randn(batch, length, n, size, generator=generator)
            .to(dtype).to(DEVICE).transpose(1, 2).detach().requires_grad_()
            for n in (heads, k_heads)
        )  # fmt: skip
        cos, sin = (
            torch.randn(rows, length, size, generator=generator).to(dtype).to(DEVICE) for _ in range(2)
        )
        got = rotary(q, k, cos, sin)
        exact = [t.detach().cpu().double().requires_grad_() for t in (q, k)]
        half = size // 2
        want = [
            x * cos.cpu().double()[:, None]
            + torch.cat([-x[..., half:], x[..., :half]], -1) * sin.cpu().double()[:, None]
            for x in exact
        ]
        # a gradient in another order than the output, as attention's may be
        dys = [torch.randn(y.shape, generator=generator).to(dtype).to(DEVICE) for y in got]
        for y, true, x in zip(got, want, (q, k), strict=True):
            assert (y.dtype, y.stride()) == (dtype, x.stride())
            assert error(y, true.detach()) < TRUNCATED * BOUNDS[dtype]
        for mine, true in zip(
            torch.autograd.grad(got, (q, k), dys),
            torch.autograd.grad(want, exact, [dy.cpu().double() for dy in dys]),
            strict=True,
        ):
            assert mine.dtype == dtype
            assert error(mine, true) < TRUNCATED * BOUNDS[dtype]


def test_nothing_beside_the_output_is_written() -> None:
    storage = torch.full((9, 40), float("nan"), device=DEVICE)
    out, x = storage[2:5].view(-1)[:96].view(3, 32), torch.randn(3, 32, device=DEVICE)
    rstd = torch.full((5,), float("nan"), device=DEVICE)
    triton_norms.rms_norm(x, x[0].clone(), 1e-6, one_plus=False, early=True, out=out, rstd=rstd[1:4])
    assert storage.isnan().sum() == storage.numel() - 96
    assert rstd.isnan().tolist() == [True, False, False, False, True]
    q, k = torch.randn(1, 3, 2, 6, device=DEVICE), torch.randn(1, 1, 2, 6, device=DEVICE)
    cos = torch.randn(1, 2, 6, device=DEVICE)
    wide = torch.full((1, 4, 2, 8), float("nan"), device=DEVICE)
    triton_norms.rotary(q, k, cos, cos, wide[:, :3, :, :6], torch.empty_like(k))
    assert wide.isnan().sum() == wide.numel() - q.numel()


def test_what_does_not_fit_is_refused() -> None:
    x, w, rstd = (
        torch.randn(4, 8, device=DEVICE),
        torch.randn(8, device=DEVICE),
        torch.empty(4, device=DEVICE),
    )
    plain = {"one_plus": False, "early": True}
    for bad in (
        {"x": torch.randn(8, 4, device=DEVICE).t()},
        {"weight": w[:7]},
        {"out": torch.empty(3, 8, device=DEVICE)},
        {"rstd": rstd[:3]},
    ):
        arguments = {"x": x, "weight": w, "out": torch.empty_like(x), "rstd": rstd, **bad}
        with pytest.raises(ValueError, match="do not fit"):
            triton_norms.rms_norm(eps=1e-6, **plain, **arguments)
    with pytest.raises(ValueError, match="does not fit"):
        triton_norms.rms_norm_backward(x[:3], x, w, rstd, out=torch.empty_like(x), **plain)
    q, cos = torch.randn(2, 3, 4, 6, device=DEVICE), torch.randn(1, 4, 6, device=DEVICE)
    for k, angles in ((q[:1], cos), (q, cos[:, :3]), (q, cos.expand(3, 4, 6)), (q.transpose(2, 3), cos)):
        with pytest.raises(ValueError, match="do not fit"):
            triton_norms.rotary(q, k, angles, angles, torch.empty_like(q), torch.empty_like(q))
    odd = torch.randn(1, 1, 2, 5, device=DEVICE)
    with pytest.raises(ValueError, match="do not fit"):
        triton_norms.rotary(odd, odd, odd[0], odd[0], odd.clone(), odd.clone())
