"""Where transformers puts the tensors of experts: what ``expert_slabs`` says, held against what it loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_engine.architecture import read_architecture
from qlora_engine.checkpoint import Checkpoint
from qlora_engine.expert_layout import expert_module, expert_slabs
from qlora_engine.expert_stack import is_stack
from qlora_engine.stored_expert import expert_matrices
from tests.parity.releases import since

_SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
_SIZES |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4}
_SIZES |= {"moe_intermediate_size": 24, "num_experts_per_tok": 2, "num_local_experts": 4}
_MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
_DEEPSEEK = {"n_routed_experts": 4, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}
# config class -> further settings, how many tensors make one layer's experts
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "MixtralConfig": ({}, 12),
    "Qwen3MoeConfig": ({}, 12),
    "OlmoeConfig": ({}, 12),
    "GptOssConfig": ({}, 2),
    "GraniteMoeConfig": ({}, 2),
    "DeepseekV3Config": ({**_MLA, **_DEEPSEEK}, 12),
    "JambaConfig": ({"attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_offset": 0}
                    | {"expert_layer_period": 1, "use_mamba_kernels": False}, 12),
    "Llama4TextConfig": ({"interleave_moe_layer_step": 1, "moe_layers": [0], "intermediate_size_mlp": 48}, 2),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_where_it_is_said_to_be(family: str, tmp_path: Path) -> None:
    import transformers

    settings, count = FAMILIES[family]
    config = getattr(transformers, family)(**{**_SIZES, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    architecture = read_architecture(tmp_path, checkpoint.config)
    slabs = expert_slabs(architecture, {n: entry.shape for n, entry in checkpoint.tensors.items()})
    assert len(slabs) == count
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = dict(again.named_parameters())
    tensors = load_file(tmp_path / "model.safetensors")
    for name, slab in slabs.items():
        stack = loaded[slab.parameter]
        part = stack[:, slab.start : slab.stop] if slab.expert is None else stack[slab.expert]
        part = part if slab.expert is None else part[slab.start : slab.stop]
        assert torch.equal(tensors[name], part.mT if slab.transposed else part), name
    modules = dict(again.named_modules())
    stacks = {n for n in loaded if is_stack(modules[n.rpartition(".")[0]], n.rpartition(".")[2])}
    assert {slab.parameter for slab in slabs.values()} == stacks


@since("5.2", "saves these experts cut across their rows, and cannot read others'", "transformers")
def test_a_transposed_stack(tmp_path: Path) -> None:
    """Qwen3-VL-MoE's files have (in, out) where the model has (out, in)."""
    import transformers

    text = transformers.Qwen3VLMoeTextConfig(**_SIZES)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3VLMoeConfig(
        text_config=text.to_dict(), vision_config={**vision, "deepstack_visual_indexes": [0]}
    )
    transformers.Qwen3VLMoeForConditionalGeneration(config).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    architecture = read_architecture(tmp_path, checkpoint.config)
    shapes = {n: entry.shape for n, entry in checkpoint.tensors.items()}
    slabs = expert_slabs(architecture, shapes)
    tensors = load_file(tmp_path / "model.safetensors")
    model = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path)
    assert sorted({slab.transposed for slab in slabs.values()}) in ([False], [True])
    for name, slab in slabs.items():
        stack = model.get_parameter(slab.parameter)
        assert torch.equal(tensors[name], stack.mT if slab.transposed else stack)
    turned = {n: (s[0], s[2], s[1]) if n in slabs else s for n, s in shapes.items()}
    other = expert_slabs(architecture, turned)
    assert {n: s.transposed for n, s in other.items()} == {n: not s.transposed for n, s in slabs.items()}


@pytest.mark.parametrize("change", ["lacks one", "another shape", "one too many"])
def test_what_does_not_fill_the_parameter_is_left_out(change: str, make_checkpoint: Any) -> None:
    checkpoint = Checkpoint.open(make_checkpoint("mixtral"))
    architecture = read_architecture(checkpoint.folder, checkpoint.config)
    shapes = {n: entry.shape for n, entry in checkpoint.tensors.items()}
    whole = expert_slabs(architecture, shapes)
    name = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    if change == "lacks one":
        del shapes[name]
    elif change == "another shape":
        shapes[name] = (shapes[name][0], shapes[name][1] + 1)
    else:
        shapes[name.replace(".2.", ".9.")] = shapes[name]
    left = expert_slabs(architecture, shapes)
    gone = {slab.parameter for n, slab in whole.items() if n not in left}
    assert gone == {"model.layers.0.mlp.experts.down_proj"}
    assert all(whole[n] == slab for n, slab in left.items())
    assert dataclasses.replace(whole[name], expert=1) in whole.values()


def test_a_path_that_means_an_expert(make_checkpoint: Any) -> None:
    folder = make_checkpoint("qwen3_moe")
    architecture = read_architecture(folder, Checkpoint.open(folder).config)
    stack = "model.layers.0.mlp.experts.down_proj"
    found = expert_module(architecture, f"{stack}.3")
    assert found is not None
    assert found[0] == stack
    assert (found[1].path, found[1].kind, found[1].shape) == (f"{stack}.3", "linear", (64, 32))
    for path in (f"{stack}.4", f"{stack}.x", stack, "model.layers.0.self_attn.q_proj.weight.0", "nothing.0"):
        assert expert_module(architecture, path) is None


def test_an_expert_reads_like_a_tensor(make_checkpoint: Any) -> None:
    """gate_up_proj is put together from two tensors, down_proj is one."""
    folder = make_checkpoint("qwen3_moe")
    checkpoint = Checkpoint.open(folder)
    tensors = load_file(folder / "model.safetensors")
    experts = {
        entry.name: entry
        for _, entry in expert_matrices(checkpoint, read_architecture(folder, checkpoint.config))[0]
    }
    whole, joined = (
        experts[f"model.layers.1.mlp.experts.{name}.2"] for name in ("down_proj", "gate_up_proj")
    )
    parts = [tensors[f"model.layers.1.mlp.experts.2.{name}.weight"] for name in ("gate_proj", "up_proj")]
    assert torch.equal(joined.read(), torch.cat(parts))
    assert torch.equal(whole.read(), tensors["model.layers.1.mlp.experts.2.down_proj.weight"])
    for entry in (whole, joined):
        assert entry.read().is_contiguous()
        assert (entry.shape, entry.nbytes) == (entry.read().shape, entry.read().nbytes)
        assert entry.path == folder / "model.safetensors"
        assert entry.sources == tuple(part.name for part, _ in entry.parts)
