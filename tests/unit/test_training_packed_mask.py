"""The one mask of a packed batch: the same losses and gradients as transformers' own, kept once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_engine import LoraConfig, get_peft_model
from qlora_engine.training import loss as module
from qlora_engine.training.data import Collator, Example
from qlora_engine.training.packed_mask import packed_mask, takes_packed_mask

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
