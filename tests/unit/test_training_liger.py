"""liger-kernel's loss against ours: when it is taken, that it is the same, and what it holds."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import pytest
import torch

from qlora_engine.errors import InputError
from qlora_engine.training import liger
from qlora_engine.training import loss as module
from qlora_engine.training.loss import chunked_cross_entropy, loss_bytes, use_chunked_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton is interpreted where there is no GPU


def needs_liger() -> None:
    pytest.importorskip("liger_kernel")
    pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [1, 40])
def test_equals_ours(rows: int, dtype: torch.dtype) -> None:
    needs_liger()
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 12, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = torch.randn(50, 12, generator=generator).to(DEVICE, dtype)
    targets = torch.randint(50, (rows,), generator=generator).to(DEVICE)
    targets[1::3] = -100
    got = liger.cross_entropy(hidden, weight, targets, 16)
    want = chunked_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    (a,) = torch.autograd.grad(3 * got, hidden)
    (b,) = torch.autograd.grad(3 * want, hidden)
    assert b.any()
    scale = float(b.abs().max())
    torch.testing.assert_close(a, b, rtol=0, atol=scale * (1e-5 if dtype == torch.float32 else 4e-3))


def test_no_labels_at_all_is_zero() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    total = liger.cross_entropy(hidden, torch.randn(9, 8), torch.full((4,), -100), 16)
    total.backward()
    assert float(total.detach()) == 0.0
    assert torch.equal(hidden.grad, torch.zeros(4, 8))


def losses_and_gradients(model: Any) -> list[torch.Tensor]:
    device = next(model.parameters()).device
    ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(1)).to(device)
    labels = ids.clone()
    labels[:, :6] = -100
    model.zero_grad()
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def adapted(model: Any) -> Any:
    from qlora_engine import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    return get_peft_model(model, config).eval()


def test_a_model_trains_the_same_with_either(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_liger()
    monkeypatch.setattr(liger, "why_not", lambda *_: "")  # as on a GPU
    seen: list[int] = []
    real = liger.cross_entropy
    monkeypatch.setattr(liger, "cross_entropy", lambda *args: seen.append(len(args[0])) or real(*args))
    model = adapted(make_model("llama").to(DEVICE))
    assert use_chunked_loss(model, "chunked") == "chunked"
    want = losses_and_gradients(model)
    assert not seen
    assert use_chunked_loss(model) == "liger"
    got = losses_and_gradients(model)
    assert seen == [2 * 20]
    assert len(got) == len(want) > 10
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    assert "needs a GPU, the model is on cpu" in liger.why_not(torch.zeros(3, 2), None, None)
    assert "has a bias" in liger.why_not(weight, torch.zeros(3), None)  # type: ignore[arg-type]
    assert "are capped" in liger.why_not(weight, None, 30.0)  # type: ignore[arg-type]
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "liger_kernel" else found(n))
    assert "not installed (pip install" in liger.why_not(weight, None, None)  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: n)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", None)
    assert "cannot be imported" in liger.why_not(weight, None, None)  # type: ignore[arg-type]
    monkeypatch.setattr(liger, "_function", lambda: lambda input, weight, target, reduction: None)
    assert "older than 0.8.5" in liger.why_not(weight, None, None)  # type: ignore[arg-type]
    monkeypatch.setattr(liger, "_function", lambda: lambda input, weight, target, chunk_mem_const: None)
    assert liger.why_not(weight, None, None) == ""  # type: ignore[arg-type]


def test_what_was_asked_for_and_cannot_run_is_refused(make_model: Any) -> None:
    model = make_model("llama").requires_grad_(False)
    assert use_chunked_loss(model, "auto") == "chunked"
    with pytest.raises(InputError, match="loss='liger': liger-kernel needs a GPU"):
        use_chunked_loss(model, "liger")
    with pytest.raises(InputError, match="loss='fused'; allowed: auto, liger, chunked"):
        use_chunked_loss(model, "fused")
    model.get_output_embeddings().weight.requires_grad_(True)
    with pytest.raises(InputError, match="this model's head allows its own loss alone"):
        use_chunked_loss(model, "liger")


@pytest.mark.parametrize("rows", [1, 500, 1024, 1100, 8000, 65536])
@pytest.mark.parametrize(("vocabulary", "hidden"), [(128256, 4096), (49152, 576), (384, 64)])
def test_chunks_are_as_large_as_allowed(rows: int, vocabulary: int, hidden: int) -> None:
    chosen = liger.chunk_rows(rows, vocabulary, hidden, 1024)
    assert min(rows, 512) <= chosen <= 1024
    sizes = {"tokens": rows, "vocabulary": vocabulary, "hidden": hidden, "element_size": 2}
    ours = loss_bytes("chunked", **sizes, in_place=True)
    assert loss_bytes("liger", **sizes) <= loss_bytes("", **sizes)
    assert ours < loss_bytes("chunked", **sizes) <= loss_bytes("", **sizes)


def test_rows_are_liger_kernels_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes of the chunks that its code makes are those that are planned with."""
    needs_liger()
    import liger_kernel.ops.fused_linear_cross_entropy as ops

    real, seen = ops.liger_cross_entropy_kernel, []

    class Kernel:
        def __getitem__(self, grid: tuple[int]) -> Any:
            seen.append(grid[0])
            return real[grid]

    monkeypatch.setattr(ops, "liger_cross_entropy_kernel", Kernel())
    for rows in (5, 24, 33, 120):
        seen.clear()
        hidden, weight = torch.randn(rows, 4, device=DEVICE), torch.randn(50, 4, device=DEVICE)
        liger.cross_entropy(hidden, weight, torch.zeros(rows, dtype=torch.long, device=DEVICE), 8)
        assert max(seen) == liger.chunk_rows(rows, 50, 4, 8) <= 8
        assert sum(seen) == rows


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_it_is_taken_equal_and_smaller(dtype: torch.dtype, make_model: Any) -> None:
    needs_liger()
    model = adapted(make_model("llama", dtype=dtype).cuda())
    assert use_chunked_loss(model, "chunked") == "chunked"
    want = losses_and_gradients(model)
    assert use_chunked_loss(model) == "liger"
    got = losses_and_gradients(model)
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(32000, 512, generator=generator, device="cuda").mul_(0.05).to(dtype)
    hidden = torch.randn(4096, 512, generator=generator, device="cuda").to(dtype).requires_grad_()
    targets = torch.randint(32000, (4096,), generator=generator, device="cuda")
    peaks, found = [], []
    for compute in (
        lambda: liger.cross_entropy(hidden, weight, targets, module.CHUNK_ROWS),
        lambda: chunked_cross_entropy(hidden, weight, targets),
    ):
        torch.autograd.grad(compute(), hidden)  # compiled, and workspaces made
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = compute()
        found.append((loss.detach(), torch.autograd.grad(loss, hidden)[0]))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=0)
    scale = float(found[1][1].float().abs().max())
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=tolerance * scale)
    sizes = {"tokens": 4096, "vocabulary": 32000, "hidden": 512, "element_size": dtype.itemsize}
    for kind, peak in zip(("liger", "chunked"), peaks, strict=True):
        planned = loss_bytes(kind, **sizes, in_place=True)
        assert 0.5 * planned <= peak <= 1.2 * planned + (8 << 20)
