"""PeftModel: switching adapters, classes by task, counting, warnings, whole-model checkpointing."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_engine.config import LoraConfig
from qlora_engine.peft_api import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
)
from tests.small_models import MLP, loftq, mlp

IDS = torch.arange(4, 20).view(2, 8)


# ---- switching


def test_disable_adapter_nests_and_restores_what_it_found() -> None:
    model, x = mlp(init_lora_weights=False), torch.randn(3, 16)
    with model.disable_adapter():
        base = model(x)
        with model.disable_adapter():
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base)
        assert not any(p.requires_grad for p in model.parameters())
    assert not torch.allclose(model(x), base)
    model.set_adapter("default", inference_mode=True)
    with model.disable_adapter():
        pass
    assert not any(p.requires_grad for p in model.parameters())  # it was frozen before
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert not torch.allclose(model(x), base)
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert torch.equal(model(x), base)


def test_disable_adapter_of_an_irregular_model_warns() -> None:
    model, x = mlp(init_lora_weights=False), torch.randn(3, 16)
    expected = model(x)
    model.base_model.model.first.enable_adapters(False)
    with (
        pytest.warns(UserWarning, match="some adapter layers that are enabled and others"),
        model.disable_adapter(),
    ):
        pass
    assert torch.equal(model(x), expected)


def test_set_adapter_errors() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"Adapter nobody not found\."):
        model.set_adapter("nobody")
    with pytest.raises(ValueError, match="Adapter nobody does not exist"):
        model.delete_adapter("nobody")
    with pytest.raises(ValueError, match="Adapter with name 'default' already exists"):
        model.add_adapter("default", LoraConfig())
    with pytest.raises(TypeError, match=r"takes one name, got \['default'\]; base_model\.set_adapter takes"):
        model.set_adapter(["default"])  # type: ignore[arg-type]
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"Adapter\(s\) \['nobody'\] not found; there are \['default'\]"):
            merge(adapter_names=["nobody"])
        with pytest.raises(TypeError, match="should be a list of strings, got 'default'"):
            merge(adapter_names="default")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['default'\] while they are merged"):
        model.delete_adapter("default")


def test_adapters_in_turn() -> None:
    model, x = mlp(init_lora_weights=False), torch.randn(3, 16)
    first = model(x)
    model.add_adapter("other", LoraConfig(target_modules=["head"], init_lora_weights=False))
    assert torch.equal(model(x), first)
    model.set_adapter("other")
    assert not torch.allclose(model(x), first)
    assert model.active_adapter == "other"
    assert model.active_peft_config is model.peft_config["other"]
    model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default", "other"]
    model.set_adapter("other")
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("other")
    assert model.active_adapter == "default"
    assert torch.equal(model(x), first)


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
def test_deleting_the_active_adapter_activates_the_same_one_everywhere() -> None:
    """Also on layers that never had the deleted one, where PEFT ends with none active."""
    model = mlp(target_modules=["first"])
    model.add_adapter("b", LoraConfig(target_modules=["head"], r=2, init_lora_weights=False))
    model.add_adapter("c", LoraConfig(target_modules=["first"], r=2, init_lora_weights=False))
    model.delete_adapter("default")
    assert model.active_adapter == "b"
    assert model.active_adapters == ["b"]
    assert model.get_model_status().active_adapters == ["b"]
    assert model.active_peft_config is model.peft_config["b"]
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains
    assert all(".b." in name for name in trains)
    model.base_model.set_adapter(["b", "c"])
    model.delete_adapter("b")
    assert (model.active_adapter, model.active_adapters) == ("c", ["c"])
    model.delete_adapter("c")
    assert (model.active_adapter, model.active_adapters) == ([], [])
    model(torch.randn(2, 16))
    model.add_adapter("d", LoraConfig(target_modules=["first"]))
    model.set_adapter("d")
    assert model.active_adapters == ["d"]


def test_setting_an_adapter_unmerges() -> None:
    model, x = mlp(init_lora_weights=False), torch.randn(3, 16)
    expected = model(x)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("default")
    assert torch.equal(model(x), expected)


# ---- classes and counting


@pytest.mark.parametrize(
    ("task_type", "cls"),
    [
        (None, PeftModel),
        ("CAUSAL_LM", PeftModelForCausalLM),
        ("FEATURE_EXTRACTION", PeftModelForFeatureExtraction),
    ],
)
def test_task_type_picks_the_class(make_model: Any, task_type: str | None, cls: type) -> None:
    model = get_peft_model(make_model("llama"), LoraConfig(task_type=task_type))
    assert type(model) is cls
    assert model(IDS)[0].shape[:2] == (2, 8)
    assert model(input_ids=IDS, attention_mask=torch.ones_like(IDS))[0].shape[:2] == (2, 8)


def test_heads_train_with_the_adapter() -> None:
    from transformers import (
        BertConfig,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
    )

    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    for base, task, cls, head in (
        (BertForSequenceClassification, "SEQ_CLS", PeftModelForSequenceClassification, "classifier"),
        (BertForTokenClassification, "TOKEN_CLS", PeftModelForTokenClassification, "classifier"),
        (BertForQuestionAnswering, "QUESTION_ANS", PeftModelForQuestionAnswering, "qa_outputs"),
    ):
        model = get_peft_model(base(config), LoraConfig(task_type=task, target_modules=["query"]))
        assert type(model) is cls
        assert model.cls_layer_name == head
        assert head in model.peft_config["default"].modules_to_save
        trainable = [n for n, p in model.named_parameters() if p.requires_grad and head in n]
        assert trainable
        assert model(torch.ones(1, 3, dtype=torch.long))[0] is not None
        model.add_adapter("other", LoraConfig(task_type=task, target_modules=["query"]))
        assert head in model.peft_config["other"].modules_to_save


def test_seq2seq(make_model: Any) -> None:
    model = get_peft_model(make_model("t5"), LoraConfig(task_type="SEQ_2_SEQ_LM"))
    assert type(model) is PeftModelForSeq2SeqLM
    assert model(input_ids=IDS, labels=IDS).loss.requires_grad
    assert model.generate(input_ids=IDS, max_new_tokens=3).shape[0] == 2
    with pytest.raises(TypeError, match="positional"):
        model.generate(IDS)


def test_counts_are_those_of_the_weights_not_of_the_bytes(make_model: Any, capsys: Any) -> None:
    dense = get_peft_model(make_model("llama"), LoraConfig(target_modules="all-linear"))
    quantised = loftq(make_model("llama"))
    assert quantised.get_nb_trainable_parameters() == dense.get_nb_trainable_parameters()
    quantised.print_trainable_parameters()
    trainable, total = quantised.get_nb_trainable_parameters()
    share = f"trainable%: {100 * trainable / total:.4f}"
    expected = f"trainable params: {trainable:,d} || all params: {total:,d} || {share}\n"
    assert capsys.readouterr().out == expected


def test_generate_and_mixed_batches(make_model: Any) -> None:
    model = get_peft_model(
        make_model("llama"),
        LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False),
    ).eval()
    model.add_adapter("other", LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    ids = IDS[:1].repeat(3, 1)
    options: Any = {
        "max_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }
    names = ["other", "__base__", "default"]
    mixed = model(ids, adapter_names=names).logits
    generated = model.generate(input_ids=ids, adapter_names=names, **options)
    beams = model.generate(input_ids=ids, adapter_names=names, num_beams=2, **options)
    assert beams.shape[0] == 3
    one: Any = {**options, "attention_mask": torch.ones_like(ids[:1])}
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(ids[:1]).logits
                text = model.generate(input_ids=ids[:1], **one)
        else:
            model.set_adapter(name)
            alone = model(ids[:1]).logits
            text = model.generate(input_ids=ids[:1], **one)
        torch.testing.assert_close(mixed[row], alone[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(generated[row], text[0])
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_adapter_dtypes(make_model: Any, dtype: torch.dtype, autocast: bool) -> None:
    model = get_peft_model(
        make_model("llama", dtype=dtype), LoraConfig(use_dora=True), autocast_adapter_dtype=autocast
    )
    wanted = torch.float32 if autocast else dtype
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {wanted}
    model.add_adapter("other", LoraConfig(), autocast_adapter_dtype=autocast)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {wanted}


def test_dora_in_float32_on_a_bf16_base_starts_as_an_identity(make_model: Any) -> None:
    base = make_model("llama", dtype=torch.bfloat16)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(use_dora=True, target_modules="all-linear"))
    torch.testing.assert_close(model(IDS).logits, base(IDS).logits, rtol=0, atol=0)


def test_mixing_methods_is_refused() -> None:
    with pytest.raises(ValueError, match="only LoRA"):
        get_peft_model(MLP(), LoraConfig(target_modules=["head"]), mixed=True)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"base_model_name_or_path": "old"}, {}, "was renamed from 'old' to 'None'"),
        ({"revision": "a"}, {"revision": "b"}, "already set base model revision to a"),
        ({"init_lora_weights": "eva"}, {}, "eva initialization used with low_cpu_mem_usage=False"),
        ({}, {"adapter_name": "lora"}, "should not be contained in the prefix"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*Using default EVA config")
def test_warnings(options: Any, arguments: Any, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        get_peft_model(MLP(), LoraConfig(target_modules=["head"], **options), **arguments)


def test_a_second_wrap_warns_and_unload_makes_it_fresh() -> None:
    model = mlp()
    with pytest.warns(UserWarning, match="for a second time"):
        get_peft_model(model.get_base_model(), LoraConfig(target_modules=["head"]), "other")
    base = mlp().unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(base, LoraConfig(target_modules=["head"]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_a_whole_model(make_model: Any, reentrant: bool) -> None:
    model = loftq(make_model("llama"), lora_dropout=0.1).train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
