"""What the fused functions launch, counted so that a kernel too many shows; torch.compile; CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from qlora_engine import LoftQConfig, LoraConfig, fused, fused_blocks, fused_products, get_peft_model
from qlora_engine.fused import lora_linear
from quant import QuantSpec, linear_op, quantize
from quant.backends import triton_blocks, triton_rounding
from quant.linear import QuantLinear
from quant.linear_op import Weight

# Operators that launch nothing: views, and memory from the allocator.
_FREE = {
    *(
        "view",
        "_unsafe_view",
        "reshape",
        "t",
        "transpose",
        "slice",
        "select",
        "detach",
        "alias",
        "as_strided",
    ),
    *(
        "expand",
        "unsqueeze",
        "squeeze",
        "split",
        "empty",
        "new_empty",
        "lift_fresh",
        "empty_like",
        "empty_strided",
    ),
}


class Launches(TorchDispatchMode):
    """Names of what would be launched on a GPU: each operator once, a decode and a Triton kernel as one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        self._quiet = False
        # the GPU's path, and each of our kernels as one launch whatever stands for it here
        monkeypatch.setattr(linear_op, "_whole", lambda device: True)
        for owner, name in (
            (Weight, "decode"),
            (triton_blocks, "swiglu"),
            (triton_blocks, "swiglu_backward"),
        ):
            monkeypatch.setattr(owner, name, self._counted(name, getattr(owner, name)))

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self._quiet:  # a decode into strided rows goes by way of another one on a CPU
                self.names.append(name)
            self._quiet, before = True, self._quiet
            try:
                return real(*args, **kwargs)
            finally:
                self._quiet = before

        return run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if not self._quiet and name not in _FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    return Launches(monkeypatch)


def part(rows: int, columns: int, rank: int = 4) -> fused_products.Part:
    module = QuantLinear.from_quantized(quantize(torch.randn(rows, columns), QuantSpec("nf4", 64, True)))
    A, B = (nn.Parameter(torch.randn(shape)) for shape in ((rank, columns), (rows, rank)))
    return fused_products.Part(fused.weight_of(module), A, B, 0.5)


def counted(launches: Launches, run: Callable[[], Any], x: Tensor) -> tuple[list[str], list[str]]:
    """Forward's and backward's launches."""
    with launches:
        y = run()
        forward = list(launches.names)
        launches.names.clear()
        outputs = y if isinstance(y, tuple) else (y,)
        dys = [torch.empty_like(out) for out in outputs]
        torch.autograd.backward(outputs, dys)
    assert x.grad is not None
    return forward, [name for name in launches.names if name not in ("ones_like",)]


def test_a_layer_takes_ten_kernels(launches: Launches) -> None:
    module = QuantLinear.from_quantized(quantize(torch.randn(48, 96), QuantSpec("nf4", 64, True)))
    x = torch.randn(5, 96, requires_grad=True)
    A, B = (nn.Parameter(torch.randn(shape)) for shape in ((4, 96), (48, 4)))
    forward, backward = counted(launches, lambda: lora_linear(x, module, A, B, 0.5), x)
    assert forward == ["decode", "mm", "mm", "addmm_"]
    assert sorted(backward) == sorted(["addmm", "addmm", "mm", "decode", "mm", "addmm_"])


def test_the_mlp_and_qkv_take_no_more_than_they_did(launches: Launches) -> None:
    x = torch.randn(5, 64, requires_grad=True)
    gate, up, down = part(96, 64), part(96, 64), part(64, 96)
    forward, backward = counted(launches, lambda: fused_products.swiglu_mlp(x, gate, up, down), x)
    assert forward.count("decode") == backward.count("decode") == 3
    assert len(forward) <= 17, forward
    assert len(backward) <= 20, backward  # two copies, and down's h once more
    launches.names.clear()
    x.grad = None
    qkv = [part(64, 64), part(32, 64), part(32, 64)]
    forward, backward = counted(launches, lambda: fused_products.shared_input(x, *qkv), x)
    assert len(forward) <= 11, forward
    assert len(backward) <= 15, backward


@pytest.fixture
def compiled_llama(make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(fused, "on_gpu", lambda x: True)
    config = LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=4)
    )
    model = get_peft_model(make_model("llama", num_hidden_layers=1), config)
    assert fused_blocks.enable(model) == 2 + 3 + 1  # blocks, norms, the rotary embedding
    torch._dynamo.reset()
    yield model.get_base_model().model.layers[0]
    torch._dynamo.reset()


def test_fused_blocks_compile_without_a_break(compiled_llama: Any) -> None:
    block, attention = compiled_llama.mlp, compiled_llama.self_attn

    def run(x: Tensor) -> Tensor:
        q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        return block(x).sum() + (q.sum() + k.sum() + v.sum())

    x, y = (torch.randn(2, 3, 64).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    run(x).backward()
    torch.compile(run, fullgraph=True, backend="aot_eager")(y).backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-4, atol=1e-5)


def test_dropout_is_refused_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    module = QuantLinear.from_quantized(quantize(torch.randn(48, 96), QuantSpec()))
    x, A, B = torch.randn(5, 96), torch.randn(4, 96), torch.randn(48, 4)
    monkeypatch.setattr(fused, "is_capturing", lambda device: True)
    lora_linear(x, module, A, B, 1.0)
    with pytest.raises(RuntimeError, match="one mask at every replay"):
        lora_linear(x, module, A, B, 1.0, dropout=0.1)


def test_kernels_refuse_strides_that_they_would_misread() -> None:
    wide, out = torch.randn(4, 64), torch.empty(4, 16)
    triton_blocks.swiglu(wide[:, 10:50], out)
    torch.testing.assert_close(out, nn.functional.silu(wide[:, 10:26]) * wide[:, 26:42])
    for gate_up, other in (
        (torch.randn(64, 4).t(), out),
        (wide, torch.empty(16, 4).t()),
        (wide[:, :30], out),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            triton_blocks.swiglu(gate_up, other)
        with pytest.raises(ValueError, match="does not fit"):
            triton_blocks.swiglu_backward(gate_up, other)
    with pytest.raises(ValueError, match="must be contiguous"):
        triton_blocks.dropout(wide.t(), 0.5, 1, torch.empty(64, 4))
    square = torch.randn(16, 16)
    levels, midpoints = torch.tensor([-1.0, 0.0, 1.0, 2.0]), torch.tensor([-0.5, 0.5, 1.5])
    with pytest.raises(ValueError, match="must be contiguous"):
        triton_rounding.sweep_columns(square, square.t(), square, square, square, None, levels, midpoints)


@pytest.mark.parametrize("seed", [0, 1, 16, 2**31 - 2])
def test_dropout_takes_any_seed_for_one_kernel(seed: int) -> None:
    x = torch.ones(3000)
    out = triton_blocks.dropout(x, 0.25, seed, torch.full_like(x, float("nan")))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert 0.70 < float((out != 0).float().mean()) < 0.80
    assert torch.equal(triton_blocks.dropout(x, 0.25, seed, torch.empty_like(x)), out)


def test_forgetting_leaves_other_devices_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = {(torch.float32, device, stream): torch.empty(1) for device in (0, 1) for stream in (5, 6)}
    monkeypatch.setattr(linear_op, "_gpu_buffers", buffers)
    linear_op.forget_workspaces(torch.device("cuda", 0))
    assert sorted(key[1:] for key in buffers) == [(1, 5), (1, 6)]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    linear_op.forget_workspaces(torch.device("cuda"))
    assert not buffers
