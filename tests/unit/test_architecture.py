"""What a checkpoint's tensors are, learned without weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora_engine.architecture import Home, read_architecture
from qlora_engine.checkpoint import Checkpoint
from qlora_engine.errors import InputError

MakeCheckpoint = Callable[..., Path]


def read(folder: Path) -> tuple[Checkpoint, Any]:
    checkpoint = Checkpoint.open(folder)
    return checkpoint, read_architecture(folder, checkpoint.config)


@pytest.mark.parametrize(
    ("name", "heads", "task", "tied"),
    [
        ("llama", ("lm_head",), "CAUSAL_LM", 0),
        ("llama_tied", ("lm_head",), "CAUSAL_LM", 2),
        ("gpt2", ("lm_head",), "CAUSAL_LM", 2),
        ("bert", (), "FEATURE_EXTRACTION", 0),
        ("t5", ("lm_head",), "SEQ_2_SEQ_LM", 4),
        ("mixtral", ("lm_head",), "CAUSAL_LM", 0),
    ],
)
def test_read_architecture(
    make_checkpoint: MakeCheckpoint,
    make_model: Callable[..., Any],
    name: str,
    heads: tuple[str, ...],
    task: str,
    tied: int,
) -> None:
    from transformers.pytorch_utils import Conv1D

    _, architecture = read(make_checkpoint(name))
    model = make_model(name)
    kinds = {nn.Linear: "linear", nn.Embedding: "embedding", Conv1D: "conv1d"}
    expected = {
        path: next((kind for cls, kind in kinds.items() if isinstance(module, cls)), "other")
        for path, module in model.named_modules()
        if path
    }
    assert {module.path: module.kind for module in architecture.modules} == expected
    assert architecture.heads == heads
    assert architecture.task == task
    assert len(architecture.tied) == tied
    assert architecture.class_name == type(model).__name__
    for module in architecture.modules:
        if module.kind != "other":
            shape = tuple(model.get_submodule(module.path).weight.shape)
            assert module.shape == (shape[::-1] if module.kind == "conv1d" else shape)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "qwen3_moe"])
def test_homes_are_where_transformers_puts_the_tensors(make_checkpoint: MakeCheckpoint, name: str) -> None:
    """Every tensor on disk that is found equals the loaded parameter of that name."""
    import transformers

    checkpoint, architecture = read(make_checkpoint(name))
    loaded = getattr(transformers, architecture.class_name).from_pretrained(checkpoint.folder).state_dict()
    homes = architecture.homes(checkpoint.tensors)
    assert homes.keys() == checkpoint.tensors.keys()
    direct = [(key, home) for key, home in homes.items() if not home.converted]
    assert all(torch.equal(checkpoint.tensors[key].read(), loaded[home.parameter]) for key, home in direct)
    assert (len(direct) < len(homes)) == (name == "qwen3_moe")


def test_homes_with_and_without_the_base_prefix(tmp_path: Path, make_model: Callable[..., Any]) -> None:
    """A base model's tensors where config.json names the class with a head, and the other way round."""
    model = make_model("gpt2")
    model.transformer.save_pretrained(tmp_path / "base")
    config = model.config.to_dict() | {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    architecture = read_architecture(tmp_path / "base", config)
    homes = architecture.homes(Checkpoint.open(tmp_path / "base").tensors)
    assert homes["h.0.attn.c_attn.weight"] == Home("transformer.h.0.attn.c_attn.weight", False)
    model.save_pretrained(tmp_path / "head")
    base = read_architecture(tmp_path / "head", config | {"architectures": ["GPT2Model"]})
    homes = base.homes(Checkpoint.open(tmp_path / "head").tensors)
    assert homes["transformer.h.0.attn.c_attn.weight"] == Home("h.0.attn.c_attn.weight", False)


def test_homes_leave_out_what_the_model_ignores(make_checkpoint: MakeCheckpoint) -> None:
    _, architecture = read(make_checkpoint("llama"))
    assert architecture.homes(["nothing.of.this.model", "model.norm.weight"]) == {
        "model.norm.weight": Home("model.norm.weight", False)
    }


def test_t5_keeps_its_float32_modules(make_checkpoint: MakeCheckpoint) -> None:
    _, architecture = read(make_checkpoint("t5"))
    stock = {module.path.rpartition(".")[2]: module.stock_4bit for module in architecture.modules}
    assert stock["wo"] is False
    assert stock["wi"] is True


def test_classifier_is_a_head(tmp_path: Path) -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(tmp_path)
    architecture = read_architecture(tmp_path, config.to_dict())
    assert architecture.heads == ("classifier",)
    assert architecture.task is None


def test_read_architecture_runs_no_code_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}'
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="pass --trust-remote-code"):
        read_architecture(tmp_path, json.loads((tmp_path / "config.json").read_text()))
    assert not (tmp_path / "ran").exists()


CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class TinyConfig(PretrainedConfig):
    model_type = "tiny_of_ours"
    def __init__(self, width=32, **kwargs):
        super().__init__(**kwargs)
        self.width = width

class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.up = torch.nn.Linear(config.width, 2 * config.width)
        self.post_init()
    def forward(self, x):
        return self.up(x)
"""


def test_read_architecture_of_trusted_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tiny.py").write_text(CODE)
    config: dict[str, Any] = {"model_type": "tiny_of_ours", "architectures": ["TinyModel"], "width": 32}
    config["auto_map"] = {"AutoConfig": "tiny.TinyConfig", "AutoModel": "tiny.TinyModel"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    architecture = read_architecture(tmp_path / "model", config, trust_remote_code=True)
    assert [(m.path, m.kind, m.shape) for m in architecture.modules] == [("up", "linear", (64, 32))]
