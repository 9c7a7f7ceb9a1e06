"""Tiny models, checkpoints on disk and a tokenizer, made here with random weights and shared by all tests.

`make_model(name, ...)` gives a fresh copy that a test may change; `make_checkpoint(name, ...)` gives the
folder of a saved one, which is shared by the session and must only be read. `MODELS` names what there is.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network
os.environ["COLUMNS"] = "100"  # tables as wide as where there is no terminal; parallel workers set their own


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from a run that is not for them (``-m "gpu or kernel"``), so that it is the same everywhere.

    Before anything asks for a GPU, and before anything imports triton, whose own library is compiled or
    interpreted as a whole.
    """
    if not re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of files that choose a DEVICE: they run on a GPU where the run may see it."""
    for item in items:
        if hasattr(getattr(item, "module", None), "DEVICE"):
            item.add_marker(pytest.mark.kernel)


# No deadline: on a busy machine a slow example is not a bug. The same examples at every run, so that a
# failure is a change's; HYPOTHESIS_RANDOM=1 looks for new ones.
settings.register_profile("repeated", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None)
settings.load_profile("random" if os.environ.get("HYPOTHESIS_RANDOM") else "repeated")

# Rows of 64 are a multiple of the default block of 64, rows of 96 (the intermediate size) are not: each model
# has both cases.
_VOCAB = 384
_LLAMA = {
    "vocab_size": _VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4}

# name: (config class, auto class, config arguments)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "AutoModelForCausalLM", {**_LLAMA, "tie_word_embeddings": False}),
    "llama_tied": ("LlamaConfig", "AutoModelForCausalLM", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "AutoModelForCausalLM", {**_LLAMA, "tie_word_embeddings": False}),
    "gpt2": (
        "GPT2Config",
        "AutoModelForCausalLM",
        {"vocab_size": _VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 96}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    ),
    "bert": (
        "BertConfig",
        "AutoModel",
        {"vocab_size": _VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"intermediate_size": 96, "max_position_embeddings": 128},
    ),
    "t5": (
        "T5Config",
        "AutoModelForSeq2SeqLM",
        {"vocab_size": _VOCAB, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0, "eos_token_id": 2, "pad_token_id": 0},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "AutoModelForCausalLM",
        {**_LLAMA, **_MOE, "tie_word_embeddings": False},
    ),
    "mixtral": (
        "MixtralConfig",
        "AutoModelForCausalLM",
        {**_LLAMA, **_MOE, "tie_word_embeddings": False},
    ),
}


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    """Every test starts from the same random state, whichever ran before it in its worker."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """``make_model(name, *, dtype=torch.float32, seed=0, **config)``: a fresh model in eval mode."""
    import transformers

    built: dict[str, Any] = {}

    def make(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> Any:
        config_class, auto_class, defaults = MODELS[name]
        key = repr((name, dtype, seed, sorted(config.items())))
        if key not in built:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                settings = getattr(transformers, config_class)(**{**defaults, **config})
                model = getattr(transformers, auto_class).from_config(settings)
            built[key] = model.to(dtype).eval()
        return copy.deepcopy(built[key])

    return make


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[], Any]:
    """``make_tokenizer()``: a byte-level BPE tokenizer of 384 tokens with a chat template."""

    def make() -> Any:
        from tokenizers import ByteLevelBPETokenizer
        from transformers import PreTrainedTokenizerFast

        bpe = ByteLevelBPETokenizer()
        special = ["<pad>", "<s>", "</s>"]
        bpe.train_from_iterator(
            [__doc__ or ""] * 4, vocab_size=_VOCAB, special_tokens=special, show_progress=False
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
        )
        tokenizer.chat_template = (
            "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<s>assistant: {% endif %}"
        )
        return tokenizer

    return make


@pytest.fixture(scope="session")
def make_checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., Any],
    make_tokenizer: Callable[[], Any],
) -> Callable[..., Path]:
    """``make_checkpoint(name, *, dtype=torch.float16, shard_size="5GB", **config)``: a saved one.

    The folder holds the model and a tokenizer and is shared by all tests of the session: read it, copy it
    before changing it. A small ``shard_size`` such as "60KB" gives several shards and an index.
    """
    saved: dict[str, Path] = {}

    def make(
        name: str, *, dtype: torch.dtype = torch.float16, shard_size: str = "5GB", **config: Any
    ) -> Path:
        key = repr((name, dtype, shard_size, sorted(config.items())))
        if key not in saved:
            folder = tmp_path_factory.mktemp(name)
            make_model(name, dtype=dtype, **config).save_pretrained(folder, max_shard_size=shard_size)
            make_tokenizer().save_pretrained(folder)
            saved[key] = folder
        return saved[key]

    return make
