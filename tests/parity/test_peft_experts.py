"""Mixture-of-experts models as PEFT treats them: stacked experts, routers, adapters of before stacking."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import qlora_engine as ours
from qlora_engine.lora_param import ParamWrapper
from tests.parity.releases import since

peft = pytest.importorskip("peft")

pytestmark = [
    since("0.20", "knows no stacked experts by their former names"),
    pytest.mark.filterwarnings("ignore:target_modules=.*were set but no module"),
    pytest.mark.filterwarnings(
        "ignore:The following (rank|alpha)_pattern keys did not match"
    ),  # PEFT's are wrong
]
IDS = torch.arange(24).reshape(2, 12)
# former names of the experts' Linears: those that are one stack now, and the last
FORMER = {"mixtral": (("w1", "w3"), "w2"), "qwen3_moe": (("gate_proj", "up_proj"), "down_proj")}
TARGETS: dict[str, tuple[str, Any]] = {
    "list": ("qwen3_moe", ["q_proj", "gate_proj", "up_proj", "down_proj"]),
    "down only": ("qwen3_moe", ["down_proj"]),
    "regex": ("qwen3_moe", r".*\.(q_proj|v_proj|gate_proj|up_proj|down_proj)"),
    "regex without experts": ("qwen3_moe", r".*\.(q_proj|v_proj)"),
    "all-linear": ("qwen3_moe", "all-linear"),
    "mixtral": ("mixtral", ["w1", "w2", "w3", "gate"]),
    "mixtral all-linear": ("mixtral", "all-linear"),
    "mixtral attention": ("mixtral", ["q_proj"]),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("case", TARGETS)
def test_the_same_modules_and_parameters_are_adapted(make_model: Any, case: str, tmp_path: Path) -> None:
    name, targets = TARGETS[case]
    options = {"r": 4, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": False}
    theirs = peft.get_peft_model(make_model(name), peft.LoraConfig(**copy.deepcopy(options))).eval()
    mine = ours.get_peft_model(make_model(name), ours.LoraConfig(**options)).eval()
    a, b = theirs.peft_config["default"], mine.peft_config["default"]
    assert set(a.target_parameters or ()) == set(b.target_parameters or ())
    assert a.rank_pattern == b.rank_pattern
    assert a.alpha_pattern == b.alpha_pattern
    weights = peft.get_peft_model_state_dict(theirs)
    assert {k: v.shape for k, v in weights.items()} == {
        k: v.shape for k, v in ours.get_peft_model_state_dict(mine).items()
    }
    ours.set_peft_model_state_dict(mine, weights)
    expected = logits(theirs)
    torch.testing.assert_close(logits(mine), expected)
    assert (expected - logits(make_model(name))).abs().max() > 1e-3
    # and in the other's files
    mine.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(make_model(name), tmp_path)), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    again = ours.PeftModel.from_pretrained(make_model(name), tmp_path / "theirs")
    torch.testing.assert_close(logits(again), expected)
    torch.testing.assert_close(logits(mine.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def adapter_of_before(name: str, folder: Path, *, router: bool = True, **options: Any) -> dict[str, Any]:
    """An adapter folder as transformers 4 led to; returns its tensors by path of the module."""
    (first, second), last = FORMER[name]
    block = "block_sparse_moe" if name == "mixtral" else "mlp"
    shapes = {first: (32, 64), second: (32, 64), last: (64, 32)}
    if name == "mixtral":
        shapes = {first: (96, 64), second: (96, 64), last: (64, 96)}
    factors = {}
    for layer in range(2):
        path = f"model.layers.{layer}"
        modules = {f"{path}.self_attn.q_proj": (64, 64)}
        if router:
            modules[f"{path}.{block}.gate"] = (4, 64)
        for expert in range(4):
            modules |= {f"{path}.{block}.experts.{expert}.{old}": s for old, s in shapes.items()}
        for module, (out, width) in modules.items():
            factors[module] = (torch.randn(3, width) * 0.1, torch.randn(out, 3) * 0.1)
    folder.mkdir(exist_ok=True)
    tensors = {
        f"base_model.model.{module}.lora_{side}.weight": tensor
        for module, pair in factors.items()
        for side, tensor in zip("AB", pair)
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = ["q_proj", first, second, last, *(["gate"] if router else [])]
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": targets, **options}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return factors


@pytest.mark.parametrize("name", FORMER)
def test_adapters_of_single_experts_load(make_model: Any, name: str, tmp_path: Path) -> None:
    adapter_of_before(name, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make_model(name), tmp_path)
    mine = ours.PeftModel.from_pretrained(make_model(name), tmp_path)
    expected = logits(theirs)
    torch.testing.assert_close(logits(mine), expected)
    assert (expected - logits(make_model(name))).abs().max() > 1e-3
    loaded = mine.load_adapter(tmp_path, "again")
    assert not loaded.missing_keys
    assert not loaded.unexpected_keys
    mine.save_pretrained(tmp_path / "now")
    torch.testing.assert_close(
        logits(ours.PeftModel.from_pretrained(make_model(name), tmp_path / "now")), expected
    )


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("name", FORMER)
def test_every_expert_gets_its_own_delta(
    make_model: Any, name: str, use_rslora: bool, tmp_path: Path
) -> None:
    """Held against the factors themselves. PEFT doubles rank and alpha for rsLoRA as well, and so adapts the
    stack of two with 1.41 times the scaling it was trained with; ours keeps it."""
    factors = adapter_of_before(name, tmp_path, use_rslora=use_rslora)
    scaling = 6 / 3**0.5 if use_rslora else 2.0
    base = make_model(name)
    merged = ours.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).merge_and_unload()
    (first, second), last = FORMER[name]
    block = "block_sparse_moe" if name == "mixtral" else "mlp"
    for layer in range(2):
        before, after = (m.model.layers[layer].mlp.experts for m in (base, merged))
        for expert in range(4):
            path = f"model.layers.{layer}.{block}.experts.{expert}"
            delta = {
                old: scaling * factors[f"{path}.{old}"][1] @ factors[f"{path}.{old}"][0]
                for old in (first, second, last)
            }
            stacked = torch.cat([delta[first], delta[second]])
            torch.testing.assert_close(
                (after.gate_up_proj - before.gate_up_proj)[expert], stacked, rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                (after.down_proj - before.down_proj)[expert], delta[last], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("library", [peft, ours], ids=["peft", "ours"])
def test_half_a_stack_cannot_be_targeted(make_model: Any, library: Any) -> None:
    message = (
        r"Cannot convert PEFT target\(s\) up_proj without also targeting gate_proj because they are fused"
    )
    with pytest.raises(ValueError, match=message):
        library.get_peft_model(make_model("qwen3_moe"), library.LoraConfig(target_modules=["up_proj"]))


def test_training_moves_the_experts_alike(make_model: Any) -> None:
    options = {"r": 4, "target_modules": "all-linear"}
    models = [
        lib.get_peft_model(make_model("qwen3_moe"), lib.LoraConfig(**options)).train() for lib in (peft, ours)
    ]
    ours.set_peft_model_state_dict(models[1], peft.get_peft_model_state_dict(models[0]))
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    theirs, mine = peft.get_peft_model_state_dict(models[0]), ours.get_peft_model_state_dict(models[1])
    stacks = [key for key in theirs if ".experts." in key and "lora_B" in key]
    assert len(stacks) == 4
    assert all(theirs[key].abs().max() > 0 for key in stacks)
    for key, tensor in theirs.items():
        torch.testing.assert_close(mine[key], tensor, rtol=1e-3, atol=1e-5)
    assert (
        sum(isinstance(m, ParamWrapper) for m in models[1].modules()) == 6
    )  # two stacks, one router a layer
