"""Merging beside PEFT's: equal weights on dense layers; on quantised ones both are measured.

PEFT adds the delta to the dequantised weight and quantises again, adapter by adapter, and unmerges by
subtracting (U1 to U5, U14, U16): each is a test that shows PEFT's figure and ours.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qlora_engine as ours
from tests.parity.releases import older_than

peft = pytest.importorskip("peft")

IDS = torch.arange(24).reshape(3, 8) % 20


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.emb = nn.Embedding(20, 64)
        self.lin = nn.Linear(64, 96)
        self.gpt = Conv1D(48, 96)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(48, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.gpt(torch.relu(self.lin(self.emb(ids))))  # (batch, 8, 48)
        return self.head(self.conv(x.unflatten(-1, (6, 8))).flatten(-2))


TARGETS = ["emb", "lin", "gpt", "conv"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["lin", "gpt", "conv"]},
    "patterns": {"rank_pattern": {"lin": 2}, "alpha_pattern": {"gpt": 30}},
    "saved": {"target_modules": ["lin"], "modules_to_save": ["head"]},
    "tokens": {"target_modules": ["lin"], "trainable_token_indices": {"emb": [1, 4]}},
}


def pair(*options: dict[str, Any]) -> tuple[Any, Any]:
    """The same base with the same adapters, p, q..., by PEFT and by us."""
    torch.manual_seed(0)
    base = Net()
    models = []
    for library in (peft, ours):
        configs = [
            library.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(TARGETS), **o})
            for o in options
        ]
        model = library.get_peft_model(copy.deepcopy(base), configs[0], adapter_name="p")
        for name, config in zip("qstuv", configs[1:]):
            model.add_adapter(name, config)
        models.append(model.eval())
    theirs, mine = models
    generator = torch.Generator().manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens")):
            parameter.data = parameter.data + torch.randn(parameter.shape, generator=generator) * 0.1
    mine.load_state_dict(theirs.state_dict())
    return theirs, mine


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_same_merged_weights(option: str, safe_merge: bool) -> None:
    theirs, mine = pair(OPTIONS[option])
    theirs.merge_adapter(safe_merge=safe_merge)
    mine.merge_adapter(safe_merge=safe_merge)
    one, two = theirs.state_dict(), mine.state_dict()
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=2e-6)
    merged = [m.merge_and_unload(safe_merge=safe_merge).state_dict() for m in pair(OPTIONS[option])]
    assert merged[0].keys() == merged[1].keys()
    for key in merged[0]:
        torch.testing.assert_close(merged[1][key], merged[0][key], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("names", [["p"], ["q"], ["p", "q"]], ids=str)
@pytest.mark.parametrize("option", ["plain", "dora", "lora_bias"])
def test_same_merged_weights_of_some_adapters(option: str, names: list[str]) -> None:
    if option == "dora" and len(names) == 2 and older_than("0.21"):
        pytest.skip("PEFT before 0.21: the second DoRA adapter is merged by another norm")
    theirs, mine = pair(OPTIONS[option], {**OPTIONS[option], "r": 2})
    for model in (theirs, mine):
        model.merge_adapter(names)
    one, two = theirs.state_dict(), mine.state_dict()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=2e-6)


def test_unmerge_restores_bits_and_pefts_does_not() -> None:
    differing = []
    for model in pair({}):
        before = copy.deepcopy(model.state_dict())
        model.merge_adapter()
        model.unmerge_adapter()
        after = model.state_dict()
        differing.append(sum(int((before[key] != after[key]).sum()) for key in before))
    assert differing[0] > 100
    assert differing[1] == 0


# ---- on 4-bit layers


def four_bit(size: int, scale: float, adapters: int = 1, **options: Any) -> tuple[Any, Any, Tensor, Tensor]:
    """PEFT's and our model around one NF4 layer, its W, and D, a sum of deltas of scale * ||W|| each."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    dense = nn.Linear(size, size, bias="lora_bias" in options)
    dense.weight.data = torch.randn(size, size) / size**0.5
    models: list[Any] = []
    for library in (peft, ours):
        holder = nn.Module()
        layer = bitsandbytes.nn.Linear4bit(
            size, size, bias="lora_bias" in options, quant_type="nf4", compute_dtype=torch.float32
        )
        layer.load_state_dict(dense.state_dict())
        holder.lin = layer.to("cpu")
        holder.is_loaded_in_4bit = True
        config = library.LoraConfig(r=8, lora_alpha=8, target_modules=["lin"], **options)
        model = library.get_peft_model(holder, config, adapter_name="p0")
        for number in range(1, adapters):
            model.add_adapter(f"p{number}", config)
        models.append(model.eval())
    theirs, mine = models
    W = mine.base_model.model.lin.base_layer.dequantize(torch.float32)
    deltas = []
    for number in range(adapters):
        A, B = torch.randn(8, size), torch.randn(size, 8)
        B *= scale * W.norm() / (B @ A).norm()
        deltas.append(B @ A)
        for model in models:
            layer = model.base_model.model.lin
            layer.lora_A[f"p{number}"].weight.data = A.clone()
            layer.lora_B[f"p{number}"].weight.data = B.clone()
    return theirs, mine, W, torch.stack(deltas).sum(0)


def effective(layer: Any) -> Tensor:
    """The weight that a layer's base multiplies by now."""
    base = layer.get_base_layer()
    if hasattr(base.weight, "quant_state"):
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).float()
    return base.weight.detach().float()


# ||D|| / ||W||, and what PEFT's merge leaves of D: (error / ||D||, projection on D)
U1 = {0.002: (0.9, 0.1), 0.01: (0.9, 0.1), 0.05: (0.8, 0.5), 0.2: (0.3, 1.1)}


@pytest.mark.parametrize("scale", U1)
def test_u1_u3_small_deltas_do_not_survive_pefts_merge(scale: float) -> None:
    theirs, mine, W, D = four_bit(512, scale)
    with pytest.warns(UserWarning, match="rounding errors"):
        theirs.merge_adapter()
    mine.merge_adapter()
    errors = [((effective(m.base_model.model.lin) - W - D).norm() / D.norm()).item() for m in (theirs, mine)]
    least_error, most_projection = U1[scale]
    change = effective(theirs.base_model.model.lin) - W
    assert errors[0] > least_error
    assert ((change * D).sum() / D.square().sum()).item() < most_projection
    assert errors[1] < 1e-3  # float32, or float16 where the layer stands for it
    theirs.unmerge_adapter()
    mine.unmerge_adapter()
    drift = (effective(theirs.base_model.model.lin) - W).norm() / W.norm()
    assert drift > 0.3 * scale
    assert torch.equal(mine.base_model.model.lin.base_layer.dequantize(torch.float32), W)


def test_u2_several_adapters_are_summed_before_quantising() -> None:
    theirs, mine, W, D = four_bit(256, 0.3, adapters=4)
    names = [f"p{number}" for number in range(4)]
    with pytest.warns(UserWarning, match="rounding errors"):
        theirs.merge_adapter(names)
    step_by_step = ((effective(theirs.base_model.model.lin) - W - D).norm() / (W + D).norm()).item()
    result = mine.merge_and_unload(adapter_names=names, requantize="nf4")
    once = result.merge_report[0].error
    got = result.lin.dequantize(torch.float32)
    assert once == pytest.approx(((got - W - D).norm() / (W + D).norm()).item(), rel=1e-3)
    assert once < 0.8 * step_by_step


def test_u3_disabling_adapters_of_a_merged_model_gives_the_base() -> None:
    theirs, mine, _, _ = four_bit(256, 1.0)
    x = torch.randn(4, 256)
    drifts = []
    for model in (theirs, mine):
        with torch.no_grad():
            layer = model.base_model.model.lin
            with model.disable_adapter():
                expected = layer(x)
                expected = expected.clone()
            model.merge_adapter()
            with model.disable_adapter():
                got = layer(x)
        drifts.append(((got - expected).norm() / expected.norm()).item())
    assert drifts[0] > 0.05
    assert drifts[1] == 0


@pytest.mark.parametrize("safe_merge", [False, True])
def test_u4_u5_lora_bias_is_scaled_and_safe_merge_works(safe_merge: bool) -> None:
    theirs, mine, _, _ = four_bit(128, 0.1, lora_bias=True)
    bias = torch.randn(128)
    errors = []
    for model in (theirs, mine):
        layer = model.base_model.model.lin
        layer.scaling["p0"] = 8.0
        layer.lora_B["p0"].bias.data = bias.clone()
        before = layer.get_base_layer().bias.detach().float().clone()
        if model is theirs and safe_merge:
            with pytest.raises(RuntimeError, match="ambiguous"):
                model.merge_adapter(safe_merge=True)
            continue
        model.merge_adapter(safe_merge=safe_merge)
        got = layer.get_base_layer().bias.detach().float() - before
        errors.append((got - 8 * bias).abs().max().item())
    if not safe_merge:
        assert errors[0] > 1
    assert errors[-1] < 1e-2


def test_u14_replicated_layers_are_refused() -> None:
    theirs, mine = pair({"target_modules": ["lin"]})
    for model in (theirs, mine):
        model.peft_config["p"].layer_replication = [(0, 1), (0, 1)]
    theirs.merge_adapter()  # no error, although the merge would be wrong
    with pytest.raises(ValueError, match="layers are replicated"):
        mine.merge_adapter()


def test_u16_lora_on_a_quantised_embedding_merges() -> None:
    settings = {"init_lora_weights": "loftq", "loftq_config": ours.LoftQConfig(loftq_bits=4)}
    torch.manual_seed(0)
    model = ours.get_peft_model(Net(), ours.LoraConfig(r=4, target_modules=["emb", "lin"], **settings)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn_like(parameter) * 0.05
    with torch.no_grad():
        expected = model(IDS)
        torch.testing.assert_close(model.merge_and_unload()(IDS), expected, rtol=1e-5, atol=1e-5)
