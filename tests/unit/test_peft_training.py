"""transformers' Trainer and TRL's SFTTrainer train the PeftModel as they train PEFT's."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_engine import LoftQConfig, LoraConfig, PeftModel, get_peft_model
from quant.linear import QuantizedModule

IDS = torch.arange(4, 20).view(2, 8)


def loftq(base: Any, bits: int) -> PeftModel:
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        init_lora_weights="loftq",
        loftq_config=LoftQConfig(loftq_bits=bits),
    )
    return get_peft_model(base, config)


def arguments(cls: Any, folder: Path, **options: Any) -> Any:
    return cls(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        num_train_epochs=5,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_total_limit=1,
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )


def check(trainer: Any, model: PeftModel, folder: Path) -> None:
    """The loss fell, only adapters are in the checkpoint, and what is saved loads to equal logits."""
    before = [m.codes.clone() for m in model.modules() if isinstance(m, QuantizedModule)]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 10
    assert sum(losses[-3:]) / 3 < 0.97 * losses[0], losses
    after = [m.codes for m in model.modules() if isinstance(m, QuantizedModule)]
    assert len(before) == 14
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    saved = next(folder.glob("checkpoint-*"))
    assert (saved / "adapter_model.safetensors").is_file()
    assert not list(saved.glob("model*.safetensors"))
    trainer.save_model(str(folder / "final"))
    again = PeftModel.from_pretrained(copy.deepcopy(model).unload(), folder / "final")
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS).logits, model.eval()(IDS).logits)


def test_transformers_trainer(make_model: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="without PEFT, Trainer saves no adapters")
    from transformers import Trainer, TrainingArguments

    rows = torch.randint(3, 40, (16, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]
    model = loftq(make_model("llama"), bits=3)
    settings = arguments(TrainingArguments, tmp_path, save_strategy="epoch", gradient_checkpointing=True)
    check(Trainer(model=model, args=settings, train_dataset=data), model, tmp_path)


def test_trl_sft_trainer(make_model: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    """TRL looks for the head in the base model of what it takes for PEFT's."""
    trl = pytest.importorskip("trl", reason="TRL is an optional test dependency")
    datasets = pytest.importorskip("datasets", reason="TRL needs datasets")

    tokenizer = make_tokenizer()
    texts = [f"the answer to question {i} is {i}, and no other" for i in range(16)]
    data = datasets.Dataset.from_dict({"text": texts})
    model = loftq(make_model("llama"), bits=4)
    settings = arguments(trl.SFTConfig, tmp_path, save_strategy="epoch", max_length=32, bf16=False)
    trainer = trl.SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
    assert trainer.model is model
    check(trainer, model, tmp_path)


def test_isinstance_takes_ours_for_pefts_and_nothing_else(make_model: Any) -> None:
    """PEFT's classes for tasks, and their models, are as before; copies and pickles are ours."""
    peft = pytest.importorskip("peft")
    ours = loftq(make_model("llama"), bits=4)
    assert isinstance(ours, peft.PeftModel)
    assert not isinstance(ours, peft.PeftModelForCausalLM)
    assert not isinstance(ours.get_base_model(), peft.PeftModel)
    assert not isinstance(ours, peft.PeftMixedModel)
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    theirs = copy.deepcopy(peft.get_peft_model(make_model("llama"), config))
    assert type(theirs) is peft.PeftModelForCausalLM
    assert isinstance(theirs, peft.PeftModel)
    assert not isinstance(theirs, PeftModel)
    assert type(ours).__name__ == ours.__class__.__name__ == "PeftModelForCausalLM"
    for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(clone) is type(ours)
        assert torch.equal(clone(IDS).logits, ours(IDS).logits)


def test_without_peft_the_class_is_the_class(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "peft.peft_model", raising=False)
    model = loftq(make_model("llama"), bits=4)
    assert model.__class__ is type(model)
