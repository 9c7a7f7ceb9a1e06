"""The settings put to the model: what the plan hears of them, the window, advice when memory runs out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_engine import LoftQConfig, LoraConfig, get_peft_model
from qlora_engine.training import memory
from qlora_engine.training.packed_rows import mask_bytes
from qlora_engine.training.settings import Settings, can_shard
from tests.parity.releases import since


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


def settings(**changes: Any) -> Settings:
    values: dict[str, Any] = {"data": Path("rows.jsonl"), "output": Path("out"), "batch_size": 2}
    return Settings(**{**values, "max_length": 48, **changes})


def test_the_limit_is_in_gib(model: Any) -> None:
    assert memory.fit(model, settings(memory_limit=0.75)).available == 3 * 2**28
    assert memory.fit(model, settings()).available == 0


def test_packed_rows_are_counted_where_rows_are_packed(model: Any) -> None:
    assert memory.fit(model, settings(packing="off")).mask == 0
    assert memory.fit(model, settings(packing="off"), packed=True).mask > 0
    assert memory.fit(model, settings(), packed=False).mask == 0
    found = memory.fit(model, settings())
    assert found.mask % mask_bytes(2, 48, torch.float32) == 0 < found.mask
    assert 2 * memory.fit(model, settings(precision="bf16")).mask == found.mask


def test_inputs_of_recomputed_layers_may_wait_on_the_host(model: Any) -> None:
    here = memory.fit(model, settings(recompute="full"))
    there = memory.fit(model, settings(recompute="full", offload="activations"))
    hidden = model.get_base_model().config.hidden_size
    assert here.activations - there.activations == here.layers * 2 * 48 * hidden * 4
    kept = memory.fit(model, settings(recompute="none", offload="activations"))
    assert kept.activations == memory.fit(model, settings(recompute="none")).activations


@pytest.mark.parametrize(
    ("window", "asked", "kept"), [(128, 1000, 128), (128, 128, 128), (128, 64, 64), (2, 48, 2), (1, 48, 48)]
)
def test_rows_are_no_longer_than_the_window(window: int, asked: int, kept: int, model: Any) -> None:
    model.get_base_model().config.max_position_embeddings = window
    assert memory.within_window(model, settings(max_length=asked)) == settings(max_length=kept)


def test_an_embedding_waits_on_the_host_where_it_is_asked_for(model: Any) -> None:
    here = memory.fit(model, settings())
    there = memory.fit(model, settings(offload="embedding"))
    assert here.weights - there.weights == model.get_base_model().get_input_embeddings().weight.nbytes


def test_says_what_to_change_when_memory_runs_out() -> None:
    advice = memory.when_out_of_memory(settings())
    assert advice.startswith(
        "--recompute full, --offload activations, --offload embedding, --optimizer paged"
    )
    assert "--batch-size 1 with --accumulate" in advice
    used = {"recompute": "full", "offload": "embedding,activations", "optimizer": "adafactor"}
    tight = settings(batch_size=1, **used)
    more = ", several GPUs: torchrun with --shard" if can_shard() else ""
    assert memory.when_out_of_memory(tight) == f"a --max-length below 48{more}"


@since("2.12", "FSDP2 takes no packed weights", "torch")
def test_sharded_runs_are_not_told_to_shard() -> None:
    sharded = settings(shard=True)
    assert "torchrun" not in memory.when_out_of_memory(sharded)
    assert "--optimizer" not in memory.when_out_of_memory(sharded)


def test_smaller_optimizer_state_is_advised_where_it_is_large() -> None:
    for optimizer, large in (("adamw_torch", True), ("adagrad", False), ("sgd", False)):
        advice = memory.when_out_of_memory(settings(optimizer=optimizer))
        assert ("--optimizer paged_adamw_8bit" in advice) == large
