"""What the tests of commands share: texts and rows, a model dense and quantised, mixtures of experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .command import invoke

_EXPERTS = {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_EXPERTS |= {"num_key_value_heads": 2, "num_experts_per_tok": 2, "num_local_experts": 4}
# What is not in MODELS: a stack is one tensor on disk, of (in, out) matrices and of (out, in).
_STACKED_ON_DISK = {
    "gpt_oss": ("GptOssConfig", {**_EXPERTS, "intermediate_size": 48, "head_dim": 16}),
    "granitemoe": ("GraniteMoeConfig", {**_EXPERTS, "intermediate_size": 32}),
}


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"{i} plus one is", "completion": f" {i + 1}."} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To calibrate with."""
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    rows = [{"text": f"The {i}th sentence says that {i * i} is the square of {i}."} for i in range(400)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="session")
def quantised(make_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base") / "out"
    assert invoke(make_checkpoint("llama"), out, "--bits", 4, "--rank", 4, "--quiet").code == 0
    return out


@pytest.fixture(scope="session")
def mixture(
    tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path], make_tokenizer: Any
) -> Callable[[str], Path]:
    """``mixture(name)``: a mixture of four experts in two layers, float32, in several shards."""
    import transformers

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in _STACKED_ON_DISK:
            return make_checkpoint(name, dtype=torch.float32, shard_size="60KB")
        if name not in made:
            config_class, settings = _STACKED_ON_DISK[name]
            config = getattr(transformers, config_class)(**settings)
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            made[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name], max_shard_size="60KB")
            make_tokenizer().save_pretrained(made[name])
        return made[name]

    return make
