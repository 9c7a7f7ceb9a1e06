"""Which product serves a few tokens, and the other ways of the GPU's path, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quant import QuantSpec, linear_op, quantize, small
from quant.backends import triton_product
from quant.linear import QuantLinear


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    small.set_small_product("measured")
    linear_op.set_chunk(None)


def layer(spec: QuantSpec, rows: int = 48, columns: int = 96) -> tuple[QuantLinear, Tensor]:
    q = quantize(torch.randn(rows, columns), spec)
    return QuantLinear.from_quantized(q, torch.randn(rows)), q.dequantize(torch.float32)


def run(module: QuantLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), dx


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec("int3", 32, True), QuantSpec("uint2")], ids=str)
def test_the_chosen_product_runs_forward_and_backward(
    spec: QuantSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, dense = layer(spec)
    calls: list[bool] = []
    real = triton_product.product

    def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
        calls.append(kwargs["transposed"])
        return real(*args, **kwargs)

    monkeypatch.setattr(triton_product, "product", counted)
    for tokens, expected in ((1, 1), (64, 1), (65, 0)):
        x = torch.randn(tokens, 96)
        for choice in ("triton", "dense", "measured"):
            small.set_small_product(choice)
            calls.clear()
            y, dx = run(module, x)
            torch.testing.assert_close(y, x @ dense.t() + module.bias, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(dx, dense.sum(0).expand(tokens, -1), rtol=1e-5, atol=1e-4)
            assert calls == ([False, True] if expected and choice == "triton" else [])


def test_nothing_is_chosen_that_was_not_measured() -> None:
    assert small.MEASURED == {}
    for tokens in (0, 1, 16, 64, 65):
        assert small.chosen(tokens, torch.device("cuda"), 4) == "dense"


def test_the_table_decides_by_device_width_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(small, "MEASURED", {((9, 0), 4): ((1, "absent_package"), (16, "triton"))})
    cuda = torch.device("cuda")
    assert [small.chosen(n, cuda, 4) for n in (1, 2, 16, 17, 65)] == ["triton"] * 3 + ["dense"] * 2
    assert small.chosen(1, cuda, 3) == small.chosen(1, torch.device("cpu"), 4) == "dense"
    small.set_small_product("dense")
    assert small.chosen(1, cuda, 4) == "dense"


def test_set_small_product() -> None:
    assert small.set_small_product("triton") == "measured"
    assert small.set_small_product("measured") == "triton"
    with pytest.raises(ValueError, match=r"'fast'.*allowed: measured, dense"):
        small.set_small_product("fast")


def test_a_product_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="needs bitsandbytes, which is not installed"):
        small.set_small_product("bitsandbytes")


def test_bitsandbytes_gemv_is_not_taken_on_a_cpu() -> None:
    pytest.importorskip("bitsandbytes")
    module, dense = layer(QuantSpec("nf4", 64), 32, 64)
    x = torch.randn(1, 64)
    small.set_small_product("bitsandbytes")
    torch.testing.assert_close(run(module, x)[0], x @ dense.t() + module.bias, rtol=1e-5, atol=1e-4)


def test_bitsandbytes_gemv_gets_what_its_operator_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    from quant.backends import bnb

    q = quantize(torch.randn(32, 64), QuantSpec("nf4", 64))
    fmt = q.spec.fmt
    with torch.device("meta"):  # the operator's own checks of shapes and dtypes
        parts = (torch.empty(1, 64).half(), torch.empty(1024, dtype=torch.uint8), torch.empty(32))
    monkeypatch.setattr(
        bnb, "tables", lambda fmt, device: type("T", (), {"levels": torch.empty(16, device="meta")})
    )
    assert bnb.gemv(*parts, (32, 64), fmt, 64).shape == (1, 32)


@pytest.mark.parametrize("elements", [1, 96 * 7, 96 * 48, 10**9])
def test_chunks_make_one_product(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_op, "_whole", lambda device: True)  # the GPU's path
    module, dense = layer(QuantSpec("nf4", 64, True))
    x = torch.randn(5, 96)
    sizes: list[int] = []
    real = linear_op.workspace
    monkeypatch.setattr(linear_op, "workspace", lambda numel, *a: (sizes.append(numel), real(numel, *a))[1])
    linear_op.set_chunk(elements)
    y, dx = run(module, x)
    torch.testing.assert_close(y, x @ dense.t() + module.bias, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dx, dense.sum(0).expand(5, -1), rtol=1e-5, atol=1e-4)
    assert max(sizes) <= max(96, elements)
    with pytest.raises(ValueError, match="at least one"):
        linear_op.set_chunk(0)


def test_the_shared_buffer_is_locked_until_it_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(linear_op, "_whole", lambda device: True)
    module, _ = layer(QuantSpec())
    held: list[bool] = []
    real = torch.nn.functional.linear

    def watched(*args):  # type: ignore[no-untyped-def]
        other = threading.Thread(
            target=lambda: held.append(not linear_op.using_workspace.acquire(blocking=False))
        )
        other.start()
        other.join()
        return real(*args)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    module(torch.randn(2, 96))
    assert held == [True]
    assert linear_op.using_workspace.acquire(blocking=False)
    linear_op.using_workspace.release()
