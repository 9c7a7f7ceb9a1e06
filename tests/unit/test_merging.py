"""Merging: in place and back for every format and kind of layer, for good, dense or requantised."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quant.formats
from qlora_engine import LoftQConfig, LoraConfig, PeftModel, get_peft_model
from qlora_engine.densify import dequantize, weights_dtype
from qlora_engine.layer_merge import MergeOverflow
from qlora_engine.lora_layer import LoraLayer
from quant.linear import QuantEmbedding, QuantizedModule, QuantLinear
from quant.spec import QuantSpec
from quant.tensor import quantize

IDS = torch.arange(16).reshape(2, 8)


class Net(nn.Module):
    """One layer of every kind that merges."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.emb = nn.Embedding(20, 64)
        self.lin = nn.Linear(64, 96)
        self.gpt = Conv1D(128, 96)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(128, 5, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.lin(self.emb(ids)))  # (batch, 8, 96)
        return self.head(self.conv(torch.relu(self.gpt(x))))


LINEAR = ["lin", "gpt", "head"]
ALL = ["emb", *LINEAR, "conv"]


def config(**kwargs: Any) -> LoraConfig:
    kwargs.setdefault("target_modules", ALL)
    return LoraConfig(**{"r": 4, "lora_alpha": 6, **kwargs})


def loftq(spec: QuantSpec, **kwargs: Any) -> LoraConfig:
    settings = LoftQConfig(format=spec.format, block_size=spec.block_size, double_quant=spec.double_quant)
    kwargs.setdefault("target_modules", ["emb", *LINEAR])
    return config(init_lora_weights="loftq", loftq_config=settings, **kwargs)


def on_codes(spec: QuantSpec, **kwargs: Any) -> Any:
    """A PeftModel on a base whose layers were quantised before, with options that loftq does not go with."""
    base = make(loftq(spec)).unload()
    kwargs.setdefault("target_modules", ["emb", *LINEAR])
    return make(config(**kwargs), base=base)


def make(*configs: LoraConfig, base: nn.Module | None = None, size: float = 0.05) -> Any:
    """A PeftModel with adapters p, q, ... whose weights are random."""
    torch.manual_seed(0)
    model = get_peft_model(base or Net(), configs[0], adapter_name="p")
    for name, other in zip("qst", configs[1:]):
        model.add_adapter(name, other)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data += torch.randn_like(parameter) * size
    return model.eval()


@torch.no_grad()
def run(model: Any) -> Tensor:
    return model(IDS)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["lin", "gpt", "conv"]},
    "alpha": {"alpha_pattern": {"lin": 40}, "rank_pattern": {"gpt": 2}},
}
# outputs are of size 1 to 10; float32 sums over at most 128 terms differ in the last bits
CLOSE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-5}


# ---- in place and back


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", quant.formats.names())
def test_merge_and_unmerge_restore_the_codes(name: str, double_quant: bool, options: dict[str, Any]) -> None:
    options = {**options, "target_modules": [t for t in options.get("target_modules", ALL) if t != "conv"]}
    model = on_codes(QuantSpec(name, 64, double_quant), **options)
    before, expected = tensors(model), run(model)
    layer = model.base_model.model.lin
    codes, base = layer.base_layer.codes, layer.base_layer
    model.merge_adapter()
    assert isinstance(layer.base_layer, nn.Linear)
    torch.testing.assert_close(run(model), expected, **CLOSE)
    model.unmerge_adapter()
    assert layer.base_layer is base
    assert layer.base_layer.codes is codes
    assert_same_bits(model, before)
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_merge_and_unmerge_restore_dense_weights(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = make(config(**options), base=Net().to(dtype))
    before, expected = tensors(model), run(model)
    model.merge_adapter()
    # the merged weight is rounded once to dtype, as is every product before
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        run(model), expected, rtol=40 * eps, atol=40 * eps * expected.abs().max().item()
    )
    model.unmerge_adapter()
    assert_same_bits(model, before)


def test_merged_weight_is_the_float64_sum_rounded_once() -> None:
    model = make(config(), config(r=2, use_rslora=True), base=Net().bfloat16())
    layer = model.base_model.model.lin
    exact = layer.get_base_weight().double()
    for name in "pq":
        A, B = (factor.detach().double() for factor in layer.get_factors(name))
        exact = exact + layer.scaling[name] * B @ A
    layer.merge(adapter_names=["p", "q"])
    # a float32 sum may fall on the other side of the middle between two bfloat16 numbers, very rarely
    assert (layer.base_layer.weight != exact.bfloat16()).float().mean() < 1e-3


def test_adapters_merged_one_after_another_are_rounded_once() -> None:
    model = make(config(), config(), base=Net().bfloat16())
    layer = model.base_model.model.lin
    layer.merge(adapter_names=["p", "q"])
    together = layer.base_layer.weight.clone()
    layer.unmerge()
    layer.merge(adapter_names=["p"])
    with pytest.warns(
        UserWarning, match="Already following adapters were merged p. You are now additionally"
    ):
        layer.merge(adapter_names=["q"])
    assert layer.merged_adapters == ["p", "q"]
    assert torch.equal(layer.base_layer.weight, together)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        layer.merge(adapter_names=["q"])


@pytest.mark.parametrize("quantised", [False, True])
def test_several_dora_adapters_merge_to_what_forward_computes(quantised: bool) -> None:
    targets = ["emb", "lin", "gpt"] if quantised else ["emb", "lin", "gpt", "conv"]
    first = {"use_dora": True, "target_modules": targets}
    model = make(
        loftq(QuantSpec("nf4"), **first) if quantised else config(**first),
        config(use_dora=True, r=2, target_modules=targets),
        config(target_modules=targets),
    )
    model.base_model.set_adapter(["p", "q", "s"])
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and not m.lora_embedding_A]
    for layer in layers:
        x = torch.randn(3, 8, 64 if layer is model.base_model.model.lin else 96)
        if isinstance(layer.get_base_layer(), nn.Conv1d):
            x = torch.randn(3, 8, 12)
        with torch.no_grad():
            expected = layer(x)
            layer.merge()
            torch.testing.assert_close(layer(x), expected, **CLOSE)


@pytest.mark.parametrize("order", [["p", "q"], ["q", "p"]])
def test_a_bias_before_dora_is_scaled_with_the_rest(order: list[str]) -> None:
    """What DoRA finds there it scales, the base's bias aside; what comes after it does not."""
    model = make(
        config(lora_bias=True, target_modules=["lin"]), config(use_dora=True, r=2, target_modules=["lin"])
    )
    layer = model.base_model.model.lin
    layer.lora_B["p"].bias.data.fill_(0.5)
    layer.lora_magnitude_vector["q"].weight.data *= 1.5  # else DoRA's gain is near 1
    model.base_model.set_adapter(order)
    x = torch.randn(3, 8, 64)
    with torch.no_grad():
        expected = layer(x)
        layer.merge(adapter_names=order)
        torch.testing.assert_close(layer(x), expected, **CLOSE)


def test_a_merged_layer_has_a_bias_of_its_own() -> None:
    model = make(loftq(QuantSpec("nf4"), target_modules=["lin"]))
    before = tensors(model)
    model.merge_adapter()
    model.base_model.model.lin.get_base_layer().bias.data += 1
    model.unmerge_adapter()
    assert_same_bits(model, before)


def test_the_last_adapter_is_named_where_only_the_sum_is_no_number() -> None:
    model = make(*(config(target_modules=["lin"]) for _ in range(3)))
    layer = model.base_model.model.lin
    for name in ("p", "q", "s"):
        layer.lora_A[name].weight.data.fill_(1e19)
        layer.lora_B[name].weight.data.fill_(1e19)
    with pytest.raises(ValueError, match="adapter s seems to be broken"):
        layer.merge(safe_merge=True, adapter_names=["p", "q", "s"])
    assert not layer.merged


def test_disabled_adapters_give_the_base_even_when_merged() -> None:
    model = make(loftq(QuantSpec("nf4")))
    with model.disable_adapter():
        expected = run(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(run(model), expected)


def test_merge_adapter_undoes_itself_when_a_layer_fails() -> None:
    model = make(config())
    model.base_model.model.conv.lora_A["p"].weight.data[0] = float("nan")
    before = tensors(model)
    with pytest.raises(ValueError, match=r"conv: NaNs detected in the merged weights. The adapter p seems"):
        model.merge_adapter(safe_merge=True)
    assert all(not m.merged for m in model.modules() if isinstance(m, LoraLayer))
    after = model.state_dict()
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)


def test_merge_adapter_undo_keeps_what_was_merged_before() -> None:
    model = make(config(), config())
    model.merge_adapter(["p"])
    merged = tensors(model)
    model.base_model.model.conv.lora_A["q"].weight.data[0] = float("inf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="The adapter q seems to be broken"):
            model.merge_adapter(["q"], safe_merge=True)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            assert layer.merged_adapters == ["p"], name
            assert torch.equal(layer.get_base_layer().weight, merged[f"{name}.base_layer.weight"])


def test_lora_bias_without_a_base_bias_is_refused_and_changes_nothing() -> None:
    with pytest.warns(UserWarning, match="has no bias"):
        model = make(config(target_modules=["head"], lora_bias=True))
    before = tensors(model)
    with pytest.raises(RuntimeError, match="Impossible to merge LoRA with `lora_bias=True`"):
        model.merge_adapter()
    assert_same_bits(model, before)


def test_layer_is_named_when_the_weight_is_not_loaded() -> None:
    model = make(config(target_modules=["lin"]))
    model.base_model.model.lin.base_layer.to("meta")
    with pytest.raises(ValueError, match="lin: the base weight is on the meta device"):
        model.merge_adapter()


@pytest.mark.parametrize("quantised", [False, True])
def test_merged_model_copies_moves_and_unmerges(quantised: bool) -> None:
    model = make(loftq(QuantSpec("nf4")) if quantised else config())
    before = tensors(model)
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert_same_bits(twin, before)
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    layer = model.base_model.model.lin.base_layer
    if quantised:
        assert torch.equal(layer.codes, before["base_model.model.lin.base_layer.codes"])
        assert layer.bias.dtype == torch.bfloat16
    else:
        assert torch.equal(layer.weight, before["base_model.model.lin.base_layer.weight"].bfloat16())


def test_merged_quantised_layers_take_the_dtype_of_the_rest() -> None:
    model = make(loftq(QuantSpec("nf4"), target_modules=["lin"]))
    model.to(torch.bfloat16)
    model.merge_adapter()
    assert model.base_model.model.lin.base_layer.weight.dtype == torch.bfloat16
    assert run(model).dtype == torch.bfloat16


@pytest.mark.parametrize(("bias", "dtype"), [(None, torch.float16), (torch.bfloat16, torch.bfloat16)])
def test_one_layer_merged_takes_the_dtype_of_its_bias_or_its_own(
    bias: torch.dtype | None, dtype: torch.dtype
) -> None:
    base = QuantLinear.from_quantized(quantize(torch.randn(8, 64).half(), QuantSpec()), None)
    if bias is not None:
        base.bias = nn.Parameter(torch.zeros(8, dtype=bias))
    model = make(config(target_modules=["0"]), base=nn.Sequential(base))
    layer: Any = model.base_model.model[0]
    layer.merge()
    assert layer.base_layer.weight.dtype == dtype
    layer.unmerge()
    assert layer.base_layer is base


def test_replicated_layers_are_refused() -> None:
    model = make(config())
    model.peft_config["p"].layer_replication = [(0, 2)]
    with pytest.raises(ValueError, match="Cannot merge LORA layers when base model layers are replicated"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot merge LORA layers when base model layers are replicated"):
        model.merge_and_unload()


# ---- for good


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", [None, *quant.formats.names()])
def test_merge_and_unload_gives_dense_layers(
    name: str | None, options: dict[str, Any], safe_merge: bool
) -> None:
    if name is None:
        model = make(config(**options))
    else:
        targets = [t for t in options.get("target_modules", ALL) if t != "conv"]
        model = on_codes(QuantSpec(name), **{**options, "target_modules": targets})
    expected = run(model)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    kinds = {n: type(m).__name__ for n, m in merged.named_children()}
    assert kinds == {"emb": "Embedding", "lin": "Linear", "gpt": "Conv1D", "conv": "Conv1d", "head": "Linear"}
    assert merged.state_dict().keys() == Net().state_dict().keys()
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(run(merged), expected, **CLOSE)


def test_merge_and_unload_dequantises_layers_without_an_adapter() -> None:
    first = make(loftq(QuantSpec("nf4"))).unload()
    assert isinstance(first.gpt, QuantLinear)
    assert isinstance(first.emb, QuantEmbedding)
    model = make(config(target_modules=["lin"]), base=first)
    expected = run(model)
    merged = model.merge_and_unload()
    assert not any(isinstance(m, QuantizedModule) for m in merged.modules())
    torch.testing.assert_close(run(merged), expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_and_unload_in_an_asked_dtype(dtype: torch.dtype) -> None:
    model = make(loftq(QuantSpec("nf4"), target_modules=["lin", "gpt"]), base=Net().bfloat16())
    merged = model.merge_and_unload(dtype=dtype)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert run(merged).dtype == dtype


def test_merging_a_bfloat16_base_into_float32_keeps_the_float32_sum() -> None:
    model = make(config(target_modules=["lin"]), base=Net().bfloat16())
    layer = model.base_model.model.lin
    A, B = (factor.detach() for factor in layer.get_factors("p"))
    exact = layer.base_layer.weight.double() + layer.scaling["p"] * B.double() @ A.double()
    merged = model.merge_and_unload(dtype=torch.float32)
    torch.testing.assert_close(merged.lin.weight.double(), exact, rtol=1e-6, atol=1e-7)


def test_merge_and_unload_of_some_adapters() -> None:
    model = make(config(target_modules=["gpt"]), config(modules_to_save=["head"], target_modules=["lin"]))
    model.set_adapter("q")
    expected = run(model)
    model.set_adapter("p")
    merged = model.merge_and_unload(adapter_names=["q"])
    torch.testing.assert_close(run(merged), expected, **CLOSE)


def test_merge_and_unload_finishes_what_was_merged_in_place() -> None:
    model = make(loftq(QuantSpec("nf4")))
    expected = run(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="already merged"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(run(merged), expected, **CLOSE)


def test_safe_merge_changes_nothing_when_the_last_layer_is_broken() -> None:
    model = make(loftq(QuantSpec("nf4")))
    model.base_model.model.head.lora_B["p"].weight.data[0, 0] = float("inf")
    before = tensors(model)
    with pytest.raises(ValueError, match=r"head: NaNs detected in the merged weights. The adapter p seems"):
        model.merge_and_unload(safe_merge=True)
    assert_same_bits(model, before)


def test_float16_overflow_is_refused_by_name_and_bfloat16_takes_it() -> None:
    model = make(config(target_modules=["lin"]), base=Net().half())
    layer = model.base_model.model.lin
    layer.lora_A["p"].weight.data.fill_(300.0)
    layer.lora_B["p"].weight.data.fill_(300.0)
    before = tensors(model)
    message = r"lin: the merged weight reaches 5\.4e\+05, beyond float16's 6\.55e\+04; merge in bfloat16 or"
    with pytest.raises(MergeOverflow, match=message):
        model.merge_and_unload()
    assert_same_bits(model, before)
    with pytest.raises(ValueError, match="beyond float16"):
        model.merge_adapter()
    assert_same_bits(model, before)
    merged = model.merge_and_unload(dtype=torch.bfloat16)
    assert merged.lin.weight.isfinite().all()


TIED: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["lm_head", "embed_tokens"]},
    "both alike": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings", "ignore:Input and output embeddings are no")
@pytest.mark.parametrize("case", TIED)
def test_a_tied_weight_gets_each_delta_once(make_model: Any, case: str, tmp_path: Path) -> None:
    """Two layers share one Parameter. PEFT writes into it: the other layer changes too, or twice over."""
    from transformers import AutoModelForCausalLM

    ids = torch.arange(16).view(2, 8)
    base = make_model("llama_tied")
    plain = base(ids).logits
    model = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, **TIED[case]))
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    inner = [getattr(layer, "base_layer", layer) for layer in (embedding, head)]
    expected = model(ids).logits
    assert (expected - plain).abs().max() > 1e-2
    model.merge_adapter()
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert inner[0].weight is not inner[1].weight
    model.unmerge_adapter()
    assert inner[0].weight is inner[1].weight
    assert torch.equal(model(ids).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, plain)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert merged.config.tie_word_embeddings == (case == "both alike")
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == (case == "both alike")
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_merged_tied_layer_changes_its_dtype(make_model: Any) -> None:
    model = get_peft_model(make_model("llama_tied"), LoraConfig(target_modules=["lm_head"]))
    before = model.get_base_model().get_input_embeddings().weight.detach().clone()
    with pytest.warns(UserWarning, match="tied_target_modules=.*lm_head.* are part of the adapter"):
        model.merge_adapter()
    model.bfloat16()
    model.unmerge_adapter()
    head = model.get_base_model().lm_head.base_layer
    assert head.weight is model.get_base_model().get_input_embeddings().weight
    assert torch.equal(head.weight, before.bfloat16())


def test_tied_embeddings_that_part_are_said_to(make_model: Any) -> None:
    model = get_peft_model(make_model("llama_tied"), LoraConfig(target_modules=["lm_head"]))
    with (
        pytest.warns(UserWarning, match="tied_target_modules=.*lm_head.* are part of the adapter"),
        pytest.warns(UserWarning, match="Input and output embeddings are no longer tied"),
    ):
        merged = model.merge_and_unload()
    assert not merged.config.tie_word_embeddings


def test_unload_gives_the_base(make_model: Any) -> None:
    model = make(loftq(QuantSpec("nf4")))
    with model.disable_adapter():
        expected = run(model)
    base = model.unload()
    assert torch.equal(run(base), expected)
    assert not any(isinstance(m, LoraLayer) for m in base.modules())


# ---- requantised


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", quant.formats.names())
def test_requantise_quantises_the_exact_sum_once(name: str, double_quant: bool) -> None:
    spec = QuantSpec(name, 64, double_quant)
    model = make(loftq(spec), config(target_modules=["lin"]), config(target_modules=["lin"]))
    model.base_model.set_adapter(["p", "q", "s"])
    layer = model.base_model.model.lin
    before = layer.base_layer.dequantize(torch.float32)
    delta = sum(layer.get_delta_weight(n).detach() for n in "pqs")
    reference = quantize(before + delta, spec)
    merged = model.merge_and_unload(requantize=spec)
    assert isinstance(merged.lin, QuantLinear)
    got = merged.lin.dequantize(torch.float32)
    # the sums differ in the last bit, which may move a weight that lies between two levels
    assert ((got - reference.dequantize(torch.float32)).norm() / got.norm()).item() < 1e-3
    record = {r.name: r for r in merged.merge_report}["lin"]
    assert record.error == pytest.approx(
        ((got - before - delta).norm() / (before + delta).norm()).item(), rel=1e-4
    )
    survived = ((got - before) * delta).sum() / delta.square().sum()
    assert record.survived == pytest.approx(survived.item(), rel=1e-3)
    assert record.delta == pytest.approx((delta.norm() / before.norm()).item(), rel=1e-4)
    assert {r.name for r in merged.merge_report} == {"emb", "lin", "gpt", "head"}


def test_requantise_forms_of_the_argument() -> None:
    base = Net()
    for given, expected in [(QuantSpec("int8", 32), QuantSpec("int8", 32)), ("nf3", QuantSpec("nf3"))]:
        merged = make(config(), base=copy.deepcopy(base)).merge_and_unload(requantize=given)
        assert merged.lin.spec == merged.gpt.spec == expected
        assert isinstance(merged.emb, nn.Embedding)
        assert isinstance(merged.conv, nn.Conv1d)
    model = make(loftq(QuantSpec("nf4", 32, True)))
    merged = model.merge_and_unload(requantize=True)
    assert merged.lin.spec == merged.emb.spec == QuantSpec("nf4", 32, True)
    with pytest.raises(ValueError, match="lin: requantize=True means the format that a layer has"):
        make(config(target_modules=["lin"])).merge_and_unload(requantize=True)
    with pytest.raises(ValueError, match="unknown format 'nf5'"):
        make(config(target_modules=["lin"])).merge_and_unload(requantize="nf5")


def test_requantise_keeps_biases_conv1d_and_output() -> None:
    model = make(config(target_modules=["lin", "gpt"], lora_bias=True))
    expected = run(model)
    bias = model.base_model.model.lin
    total = bias.base_layer.bias + 1.5 * bias.lora_B["p"].bias
    merged = model.merge_and_unload(requantize="int8")
    assert merged.gpt.conv1d
    torch.testing.assert_close(merged.lin.bias, total)
    assert ((run(merged) - expected).norm() / expected.norm()).item() < 0.02  # int8 is good for 0.5 % a layer


@pytest.mark.parametrize("name", ["nf4", "nf2", "int3"])
def test_residual_adapter_brings_back_what_the_grid_lost(name: str) -> None:
    model = make(loftq(QuantSpec(name), lora_alpha=4), size=0.01)
    expected = run(model)
    plain = copy.deepcopy(model).merge_and_unload(requantize=name)
    kept = model.merge_and_unload(requantize=name, keep_residual=8)
    assert isinstance(kept, PeftModel)
    assert kept.active_adapters == ["residual"]
    lost, left = ((run(m) - expected).norm().item() for m in (plain, kept))
    assert left < 0.9 * lost
    for one, two in zip(plain.merge_report, kept.merge_report, strict=True):
        assert two.error < one.error
        assert two.rank == 8
    layer = kept.base_model.model.lin
    assert isinstance(layer.base_layer, QuantLinear)
    assert layer.scaling["residual"] == 1.0


def test_residual_needs_requantise_and_a_rank() -> None:
    model = make(config())
    with pytest.raises(ValueError, match="keep_residual=8 needs requantize"):
        model.merge_and_unload(keep_residual=8)
    with pytest.raises(ValueError, match="it is a rank, at least 1"):
        model.merge_and_unload(requantize="nf4", keep_residual=0)


# ---- the parts


def test_dequantize_shares_what_was_shared() -> None:
    model = make(loftq(QuantSpec("nf4"))).unload()
    model.twin = model.lin
    dequantize(model, torch.bfloat16)
    assert model.twin is model.lin
    assert model.lin.weight.dtype == torch.bfloat16


def test_weights_dtype_is_that_of_most_dense_matrices() -> None:
    model = make(loftq(QuantSpec("nf4"), target_modules=["lin"]), base=Net().bfloat16())
    assert weights_dtype(model) == torch.bfloat16
    assert weights_dtype(nn.BatchNorm1d(3)) is None


def test_progress_bar_is_shown_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    make(config()).merge_and_unload(progressbar=True)
    assert "Unloading and merging model" in capsys.readouterr().err
    make(config()).merge_and_unload()
    assert capsys.readouterr().err == ""
