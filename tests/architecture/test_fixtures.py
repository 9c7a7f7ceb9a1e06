"""The shared models do what the other tests take for granted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import MODELS


@pytest.mark.parametrize("name", list(MODELS))
def test_make_model_runs_and_gives_copies(name: str, make_model: Callable[..., Any]) -> None:
    model, again = make_model(name), make_model(name)
    tokens = torch.arange(3, 19).reshape(2, 8)
    extra = {"decoder_input_ids": tokens} if name == "t5" else {}
    with torch.no_grad():
        first = model(input_ids=tokens, **extra)[0]
        next(again.parameters()).add_(1.0)
        assert torch.isfinite(first).all()
        assert torch.equal(make_model(name)(input_ids=tokens, **extra)[0], first)


def test_make_checkpoint_shards(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("llama", shard_size="60KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert (folder / "tokenizer.json").is_file()


def test_make_tokenizer_round_trips(make_tokenizer: Callable[[], Any]) -> None:
    tokenizer = make_tokenizer()
    text = "Tiny real models, and a ü."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 384
    assert "hello" in tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
