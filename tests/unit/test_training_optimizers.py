"""Which optimizers may be named, what they need, and that LoRA+ and 8-bit states are what is trained with."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion
from transformers import TrainingArguments

from qlora_engine import LoraConfig, get_peft_model
from qlora_engine.errors import InputError
from qlora_engine.training import optimizers
from qlora_engine.training.settings import Settings, can_shard
from qlora_engine.training.trainer import AdapterTrainer


def test_names() -> None:
    from transformers.training_args import OptimizerNames

    known = {str(option.value) for option in OptimizerNames}
    assert {*optimizers.PLAIN, *optimizers.BITSANDBYTES} <= known
    with pytest.raises(InputError, match=r"optimizer 'adamw'.*allowed: adamw_torch"):
        Settings(data=Path("d"), output=Path("o"), optimizer="adamw")


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    absent = ("bitsandbytes", "tensorboard")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in absent else found(n))
    Settings(data=Path("d"), output=Path("o"))
    with pytest.raises(InputError, match=r"'paged_adamw_8bit' needs bitsandbytes, which is not installed"):
        Settings(data=Path("d"), output=Path("o"), optimizer="paged_adamw_8bit")
    with pytest.raises(InputError, match="tensorboard, which is not installed"):
        Settings(data=Path("d"), output=Path("o"), tensorboard=True)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_32bit", "adafactor"])
def test_sharded_parameters_want_an_optimizer_that_knows_shards(name: str) -> None:
    with pytest.raises(InputError, match=r"on whole tensors, not on shards; with --shard use adamw_torch"):
        Settings(data=Path("d"), output=Path("o"), optimizer=name, shard=True)
    if can_shard():
        Settings(data=Path("d"), output=Path("o"), optimizer="adamw_torch_fused", shard=True)


def trainer(make_model: Any, folder: Path, optimizer: str, ratio: float | None = None) -> AdapterTrainer:
    config = LoraConfig(r=64, target_modules=["gate_proj", "q_proj"], task_type="CAUSAL_LM")
    arguments = TrainingArguments(
        output_dir=str(folder),
        optim=optimizer,
        learning_rate=1e-3,
        weight_decay=0.01,
        use_cpu=True,
        report_to="none",
    )
    return AdapterTrainer(
        lora_plus_ratio=ratio, model=get_peft_model(make_model("llama"), config), args=arguments
    )


def test_lora_plus_gives_b_its_own_rate(make_model: Any, tmp_path: Path) -> None:
    training = trainer(make_model, tmp_path, "adamw_torch", 16.0)
    groups = training.create_optimizer().param_groups
    named = {id(p): n for n, p in training.model.named_parameters() if p.requires_grad}
    rates = {named[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert rates.keys() == set(named.values())
    for name, rate in rates.items():
        assert rate == pytest.approx(16e-3 if "lora_B" in name else 1e-3)
    assert {group["weight_decay"] for group in groups} == {0.01}


def test_eight_bit_states_take_a_byte(make_model: Any, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    if not torch.cuda.is_available() and tuple(map(int, bnb.__version__.split(".")[:2])) < (0, 50):
        pytest.skip("8-bit optimizers on CPUs need bitsandbytes 0.50")
    training = trainer(make_model, tmp_path, "adamw_8bit", 4.0)
    optimizer = training.create_optimizer()
    ids = torch.arange(20)[None]
    training.model(input_ids=ids, labels=ids).loss.backward()
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    optimizer.step()
    after = [p for group in optimizer.param_groups for p in group["params"]]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    # bitsandbytes keeps tensors of fewer than 4096 elements in float32
    large = [optimizer.state[p]["state1"].dtype for p in after if p.numel() >= 4096]
    assert large
    assert set(large) == {torch.uint8}


@pytest.mark.parametrize(
    ("release", "can"), [("2.6.0+cu124", False), ("2.11.0", False), ("2.12.0", True), ("3.0.0", True)]
)
def test_packed_weights_are_sharded_by_a_torch_that_can(
    release: str, can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion(release))
    if not can:
        with pytest.raises(InputError, match=re.escape(f"torch 2.12 or newer, this is {release}:")):
            Settings(data=Path("d"), output=Path("o"), shard=True)
    else:
        Settings(data=Path("d"), output=Path("o"), shard=True)
