"""transformers' Trainer and TRL's SFTTrainer with our model object, unchanged: the losses of a plain loop."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_engine import LoftQConfig, LoraConfig, PeftModel, get_peft_model

STEPS, RATE = 4, 0.01


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


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 300, (2, 12), generator=generator) for _ in range(STEPS)]


def plain_loop(model: Any) -> list[float]:
    """AdamW at a constant rate, gradients clipped to 1: what the trainers are told to do."""
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0
    )
    losses = []
    for ids in batches():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def settings(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def in_order(trainer: Any) -> Any:
    """The trainer with rows as they come, so that its batches are those of the loop."""
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    return trainer


def losses(trainer: Any) -> list[float]:
    """A token; transformers 5.0 divides by the first token of each row, too, which is nobody's target."""
    from transformers import Trainer

    trainer.train()
    share = 1.0 if '["labels"][..., 1:]' in inspect.getsource(Trainer) else 12 / 11
    return [share * log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_trainer(model: Any, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    want = plain_loop(copy.deepcopy(model))
    rows = [{"input_ids": row, "labels": row} for ids in batches() for row in ids]
    trainer = in_order(Trainer(model=model, args=TrainingArguments(**settings(tmp_path)), train_dataset=rows))
    assert losses(trainer) == pytest.approx(want, rel=1e-4)
    assert want[-1] != want[0]
    trainer.save_model(str(tmp_path / "saved"))
    adapter = tmp_path / "saved" / "adapter_model.safetensors"
    # Without PEFT installed Trainer knows no adapters and saves all that the model has.
    assert adapter.is_file() == (importlib.util.find_spec("peft") is not None)
    model.save_pretrained(tmp_path / "saved")
    assert adapter.is_file()


def test_sft_trainer(model: Any, make_model: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    want = plain_loop(copy.deepcopy(model))
    rows = datasets.Dataset.from_dict({"input_ids": [row.tolist() for ids in batches() for row in ids]})
    arguments = trl.SFTConfig(
        **settings(tmp_path), packing=False, gradient_checkpointing=False, max_length=12, bf16=False
    )
    trainer = in_order(
        trl.SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=make_tokenizer())
    )
    assert losses(trainer) == pytest.approx(want, rel=1e-4)
    model.save_pretrained(tmp_path / "saved")
    with pytest.warns(UserWarning, match="another quantised base"):  # a dense model is not the base
        again = PeftModel.from_pretrained(make_model("llama"), str(tmp_path / "saved"))
    trained = dict(model.named_parameters())
    for name, parameter in again.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, trained[name])
