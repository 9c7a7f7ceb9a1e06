"""A run from Python: early stopping, NEFTune, event files, offload, memory advice, generation after it."""

from __future__ import annotations

import copy
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_engine import LoftQConfig, LoraConfig, get_peft_model
from qlora_engine.errors import InputError
from qlora_engine.training import run as module
from qlora_engine.training.run import Settings, finetune


@pytest.fixture
def model(make_model: Any) -> Any:
    config = LoraConfig(
        r=4,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights="loftq",
        loftq_config=LoftQConfig(loftq_bits=4),
    )
    return get_peft_model(make_model("llama"), config)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i} and one is", "completion": f" {i + 1}."} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def settings(data: Path, **changes: Any) -> Settings:
    values: dict[str, Any] = {
        "data": data,
        "output": data.parent / "out",
        "max_steps": 3,
        "batch_size": 2,
        "max_length": 48,
        "learning_rate": 0.01,
    }
    return Settings(**{**values, **changes})


def test_early_stopping_ends_and_keeps_the_best(model: Any, data: Path, make_tokenizer: Any) -> None:
    bad = {"learning_rate": 3.0, "scheduler": "constant"}
    chosen = settings(data, max_steps=30, evaluate_every=1, early_stopping=2, keep=2, **bad)
    outcome = finetune(model, make_tokenizer(), chosen)
    assert outcome.steps < 30
    assert outcome.evaluations[0][0] == 0  # before any step
    losses = [loss for _, loss, _ in outcome.evaluations[1:]]
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 2
    folder = data.parent / "out"
    kept = folder / "checkpoints" / f"checkpoint-{best + 1}" / "adapter_model.safetensors"
    assert (folder / "adapter_model.safetensors").read_bytes() == kept.read_bytes()
    with pytest.raises(InputError, match="early stopping needs validation rows"):
        finetune(model, make_tokenizer(), settings(data, early_stopping=2, validation_fraction=0.0))


def test_neftune_adds_bounded_noise_in_training_alone(model: Any, data: Path, make_tokenizer: Any) -> None:
    seen: dict[bool, list[tuple[torch.Tensor, torch.Tensor]]] = {True: [], False: []}
    embedding = model.get_base_model().get_input_embeddings()

    inner = model.get_base_model().model
    original = inner.layers[0].forward

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen[inner.layers[0].training].append((hidden.detach(), ids[-1]))
        return original(hidden, *args, **kwargs)

    ids: list[torch.Tensor] = []
    embedding.register_forward_pre_hook(lambda _, args: ids.append(args[0]))
    inner.layers[0].forward = forward
    alpha = 5.0
    finetune(model, make_tokenizer(), settings(data, neftune=alpha, evaluate_every=3))
    assert seen[True]
    assert seen[False]
    noisy = 0
    for training, calls in seen.items():
        for hidden, tokens in calls:
            noise = hidden - embedding.weight[tokens]
            bound = alpha / (tokens.shape[1] * hidden.shape[-1]) ** 0.5
            assert noise.abs().max() <= bound * (1 + 1e-5)
            noisy += bool(training and noise.abs().max() > bound / 2)
            assert training or not noise.any()
    assert noisy >= 3  # the three steps; the probes before them are without noise


def test_offload_gives_the_same_losses(model: Any, data: Path, make_tokenizer: Any) -> None:
    other = copy.deepcopy(model)
    plain = finetune(model, make_tokenizer(), settings(data, recompute="1"))
    out = data.parent / "offloaded"
    chosen = settings(data, recompute="1", offload="embedding,activations", output=out)
    assert finetune(other, make_tokenizer(), chosen).losses == plain.losses


def test_says_what_to_change_when_memory_runs_out(data: Path) -> None:
    advice = module.when_out_of_memory(settings(data))
    assert advice.startswith(
        "--recompute full, --offload activations, --offload embedding, --optimizer paged"
    )
    assert "--batch-size 1 with --accumulate" in advice
    used = {"recompute": "full", "offload": "embedding,activations", "optimizer": "adafactor"}
    tight = settings(data, batch_size=1, **used)
    assert module.when_out_of_memory(tight) == "a --max-length below 48, several GPUs: torchrun with --shard"


def test_event_files_are_written_through_tensorboard(
    model: Any, data: Path, make_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer's own callback gets every loss; the package itself is played by a list."""
    import transformers.integrations.integration_utils as integrations

    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def add_text(self, *args: Any) -> None: ...

        def flush(self) -> None: ...

        def close(self) -> None: ...

    played = types.ModuleType("torch.utils.tensorboard")
    played.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", played)
    monkeypatch.setattr(integrations, "is_tensorboard_available", lambda: True)
    found = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda n: n if n == "tensorboard" else found(n))
    outcome = finetune(model, make_tokenizer(), settings(data, tensorboard=True))
    losses = [(step, value) for name, value, step in written if name == "train/loss"]
    assert losses == outcome.losses


def test_cached_generation_is_that_without_a_cache(model: Any, data: Path, make_tokenizer: Any) -> None:
    """``generate`` through quantised layers with adapters: cached, uncached and merged give equal tokens."""
    finetune(model, make_tokenizer(), settings(data, learning_rate=0.05))
    model.eval()
    ids = torch.tensor([[5, 17, 250, 9], [8, 30, 31, 32]])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    options["eos_token_id"] = None
    mask = torch.ones_like(ids)
    cached = model.generate(input_ids=ids, attention_mask=mask, use_cache=True, **options)
    assert cached.shape == (2, 16)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options), cached)
    padded = torch.tensor([[0, 0, 5, 17, 250, 9]])  # left padding, as batches of prompts have it
    alone = model.generate(
        input_ids=padded, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]]), use_cache=True, **options
    )
    assert torch.equal(alone[0, 2:], cached[0])
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(input_ids=ids, attention_mask=mask, **options), cached)
