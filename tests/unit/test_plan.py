"""The plan: what is quantised, with what, and how transformers and PEFT are told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_engine.architecture import read_architecture
from qlora_engine.checkpoint import Checkpoint, natural_order
from qlora_engine.errors import InputError
from qlora_engine.options import InitOptions
from qlora_engine.plan import Plan, make_plan
from qlora_engine.skip_modules import converts_to_4bit

MakeCheckpoint = Callable[..., Path]
CASES = ["llama", "llama_tied", "gpt2", "bert", "t5", "qwen3_moe", "mixtral"]


def plan_for(folder: Path, **options: Any) -> Plan:
    checkpoint = Checkpoint.open(folder)
    architecture = read_architecture(folder, checkpoint.config)
    return make_plan(checkpoint, architecture, InitOptions(**{"rank": 4, **options}))


@pytest.mark.parametrize("name", CASES)
def test_all_linear_is_what_peft_means(
    make_checkpoint: MakeCheckpoint, make_model: Callable[..., Any], name: str
) -> None:
    """The adapter's modules are those that PEFT itself would choose, and its config matches exactly them."""
    peft = pytest.importorskip("peft")
    plan = plan_for(make_checkpoint(name), save_format="native", bits_pattern={})
    wrapped = peft.get_peft_model(make_model(name), peft.LoraConfig(target_modules="all-linear", r=2))
    chosen = set(wrapped.targeted_module_names)
    assert {layer.path for layer in plan.layers if layer.rank} == chosen
    again = peft.get_peft_model(make_model(name), peft.LoraConfig(target_modules=plan.target_modules, r=2))
    assert set(again.targeted_module_names) == chosen


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("exclude", [(), r".*\.0\..*"])
def test_skip_modules_make_4bit_exactly_what_is_quantised(
    make_checkpoint: MakeCheckpoint, make_model: Callable[..., Any], name: str, exclude: Any
) -> None:
    """transformers' own rule, applied to the model, converts the planned modules and no other."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    plan = plan_for(make_checkpoint(name), exclude_modules=exclude)
    assert plan.save_format == "bnb"
    skip = list(plan.skip_modules)
    keep = list(make_model(name)._keep_in_fp32_modules or ())
    paths = [module.path for module in plan.architecture.modules if module.kind in ("linear", "conv1d")]
    converted = {path for path in paths if should_convert_module(path, skip + keep)}
    assert converted == {layer.path for layer in plan.layers}
    assert all(converts_to_4bit(path, skip) == should_convert_module(path, skip) for path in paths)


def test_a_classification_head_of_several_layers_stays_dense(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    plan = plan_for(tmp_path, quantize_rest=True)
    assert len(plan.layers) == 6
    assert not any(layer.path.startswith("classifier") for layer in plan.layers)
    assert "classifier.dense" in plan.skip_modules


def test_what_a_mamba_model_reads_past_forward_stays_dense(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, state_size=4, time_step_rank=8)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    names = {layer.path.rpartition(".")[2] for layer in plan_for(tmp_path, quantize_rest=True).layers}
    assert names == {"in_proj"}
    with pytest.raises(InputError, match="'out_proj' is incompatible with Mamba-based models"):
        plan_for(tmp_path, target_modules=("in_proj", "out_proj"))
    with pytest.raises(InputError, match="mamba reads its weight directly"):
        plan_for(tmp_path, target_modules=("dt_proj",))


def test_skip_modules_names_are_anchored_where_they_would_catch_too_much() -> None:
    skip = [r"^proj$", "lm_head"]
    assert not converts_to_4bit("proj", skip)
    assert converts_to_4bit("layers.0.proj", skip)
    assert not converts_to_4bit("layers.0.proj", ["proj"])


def test_layers_are_in_natural_order(make_checkpoint: MakeCheckpoint) -> None:
    plan = plan_for(make_checkpoint("llama", num_hidden_layers=11))
    names = [layer.entry.name for layer in plan.layers]
    assert names == sorted(names, key=natural_order)
    assert [layer.index for layer in plan.layers] == list(range(77))


@pytest.mark.parametrize(
    ("options", "save_format", "note"),
    [
        ({}, "bnb", None),
        ({"format": "fp4"}, "bnb", None),
        ({"format": "nf3"}, "native", "saved in the native format"),
        ({"block_size": 16}, "native", "saved in the native format"),
        ({"bits_pattern": {"q_proj": "8"}}, "native", "saved in the native format"),
        ({"bits_pattern": {"nothing": "8"}}, "bnb", "--bits-pattern 'nothing' matches no quantised module"),
        ({"rank_pattern": {"qproj": 2}}, "bnb", "--rank-pattern 'qproj' matches no quantised module"),
        ({"target_modules": ("embed_tokens",)}, "native", "bitsandbytes holds no embeddings"),
        ({"save_format": "dense", "format": "nf2"}, "dense", None),
        ({"rank_pattern": {"q_proj": 2, "0.*": 3}}, "bnb", "2 keys match module"),
        ({"exclude_modules": ("nothing",)}, "bnb", "'nothing' is no module of this model"),
    ],
)
def test_save_format_and_notes(
    make_checkpoint: MakeCheckpoint, options: dict[str, Any], save_format: str, note: str | None
) -> None:
    plan = plan_for(make_checkpoint("llama", intermediate_size=128), **options)
    assert plan.save_format == save_format
    assert [note in text for text in plan.notes] == [True] if note else plan.notes == ()


def test_ranks_and_scalings(make_checkpoint: MakeCheckpoint) -> None:
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3, "k_proj": 1}}
    plan = plan_for(make_checkpoint("llama"), alpha=8, **patterns)
    scalings = {layer.path.rpartition(".")[2]: (layer.rank, layer.scaling) for layer in plan.layers}
    assert scalings["q_proj"] == (2, 1.5)
    assert scalings["k_proj"] == (4, 0.25)
    assert scalings["v_proj"] == (4, 2.0)
    rs = plan_for(make_checkpoint("llama"), alpha=8, rslora=True, **patterns)
    assert {layer.scaling for layer in rs.layers if "v_proj" in layer.path} == {4.0}
    assert {layer.scaling for layer in rs.layers if "q_proj" in layer.path} == {3 / 2**0.5}


def test_excluding_every_fused_model_is_an_error(make_checkpoint: MakeCheckpoint) -> None:
    with pytest.raises(InputError, match=r"nothing is left to adapt: 4 modules stay dense"):
        plan_for(make_checkpoint("t5"), target_modules=("wo",))


def test_stored_dtype_of_the_rest(make_checkpoint: MakeCheckpoint) -> None:
    import torch

    entry = Checkpoint.open(make_checkpoint("llama", dtype=torch.float32)).tensors["model.norm.weight"]
    source = make_checkpoint("llama", dtype=torch.float32)
    assert plan_for(source).stored_dtype(entry) == "F32"
    assert plan_for(source, dtype="bfloat16").stored_dtype(entry) == "BF16"
    assert plan_for(source, save_format="dense").stored_dtype(entry) == "F16"
    whole = dataclasses.replace(entry, dtype="I64")
    assert plan_for(source, dtype="bfloat16").stored_dtype(whole) == "I64"
