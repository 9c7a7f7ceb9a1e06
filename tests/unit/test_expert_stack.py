"""Quantised stacks of experts in memory: exact against the dense model of what they are dequantised to."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qlora_engine as qe
from qlora_engine.expert_stack import multiplies_in_out, parameter_names, place_of, put_layer, settle_experts
from qlora_engine.lora_param import ParamWrapper, _AdaptedMatrix
from quant import QuantSpec
from quant.experts import ExpertMatrix, QuantExperts
from quant.linear import QuantLinear
from quant.tensor import quantize

_SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
_SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4}
_SIZES |= {"moe_intermediate_size": 24, "num_experts_per_tok": 2, "num_local_experts": 4}
_LLAMA4 = {"interleave_moe_layer_step": 1, "intermediate_size_mlp": 48, "num_experts_per_tok": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "MixtralConfig": {},
    "Qwen3MoeConfig": {},
    "GptOssConfig": {},  # (in, out), with biases
    "Llama4TextConfig": _LLAMA4,  # (in, out), one product of batches
}
IDS = torch.arange(1, 25).reshape(2, 12)


def dense_model(family: str) -> Any:
    import transformers

    config = getattr(transformers, family)(**{**_SIZES, **FAMILIES[family]})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.requires_grad_(False)


def stacks_of(model: Any) -> Iterator[tuple[str, nn.Module, str]]:
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            for leaf in ("gate_up_proj", "down_proj"):
                yield name, module, leaf


def quantised_model(model: Any, spec: QuantSpec) -> Any:
    """A copy with quantised experts; ``model`` gets what they are dequantised to."""
    mine = copy.deepcopy(model)
    for name, owner, leaf in stacks_of(model):
        stack = getattr(owner, leaf)
        in_out = multiplies_in_out(owner)
        for number in range(stack.shape[0]):
            weight = stack[number].T.contiguous() if in_out else stack[number]
            q = quantize(weight, spec)
            modules = dict(mine.named_modules())
            path = f"{name}.{leaf}.{number}"
            place = place_of(modules, path)
            assert place is not None
            assert place.shape == weight.shape
            put_layer(mine, path, QuantLinear.from_quantized(q, conv1d=in_out), place)
            value = q.dequantize(torch.float32)
            stack.data[number] = value.T if in_out else value
    settle_experts(mine)
    return mine


def run(model: Any, embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = embeds.clone().requires_grad_()
    logits = model(inputs_embeds=x).logits
    logits.square().sum().backward()
    assert x.grad is not None
    return logits.detach(), x.grad


@pytest.mark.parametrize(
    "spec", [QuantSpec("nf4"), QuantSpec("nf3", 32, True), QuantSpec("uint2", 32)], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_backward_are_those_of_the_dense_model(family: str, spec: QuantSpec) -> None:
    model = dense_model(family)
    mine = quantised_model(model, spec)
    assert not any(".experts." in n and p.dim() == 3 for n, p in mine.named_parameters())
    x = model.get_input_embeddings()(IDS)
    want, gradient = run(model, x)
    got, own = run(mine, x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))
    if hasattr(model, "set_experts_implementation") and model._can_set_experts_implementation():
        assert mine.config._experts_implementation == "eager"
        grouped = ("grouped_mm",) if hasattr(torch, "_grouped_mm") else ()
        for name in (*grouped, "batched_mm"):  # asked for: decoded together, or dense
            mine.set_experts_implementation(name)
            got, own = run(mine, x)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("grouped", [False, True], ids=["one by one", "grouped"])
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_quantised_experts_is_lora_on_dense_ones(family: str, rank: int, grouped: bool) -> None:
    """Of rank 3, which torch's grouped product does not take, too."""
    model = dense_model(family)
    mine = quantised_model(model, QuantSpec("nf4", 32))
    if grouped:
        if not hasattr(torch, "_grouped_mm") or not mine._can_set_experts_implementation():
            pytest.skip("no grouped products here")
        mine.set_experts_implementation("grouped_mm")
    targets = ["gate_up_proj", "down_proj"] + (["gate_up_proj_bias"] if family == "GptOssConfig" else [])
    config = qe.LoraConfig(r=rank, lora_alpha=5, target_parameters=targets, target_modules=["q_proj"])
    config.init_lora_weights = False
    theirs = qe.get_peft_model(model, copy.deepcopy(config)).eval()
    ours = qe.get_peft_model(mine, copy.deepcopy(config)).eval()
    state = qe.get_peft_model_state_dict(theirs)
    assert {k: v.shape for k, v in state.items()} == {
        k: v.shape for k, v in qe.get_peft_model_state_dict(ours).items()
    }
    qe.set_peft_model_state_dict(ours, state)
    for adapted in (theirs, ours):
        adapted.train()
        adapted(IDS, labels=IDS).loss.backward()
    wanted = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    found = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    with torch.no_grad():
        want = theirs.eval()(IDS).logits
        torch.testing.assert_close(ours.eval()(IDS).logits, want, rtol=1e-4, atol=1e-5)
        wrapper = next(m for m in ours.modules() if isinstance(m, ParamWrapper))
        owner: Any = wrapper.get_base_layer()
        before = owner.down_proj
        ours.merge_adapter()
        assert isinstance(owner.down_proj, nn.Parameter)
        torch.testing.assert_close(ours(IDS).logits, want, rtol=1e-4, atol=1e-5)
        ours.unmerge_adapter()
        assert owner.down_proj is before
        torch.testing.assert_close(ours(IDS).logits, want, rtol=1e-4, atol=1e-5)
        with ours.disable_adapter():
            assert (ours(IDS).logits - want).abs().max() > 1e-3
        merged = ours.merge_and_unload()
        assert not any(isinstance(m, QuantExperts) for m in merged.modules())
        torch.testing.assert_close(merged(IDS).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_no_dense_expert_is_kept_for_backward(way: str) -> None:
    """What autograd saves is counted: codes are shared with the layer, a dense expert would be new."""
    if way == "grouped_mm" and not hasattr(torch, "_grouped_mm"):
        pytest.skip(f"torch {torch.__version__} has no grouped products")
    model = dense_model("MixtralConfig")
    mine = quantised_model(model, QuantSpec("nf4"))
    x = model.get_input_embeddings()(IDS[:, :11])  # of no matrix's size
    saved: dict[str, int] = {}
    sizes = {p.numel() for n, p in model.named_parameters() if ".experts." in n}
    one = {size // 4 for size in sizes} | sizes
    for name, each in (("dense", model), ("quantised", mine)):
        count = 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += tensor.is_floating_point() and tensor.numel() in one
            return tensor

        each.config._experts_implementation = way
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            each(inputs_embeds=x.clone().requires_grad_()).logits.sum().backward()
        saved[name] = count
    assert saved["dense"] > 0
    assert saved["quantised"] == 0


def test_saved_and_loaded(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for family in ("MixtralConfig", "Qwen3MoeConfig", "GptOssConfig"):
        mine = quantised_model(dense_model(family), QuantSpec("nf3", 32))
        from qlora_engine.quantized_config import record_quantization

        record_quantization(mine)
        folder = tmp_path / family
        mine.save_pretrained(folder)
        with torch.no_grad():
            want = mine(IDS).logits
            for load in (qe.from_pretrained, AutoModelForCausalLM.from_pretrained):
                again = load(folder, dtype=torch.float32).eval()
                assert sum(isinstance(m, QuantExperts) for m in again.modules()) == 4
                torch.testing.assert_close(again(IDS).logits, want)


def test_all_linear_leaves_single_experts_alone() -> None:
    mine = quantised_model(dense_model("Qwen3MoeConfig"), QuantSpec("nf4"))
    model = qe.get_peft_model(mine, qe.LoraConfig(target_modules="all-linear"))
    adapted = {n for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert adapted
    stacks = [m for m in model.modules() if isinstance(m, ParamWrapper) and m.num_experts == 4]
    assert len(stacks) == 4  # as with dense experts: the stacks, by target_parameters
    assert not any(n.rpartition(".")[2].isdecimal() for n in adapted)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_a_model_in_memory(family: str, tmp_path: Path) -> None:
    """``quantize_experts``, then training as for any quantised base; loaded again it is the same."""
    model = dense_model(family)
    mine = copy.deepcopy(model)
    found = qe.quantize_experts(mine, QuantSpec("nf4", 32))
    assert found == [f"{name}.{leaf}" for name, _, leaf in stacks_of(model)]
    reference = quantised_model(model, QuantSpec("nf4", 32))
    with torch.no_grad():
        assert torch.equal(mine(IDS).logits, reference(IDS).logits)
        mine.save_pretrained(tmp_path)
        assert torch.equal(qe.from_pretrained(tmp_path, dtype=torch.float32)(IDS).logits, mine(IDS).logits)
    with pytest.raises(ValueError, match="has no dense stacks of experts: they are quantised"):
        qe.quantize_experts(mine)


def test_experts_that_cannot_be_quantised(make_model: Any) -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no dense stacks of experts$"):
        qe.quantize_experts(make_model("llama"))
    model = dense_model("MixtralConfig")
    model.model.layers[1].mlp.experts.down_proj.data[2, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj\.2"):
        qe.quantize_experts(model)
    assert isinstance(model.model.layers[1].mlp.experts.down_proj, nn.Parameter)
    with torch.device("meta"):
        empty = dense_model("MixtralConfig")
    with pytest.raises(ValueError, match="is on the meta device"):
        qe.quantize_experts(empty)


def test_operands() -> None:
    mine = quantised_model(dense_model("GptOssConfig"), QuantSpec("nf4"))
    stack = mine.model.layers[0].mlp.experts.down_proj
    assert stack.shape == (4, 48, 32)
    assert stack.size() == stack.shape
    assert stack.size(-1) == 32
    assert len(stack) == 4
    assert stack.dtype == torch.float32
    matrix, dense = stack[torch.tensor(1)], stack.dense()
    assert isinstance(matrix, ExpertMatrix)
    assert matrix.shape == (48, 32)
    x = torch.randn(5, 48)
    torch.testing.assert_close(x @ matrix, x @ dense[1])
    torch.testing.assert_close(torch.matmul(x, stack[-1]), x @ dense[3])
    torch.testing.assert_close(nn.functional.linear(x, matrix.T), x @ dense[1])
    torch.testing.assert_close(nn.functional.linear(x, matrix.T, torch.ones(32)), x @ dense[1] + 1)
    left, right = torch.randn(48, 2), torch.randn(2, 32)
    adapted = _AdaptedMatrix(matrix, [(left, right, 0.5)])
    want = x @ (dense[1] + 0.5 * left @ right)
    for y in (x @ adapted, nn.functional.linear(x, adapted.T), nn.functional.linear(x, adapted.mT)):
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x @ adapted.T.T.dense(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.relu(matrix), dense[1].relu())
    torch.testing.assert_close(stack[torch.tensor([0, 2])], dense[[0, 2]])
    torch.testing.assert_close(torch.stack([m.dense() for m in stack]), dense)
    with pytest.raises(IndexError, match="expert 4 of 4"):
        stack[4]
    assert parameter_names(mine.model.layers[0].mlp.experts) == [
        "gate_up_proj",
        "gate_up_proj_bias",
        "down_proj",
        "down_proj_bias",
    ]
