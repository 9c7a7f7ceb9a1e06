"""Small adapted models that several tests of PeftModel use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora_engine.config import LoftQConfig, LoraConfig
from qlora_engine.peft_api import PeftModel, get_peft_model


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x)))


def mlp(**options: Any) -> PeftModel:
    return get_peft_model(MLP(), LoraConfig(**{"target_modules": ["first", "head"], "r": 4, **options}))


def loftq(model: nn.Module, bits: int = 4, **options: Any) -> PeftModel:
    settings = LoftQConfig(loftq_bits=bits)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        init_lora_weights="loftq",
        loftq_config=settings,
        **options,
    )
    return get_peft_model(model, config)
