"""Experts named as the Linears they were: what becomes of them, where PEFT's own tests do not look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qlora_engine import LoftQConfig, LoraConfig, PeftModel, get_peft_model
from qlora_engine.expert_targets import stacked_experts
from qlora_engine.lora_param import ParamWrapper
from quant.linear import QuantizedModule

pytestmark = pytest.mark.filterwarnings("error:The following (rank|alpha)_pattern keys")
IDS = torch.arange(12).reshape(1, 12)


def adapted(model: Any) -> set[str]:
    """Paths of what has an adapter, as they were before; stacks with their Parameter's name."""
    found = set()
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            plain = ".".join(part for part in name.split(".") if part != "base_layer")
            found.add(f"{plain}.{module.parameter_name}" if isinstance(module, ParamWrapper) else plain)
    return found


@pytest.fixture
def shared_expert() -> Any:
    """A model whose layers have four stacked experts and a shared one of ordinary Linears."""
    from transformers import AutoModelForCausalLM, Qwen2MoeConfig

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4}
    sizes |= {"shared_expert_intermediate_size": 24, "num_experts_per_tok": 2}
    return AutoModelForCausalLM.from_config(Qwen2MoeConfig(**sizes)).eval()


def test_what_is_stacked(make_model: Any, shared_expert: Any) -> None:
    groups = stacked_experts(make_model("mixtral"))
    assert [group.path for group in groups] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert groups[0].stacks == {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
    assert groups[1].router == "model.layers.1.mlp.gate"
    assert stacked_experts(make_model("llama")) == []
    assert len(stacked_experts(shared_expert)) == 2


def test_a_shared_expert_keeps_its_adapter(shared_expert: Any, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(shared_expert, config)
    one = {f"shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    one |= {"experts.gate_up_proj", "experts.down_proj"}
    assert adapted(model) == {f"model.layers.{i}.mlp.{name}" for i in range(2) for name in one}
    with torch.no_grad():
        expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert again.peft_config["default"].rank_pattern == config.rank_pattern
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, expected)


def test_the_shared_expert_alone(shared_expert: Any) -> None:
    model = get_peft_model(shared_expert, LoraConfig(target_modules=["shared_expert.up_proj"]))
    assert adapted(model) == {f"model.layers.{i}.mlp.shared_expert.up_proj" for i in range(2)}


def test_one_layer_by_regex(make_model: Any) -> None:
    pattern = r"model\.layers\.1\..*\.(q_proj|gate_proj|up_proj)"
    config = LoraConfig(target_modules=pattern, r=4)
    model = get_peft_model(make_model("qwen3_moe"), config)
    assert adapted(model) == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.experts.gate_up_proj"}
    wrapper = next(m for m in model.modules() if isinstance(m, ParamWrapper))
    assert wrapper.r["default"] == 8
    assert wrapper.scaling["default"] == 2.0


def test_experts_can_be_excluded(make_model: Any) -> None:
    config = LoraConfig(target_modules="all-linear", exclude_modules=r".*\.mlp\.(experts|gate).*")
    model = get_peft_model(make_model("qwen3_moe"), config)
    assert adapted(model)
    assert not any(".mlp." in name for name in adapted(model))
    assert not config.target_parameters


def test_ranks_by_former_name(make_model: Any) -> None:
    patterns = {"rank_pattern": {"w1": 2, "w3": 6, "w2": 3}, "alpha_pattern": {"w1": 4, "w3": 12, "w2": 3}}
    config = LoraConfig(r=8, target_modules=["w1", "w2", "w3"], **patterns)  # type: ignore[arg-type]
    model = get_peft_model(make_model("mixtral"), config)
    ranks = {m.parameter_name: (m.r["default"], m.scaling["default"]) for m in model.modules()
             if isinstance(m, ParamWrapper)}  # fmt: skip
    assert config.rank_pattern == {r".*\.down_proj": 3}  # the stack's 2 + 6 is r
    assert ranks == {"gate_up_proj": (8, 2.0), "down_proj": (3, 1.0)}


def test_one_stack_has_one_scaling(make_model: Any) -> None:
    config = LoraConfig(target_modules=["w1", "w3"], alpha_pattern={"w1": 16})
    with pytest.raises(ValueError, match=r"w1, w3 of 'model\.layers\.0\.mlp\.experts' are one Parameter"):
        get_peft_model(make_model("mixtral"), config)


def test_quantising_leaves_the_stacks_and_says_so(make_model: Any) -> None:
    config = LoraConfig(
        target_modules="all-linear", init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=4)
    )
    # 2 layers of 4 experts of (64, 64) and (64, 32) in float32
    with pytest.warns(UserWarning, match=r"4 stacked expert weights \(0.2 MB\) stay as they are.*loftq"):
        model = get_peft_model(make_model("qwen3_moe"), config)
    assert sum(isinstance(m, QuantizedModule) for m in model.modules()) == 8
    assert not any(isinstance(m, ParamWrapper) for m in model.modules())
    assert not config.target_parameters


def test_named_stacks_refuse_what_they_cannot_do(make_model: Any) -> None:
    config = LoraConfig(target_modules=["w2"], lora_dropout=0.1)
    with pytest.raises(ValueError, match=r"ParamWrapper does not work with lora_dropout != 0"):
        get_peft_model(make_model("mixtral"), config)


class Plus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def test_a_parametrised_parameter() -> None:
    net = nn.Sequential(nn.Linear(3, 2, bias=False))
    parametrize.register_parametrization(net[0], "weight", Plus())
    x = torch.randn(4, 3)
    plain = net(x)
    model = get_peft_model(net, LoraConfig(r=2, target_parameters=["0.weight"], init_lora_weights=False))
    wrapper = model.get_base_model()[0]
    expected = plain + x @ wrapper.get_delta_weight("default").T
    for _ in range(2):
        torch.testing.assert_close(model(x), expected)
    assert torch.equal(model.unload()(x), plain)
