"""Packed rows by one mask, or by where they begin: losses and gradients as with transformers' own masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_engine import LoraConfig, get_peft_model
from qlora_engine.training import loss as module
from qlora_engine.training import packed_rows
from qlora_engine.training.data import Collator, Example
from qlora_engine.training.packed_rows import (
    attend_by_beginnings,
    attends_by_beginnings,
    packed_mask,
    row_beginnings,
    takes_packed_mask,
)

ROWS = [[5, 9, 11, 40, 7], [30, 31, 32], [99, 100, 101, 102, 103, 104]]


def test_rows_see_themselves_alone() -> None:
    mask = packed_mask(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]), torch.float32)
    assert mask.shape == (2, 1, 5, 5)
    assert (mask[:, 0] == 0).int().tolist() == [
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]],
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]],
    ]
    assert mask.stride(2) % 16 == 0
    assert packed_mask(torch.arange(3)[None], torch.float16).min() == torch.finfo(torch.float16).min


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
def test_a_mask_has_the_bytes_that_are_planned(length: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        mask = packed_mask(torch.arange(length).expand(3, length), dtype)
        assert packed_rows.mask_bytes(3, length, dtype) == mask.untyped_storage().nbytes()


@pytest.mark.parametrize("error", [TypeError, ValueError, RuntimeError])
def test_a_model_that_takes_no_positions_takes_no_mask(
    error: type[Exception], make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama").train()
    assert takes_packed_mask(model)

    def forward(**inputs: Any) -> Any:
        raise error

    monkeypatch.setattr(model, "forward", forward)
    assert not takes_packed_mask(model)
    assert model.training


def batch() -> dict[str, Any]:
    rows = [Example(ids, ids) for ids in ROWS]
    return Collator(0, packed=True)([rows, rows[1:]])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mixtral"])
def test_losses_and_gradients_are_the_same(
    name: str, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    # dropout of the attention has it keep all its scores
    options = {"attn_pdrop": 0.0} if name == "gpt2" else {}
    model = get_peft_model(make_model(name, **options), config).train()

    def run() -> tuple[list[torch.Tensor], set[int]]:
        model.zero_grad()
        torch.manual_seed(5)  # GPT-2 has dropout elsewhere
        inputs, kept = batch(), set()
        length = inputs["input_ids"].shape[1]

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.shape[-2:] == (length, length):
                kept.add(tensor.untyped_storage().data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**inputs).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)], kept

    monkeypatch.setattr(module, "takes_packed_mask", lambda _: False)
    assert module.use_chunked_loss(model)
    want, every = run()
    monkeypatch.undo()
    assert module.use_chunked_loss(model)
    got, once = run()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    if takes_packed_mask(model.get_base_model()):
        layers = model.get_base_model().config.num_hidden_layers
        assert (len(every), len(once)) == (layers, 1)
    else:
        assert name == "mixtral"  # whose default window is set


def test_windows_and_other_attention_keep_their_own(make_model: Any) -> None:
    assert takes_packed_mask(make_model("llama"))
    eager = make_model("llama")
    eager.config._attn_implementation = "eager"
    assert not takes_packed_mask(eager)
    windowed = make_model("llama")
    windowed.config.sliding_window = 64
    assert not takes_packed_mask(windowed)
    mixed = make_model("qwen3")
    mixed.config.layer_types = ["full_attention", "sliding_attention"]
    assert not takes_packed_mask(mixed)


def test_beginnings_of_rows() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 1]])
    assert row_beginnings(positions).tolist() == [[[[0, 3, 5, 7, 8, 10]]]]
    assert row_beginnings(positions, 7).tolist() == [[[[0, 3, 5, 7, 8, 10, 10, 10]]]]
    assert row_beginnings(positions).dtype == torch.int32
    rows = [Example(ids, ids) for ids in ROWS]
    made = Collator(0, packed=True, most=3)([rows, rows[1:]])
    assert made["row_beginnings"].flatten().tolist() == [0, 5, 8, 14, 17, 23, 28, 28, 28]
    assert "row_beginnings" not in batch()


def causal_rows(q: Any, k: Any, v: Any, begins: Any, longest: int, scale: float) -> torch.Tensor:
    """What flash attention computes, row after row, for a CPU."""
    groups = q.shape[1] // k.shape[1]
    out = []
    for first, last in zip(begins.tolist(), begins.tolist()[1:]):
        assert last - first <= longest
        a, b, c = (t[first:last].transpose(0, 1) for t in (q, k, v))
        b, c = (t.repeat_interleave(groups, 0) for t in (b, c))
        out.append(
            torch.nn.functional.scaled_dot_product_attention(a, b, c, is_causal=True, scale=scale).transpose(
                0, 1
            )
        )
    return torch.cat(out)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_rows, "flash_runs", lambda device, dtype: True)
    monkeypatch.setattr(packed_rows, "causal_rows", causal_rows)


@pytest.mark.parametrize("recomputed", [0, 2])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_by_beginnings_losses_and_gradients_are_the_same(
    name: str, recomputed: int, make_model: Any, monkeypatch: pytest.MonkeyPatch, flash: None
) -> None:
    from qlora_engine.training import recompute

    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    options = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if name == "gpt2" else {}
    model = get_peft_model(make_model(name, **options), config).train()
    recompute.apply(model, recomputed)
    base = model.get_base_model()
    if recomputed:
        base.enable_input_require_grads()

    def run(**more: Any) -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(**batch(), **more).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    monkeypatch.setattr(module, "attend_by_beginnings", lambda _: False)
    assert module.use_chunked_loss(model)
    want = run()
    monkeypatch.undo()
    monkeypatch.setattr(packed_rows, "flash_runs", lambda device, dtype: True)
    monkeypatch.setattr(packed_rows, "causal_rows", causal_rows)
    assert module.use_chunked_loss(model)
    assert attends_by_beginnings(base)
    same = run()  # not told of beginnings: by the mask
    monkeypatch.setattr(module, "packed_mask", lambda *_: pytest.fail("a mask was made"))
    got = run(row_beginnings=row_beginnings(batch()["position_ids"], 9))
    for found in (same, got):
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert recompute.plan(
        model, batch_size=2, length=32, packed=torch.float32, loss_function="chunked"
    ).mask == 0  # fmt: skip


def test_without_beginnings_nothing_changes(make_model: Any, flash: None) -> None:
    model = make_model("llama").eval()
    ids = torch.arange(5, 25).reshape(2, 10)
    padded = torch.ones_like(ids)
    padded[0, :4] = 0
    inputs = {"input_ids": ids, "attention_mask": padded}
    with torch.no_grad():
        want = model(**inputs).logits, model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert attend_by_beginnings(model)
        got = model(**inputs).logits, model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {"attn_pdrop": 0.1}),  # of the scores, which flash attention does not keep
        ("llama", {"attention_dropout": 0.1}),
        ("llama", {"attn_implementation": "eager"}),
        ("mixtral", {"sliding_window": 8}),
    ],
)
def test_who_cannot_keeps_its_attention(
    name: str, changes: dict[str, Any], make_model: Any, flash: None
) -> None:
    model = make_model(name, **changes)
    before = model.config._attn_implementation
    assert not attend_by_beginnings(model)
    assert model.config._attn_implementation == before
    assert not attends_by_beginnings(model)


def test_a_cpu_has_no_flash_attention(make_model: Any) -> None:
    assert not attend_by_beginnings(make_model("llama"))


@pytest.mark.gpu
@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_by_beginnings_as_by_the_mask(
    dtype: torch.dtype, replayed: bool, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training as qlora-finetune does it; with graphs, at the third step."""
    from qlora_engine import fused_blocks
    from qlora_engine.training import graphs

    if not packed_rows.flash_runs(torch.device("cuda"), dtype):
        pytest.skip("no flash attention over rows here")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(make_model("llama", dtype=dtype).cuda(), config).train()
    fused_blocks.enable(model)
    inputs = {name: tensor.cuda() for name, tensor in batch().items()}

    def run(**more: Any) -> list[torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cuda", dtype=dtype):
            loss = model(**inputs, **more).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    assert module.use_chunked_loss(model)
    assert attends_by_beginnings(model.get_base_model())
    want = run()
    monkeypatch.setattr(module, "packed_mask", lambda *_: pytest.fail("a mask was made"))
    replay = graphs.enable(model, "on") if replayed else None
    for _ in range(3 if replayed else 1):
        got = run(row_beginnings=row_beginnings(batch()["position_ids"], 9).cuda())
    if replay is not None:
        assert replay.ready, replay.failure
        replay.disable()
    for a, b in zip(got, want, strict=True):
        scale = float(b.float().abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=2e-2 * scale)


@pytest.mark.parametrize("takes", [{"window_size", "enable_gqa", "scale"}, {"is_causal"}])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_attention_over_rows_is_asked_in_each_release_s_words(
    takes: set[str], scaling: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's attention over rows is played by a function that keeps what it is called with."""
    asked: dict[str, Any] = {}

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **options: Any
    ) -> torch.Tensor:
        asked.update(options, q=q)
        return q

    monkeypatch.setattr(packed_rows, "_varlen", lambda: (attention, frozenset(takes)))
    query, key = (torch.randn(1, heads, 6, 16) for heads in (4, 2))
    begins = row_beginnings(torch.tensor([[0, 1, 2, 0, 1, 2]]))
    out, scores = packed_rows.attend(None, query, key, key, begins, scaling=scaling)
    assert (out.shape, scores) == ((1, 6, 4, 16), None)
    given = asked.pop("q")
    rows = query.transpose(1, 2).flatten(0, 1)
    if "scale" in takes:
        assert asked == {
            "window_size": (-1, 0),
            "enable_gqa": True,
            "scale": 0.25 if scaling is None else 0.3,
        }
        assert torch.equal(given, rows)
    else:
        assert asked == {"is_causal": True}
        torch.testing.assert_close(given, rows if scaling is None else rows * (0.3 / 0.25))
