"""Putting adapters on models: what is chosen, what trains, what is freed, what is left after an error."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_engine.attach import LoraModel, inject_adapter_in_model, inspect_matched_modules
from qlora_engine.auxiliary import ModulesToSaveWrapper
from qlora_engine.config import LoftQConfig, LoraConfig
from qlora_engine.lora_layer import LoraLayer
from qlora_engine.peft_api import get_peft_model
from qlora_engine.target_plan import all_linear_names
from qlora_engine.targets import NoMatchingPeftModuleError
from quant.linear import QuantizedModule, QuantLinear


class MLP(nn.Module):
    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(self.norm(x))


def adapted(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def tuner(model: nn.Module | None = None, **options: Any) -> LoraModel:
    return LoraModel(model or MLP(), LoraConfig(**{"target_modules": ["head"], **options}), "default")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["head"]}, ["head"]),
        ({"target_modules": ["0", "head"]}, ["layers.0", "head"]),
        ({"target_modules": r"layers\.[12]"}, ["layers.1", "layers.2"]),
        ({"target_modules": "all-linear"}, ["layers.0", "layers.1", "layers.2", "head"]),
        ({"target_modules": "ALL-LINEAR", "exclude_modules": ["1"]}, ["layers.0", "layers.2", "head"]),
        ({"target_modules": "all-linear", "modules_to_save": ["head"]}, ["layers.0", "layers.1", "layers.2"]),
    ],
)
def test_targets(options: Any, expected: list[str]) -> None:
    model = tuner(**options)
    assert adapted(model.model) == expected
    assert model.targeted_module_names == expected
    matched = inspect_matched_modules(model)["matched"]
    assert [name for name in matched if name in expected] == expected


def test_all_linear_leaves_out_the_head_and_what_is_inside_adapters(make_model: Any) -> None:
    names = all_linear_names(make_model("llama"), "CAUSAL_LM")
    assert len(names) == 14
    assert "lm_head" not in names
    again = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"]))
    assert all_linear_names(again.get_base_model(), None) == names
    assert all("mlp" in n or "attn" in n for n in all_linear_names(make_model("gpt2"), None))


def test_all_linear_leaves_out_a_classifier(make_model: Any) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = BertForSequenceClassification(config)
    assert "classifier" not in all_linear_names(model, "SEQ_CLS")
    assert "classifier" in all_linear_names(model, None)


def test_default_targets_of_a_model_type(make_model: Any) -> None:
    model = LoraModel(make_model("t5"), LoraConfig(), "default")
    assert {name.rpartition(".")[2] for name in adapted(model.model)} == {"q", "v"}
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        LoraModel(MLP(), LoraConfig(), "default")


def test_patterns_choose_rank_and_alpha() -> None:
    options: Any = {"rank_pattern": {r"layers\.0": 2, "head": 3}, "alpha_pattern": {"^layers.1$": 40}}
    model = tuner(target_modules="all-linear", r=4, lora_alpha=8, **options).model
    ranks = [model.get_submodule(name).r["default"] for name in adapted(model)]
    assert ranks == [2, 4, 4, 3]
    assert model.get_submodule("layers.1").scaling["default"] == 10
    with pytest.warns(RuntimeWarning, match=r"rank_pattern keys did not match .*\['nope'\]"):
        tuner(rank_pattern={"nope": 2})
    loftq = LoftQConfig(bits_pattern={"nope": 2, "head": 3})
    with pytest.warns(RuntimeWarning, match=r"bits_pattern keys did not match .*\['nope'\]"):
        tuner(init_lora_weights="loftq", loftq_config=loftq, r=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["nope"]}, "Target modules {'nope'} not found in the base model"),
        ({"target_modules": []}, "No `target_modules` passed"),
        ({"exclude_modules": ".*"}, "All modules were excluded"),
        ({"target_modules": ["nope"], "exclude_modules": ["head"]}, "No modules were targeted"),
    ],
)
def test_nothing_chosen(options: Any, message: str) -> None:
    model = MLP()
    with pytest.raises(NoMatchingPeftModuleError, match=message):
        tuner(model, **options)
    assert adapted(model) == []


def test_long_lists_are_condensed() -> None:
    model = MLP(8, 25)
    config = LoraConfig(target_modules=[f"layers.{i}" for i in range(25)])
    LoraModel(model, config, "default")
    assert len(adapted(model)) == 25
    assert "head" not in config.target_modules


def test_only_adapters_train() -> None:
    model = tuner(target_modules="all-linear", use_dora=True).model
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".lora_" in name for name in trainable)


@pytest.mark.parametrize(
    ("bias", "expected"),
    [("none", 0), ("lora_only", 2), ("all", 5)],
)
def test_bias_modes(bias: str, expected: int) -> None:
    model = tuner(target_modules=["0", "head"], bias=bias).model
    trainable = [n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")]
    assert len(trainable) == expected


def test_bias_errors() -> None:
    with pytest.raises(NotImplementedError, match="Requested bias: nonsense"):
        tuner(bias="nonsense")
    model = get_peft_model(MLP(), LoraConfig(target_modules=["head"], bias="all"))
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("other", LoraConfig(target_modules=["head"], bias="lora_only"))
    assert list(model.peft_config) == ["default"]
    with pytest.warns(UserWarning, match="bias configured to be 'all' does not produce the same output"):
        model.base_model.disable_adapter_layers()


def test_modules_to_save_are_copied_and_train() -> None:
    model = tuner(target_modules=["0"], modules_to_save=["head"]).model
    head: Any = model.head
    assert isinstance(head, ModulesToSaveWrapper)
    assert head.modules_to_save["default"].weight.requires_grad
    assert not head.original_module.weight.requires_grad
    x = torch.randn(2, 64)
    with torch.no_grad():
        head.modules_to_save["default"].weight.zero_()
    assert torch.equal(head(x), head.modules_to_save["default"].bias.expand(2, -1))
    head.enable_adapters(False)
    assert torch.equal(head(x), head.original_module(x))
    assert head.weight is head.original_module.weight
    head.enable_adapters(True)
    assert head.weight is head.modules_to_save["default"].weight
    assert head.out_features == 4


def test_modules_to_save_of_a_quantised_module_are_dense() -> None:
    from quant import QuantSpec, quantize

    model = MLP()
    model.head = QuantLinear.from_quantized(quantize(model.head.weight, QuantSpec()), model.head.bias)  # type: ignore[assignment]
    adapted_model = tuner(model, target_modules=["0"], modules_to_save=["head"])
    version: Any = adapted_model.model.head.modules_to_save["default"]  # type: ignore[union-attr,index]
    assert type(version) is nn.Linear
    assert version.weight.requires_grad
    x = torch.randn(2, 64)
    torch.testing.assert_close(version(x), adapted_model.model.head.original_module(x), rtol=1e-4, atol=1e-4)  # type: ignore[union-attr,operator]


def test_modules_to_save_refusals() -> None:
    with pytest.raises(TypeError, match="cannot be applied to modules of type"):
        tuner(modules_to_save=["layers"])
    with pytest.raises(ValueError, match="does not conflict with any of the targeted modules"):
        LoraModel(MLP(), LoraConfig(target_modules=["head"], modules_to_save=["foobar"]), "foobar")


def test_a_second_adapter_leaves_trainability_and_the_active_one_alone() -> None:
    model = get_peft_model(MLP(), LoraConfig(target_modules=["0"], modules_to_save=["head"]))
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    model.add_adapter("other", LoraConfig(target_modules=["0", "1"]))
    after = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: after[n] for n in before if n in after} == {n: v for n, v in before.items() if n in after}
    assert not any(v for n, v in after.items() if ".other." in n)
    assert model.active_adapters == ["default"]
    model.set_adapter("other")
    assert all(p.requires_grad == (".other." in n) for n, p in model.named_parameters())


def test_a_failed_adapter_leaves_nothing_behind() -> None:
    model = get_peft_model(MLP(), LoraConfig(target_modules=["0"]))
    names = [n for n, _ in model.named_parameters()]
    model_error = LoraConfig(
        target_modules=["1", "head"], r=6, init_lora_weights="loftq", loftq_config=LoftQConfig()
    )
    with pytest.raises(ValueError, match="`r` should be"):
        model.add_adapter("other", LoraConfig(target_modules=["1", "2"], rank_pattern={"2": 0}))
    assert [n for n, _ in model.named_parameters()] == names
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="rank 6"):
        model.add_adapter("other", model_error)  # layers.1 would work, the head has 4 outputs only
    assert "other" not in model.peft_config
    assert not any(isinstance(m, QuantizedModule) for m in model.modules())
    assert not [n for n, _ in model.named_parameters() if "other" in n]


def test_keys_of_a_state_dict_choose_the_modules() -> None:
    source = tuner(target_modules=["0", "head"]).model
    from qlora_engine.adapter_state import get_peft_model_state_dict

    keys = get_peft_model_state_dict(source)
    model = MLP()
    with pytest.warns(
        RuntimeWarning, match=r"inconsistency was discovered .*additional target modules: \['layers.1'\]"
    ):
        inject_adapter_in_model(LoraConfig(target_modules=["1"]), model, state_dict=keys)
    assert adapted(model) == ["layers.0", "head"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject_adapter_in_model(LoraConfig(target_modules=["0", "head"]), MLP(), state_dict=keys)
    with pytest.raises(ValueError, match="inject the adapter without the state_dict"):
        inject_adapter_in_model(LoraConfig(target_parameters=["weight"]), MLP(), state_dict=keys)


def test_low_memory_injection_makes_meta_factors() -> None:
    model = inject_adapter_in_model(LoraConfig(target_modules=["head"]), MLP(), low_cpu_mem_usage=True)
    assert all(p.is_meta == (".lora_" in n) for n, p in model.named_parameters())


def test_mamba_modules_are_refused() -> None:
    model: Any = MLP()
    model.config = {"model_type": "mamba"}
    model.out_proj = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="Module 'out_proj' is incompatible with Mamba-based models"):
        tuner(model, target_modules=["out_proj"])


def test_attributes_are_forwarded() -> None:
    model = tuner()
    assert model.head is model.model.head
    with pytest.raises(AttributeError):
        model.nonsense  # noqa: B018


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_of_mixed_batches_never_stay(fails: bool) -> None:
    model = get_peft_model(MLP(), LoraConfig(target_modules=["head"], init_lora_weights=False)).eval()
    x = torch.randn(3, 64)
    plain = model(x)
    if fails:
        with pytest.raises(ValueError, match="Length of `adapter_names`"):
            model(x, adapter_names=["default"])
        with pytest.raises(ValueError, match=r"non-existing adapter\(s\): a, b"):
            model(x, adapter_names=["b", "a", "default"])
    else:
        model(x, adapter_names=["default", "__base__", "default"])
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(x), plain)
    model.train()
    with pytest.raises(ValueError, match="in training mode"):
        model(x, adapter_names=["default"] * 3)


def test_quantising_frees_each_dense_layer_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most one dense weight of the targeted layers may be alive beside those not reached yet."""
    from qlora_engine import attach

    model = MLP(64, 6)
    dense = [weakref.ref(layer.weight) for layer in model.layers]
    alive: list[int] = []
    before = attach.create_lora_layer

    def count(*args: Any, **kwargs: Any) -> Any:
        alive.append(sum(ref() is not None for ref in dense))
        return before(*args, **kwargs)

    monkeypatch.setattr(attach, "create_lora_layer", count)
    config = LoraConfig(
        target_modules=[f"layers.{i}" for i in range(6)],
        init_lora_weights="loftq",
        loftq_config=LoftQConfig(),
    )
    get_peft_model(model, config)
    gc.collect()
    assert alive == [6, 5, 4, 3, 2, 1]
    assert sum(ref() is not None for ref in dense) == 0
    assert sum(isinstance(m, QuantizedModule) for m in model.modules()) == 6


def test_quantising_one_of_two_tied_layers_is_said_and_written_down(make_model: Any) -> None:
    model = make_model("llama_tied")
    weight = model.lm_head.weight
    options: Any = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig()}
    with pytest.warns(UserWarning, match="has parted them"):
        get_peft_model(model, LoraConfig(target_modules=["embed_tokens"], **options))
    assert model.config.tie_word_embeddings is False
    assert model.lm_head.weight is weight
    plain = make_model("llama_tied")
    get_peft_model(plain, LoraConfig(target_modules=["q_proj"], **options))
    assert plain.config.tie_word_embeddings is True
    assert plain.lm_head.weight is plain.get_input_embeddings().weight


def test_the_config_says_how_layers_are_quantised(make_model: Any) -> None:
    options: Any = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=3)}
    model = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"], **options))
    settings = model.config.quantization_config
    assert settings["spec"]["format"] == "nf3"
    assert settings["quantized_modules"] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    model.unload()
    assert model.config.quantization_config["quantized_modules"] == settings["quantized_modules"]
    model = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"], **options))
    dense = model.merge_and_unload()
    assert not hasattr(dense.config, "quantization_config")
    assert not hasattr(get_peft_model(make_model("llama"), LoraConfig()).config, "quantization_config")


def test_ensure_weight_tying(make_model: Any) -> None:
    model = get_peft_model(
        make_model("llama_tied"),
        LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, init_lora_weights=False),
    )
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.lm_head
    A, B = embedding.lora_embedding_A["default"], embedding.lora_embedding_B["default"]
    assert torch.equal(head.lora_A["default"].weight, B.t())
    assert torch.equal(head.lora_B["default"].weight, A.t())
    assert head.lora_A["default"].weight.data_ptr() == B.data_ptr()
    with pytest.warns(UserWarning, match="`ensure_weight_tying` is not set to True"):
        get_peft_model(make_model("llama_tied"), LoraConfig(target_modules=["embed_tokens"]))
    with pytest.warns(UserWarning, match="no tied modules were found"):
        get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"], ensure_weight_tying=True))
