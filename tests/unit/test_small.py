"""Which product serves one token, and the lock of the GPU's path, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quant import QuantSpec, linear_op, quantize, small
from quant.linear import QuantLinear


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    small.set_small_product("auto")


def layer(spec: QuantSpec, rows: int = 48, columns: int = 96) -> tuple[QuantLinear, Tensor]:
    q = quantize(torch.randn(rows, columns), spec)
    return QuantLinear.from_quantized(q, torch.randn(rows)), q.dequantize(torch.float32)


def run(module: QuantLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), dx


def test_one_token_on_a_gpu_is_worth_it_unless_switched_off() -> None:
    class Rows:
        device = torch.device("cuda")

        def __init__(self, tokens: int) -> None:
            self.shape = (tokens, 96)

    assert [small.worth_it(Rows(tokens)) for tokens in (0, 1, 2)] == [False, True, False]  # type: ignore[arg-type]
    assert not small.worth_it(torch.randn(1, 96))
    small.set_small_product("dense")
    assert not small.worth_it(Rows(1))  # type: ignore[arg-type]


def test_the_gemv_gets_the_weight_and_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    from quant.backends import bnb

    module, dense = layer(QuantSpec("nf4", 32, True))
    q = module.quantized()

    def gemv(x, codes, scales, shape, fmt, block_size):  # type: ignore[no-untyped-def]
        assert (shape, fmt.name, block_size, scales.numel()) == ((48, 96), "nf4", 32, 144)
        return x @ dense.t()

    class OnGpu(Tensor):  # a CPU's tensor that says it lies on a GPU
        device = torch.device("cuda")

    monkeypatch.setattr(bnb, "gemv", gemv)
    monkeypatch.setattr(bnb, "unavailable", lambda *args: None)
    x = torch.randn(1, 96)
    gpu_x = x.as_subclass(OnGpu)
    y = small.multiply(gpu_x, q, module.bias)
    assert y is not None
    torch.testing.assert_close(torch.Tensor(y), x @ dense.t() + module.bias, rtol=1e-6, atol=1e-6)
    assert small.multiply(torch.randn(2, 96).as_subclass(OnGpu), q, None) is None
    assert small.multiply(x, q, None) is None
    monkeypatch.setattr(bnb, "unavailable", lambda *args: "not installed")
    assert small.multiply(gpu_x, q, None) is None


def test_set_small_product() -> None:
    assert small.set_small_product("dense") == "auto"
    assert small.set_small_product("auto") == "dense"
    with pytest.raises(ValueError, match=r"'fast'.*allowed: auto, dense"):
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
