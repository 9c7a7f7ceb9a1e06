"""prepare_model_for_kbit_training: what it casts and what it leaves; the model still runs and trains."""

from __future__ import annotations

import copy
import pickle
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from qlora_engine import LoftQConfig, LoraConfig, get_peft_model
from qlora_engine.kbit import cast_mixed_precision_params, is_quantized, prepare_model_for_kbit_training

IDS = torch.arange(12).reshape(2, 6)
DTYPES = [torch.float16, torch.bfloat16]


def quantised(make_model: Any, name: str, dtype: torch.dtype, **options: Any) -> Any:
    config = LoraConfig(
        r=2,
        target_modules="all-linear",
        init_lora_weights="loftq",
        loftq_config=LoftQConfig(loftq_bits=4, loftq_iter=1),
    )
    return get_peft_model(make_model(name, dtype=dtype, **options), config).unload()


def run(model: Any) -> torch.Tensor:
    kwargs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **kwargs)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "qwen3_moe"])
def test_only_norms_become_float32_and_the_model_runs(name: str, dtype: torch.dtype, make_model: Any) -> None:
    model = quantised(make_model, name, dtype)
    before = run(model)
    prepared = prepare_model_for_kbit_training(model)
    assert prepared is model
    norms = set()
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if "norm" in type(module).__name__.lower():
                norms.add(parameter)
                assert parameter.dtype == torch.float32, path
            elif parameter.is_floating_point():
                assert parameter.dtype == dtype, f"{path}.{own}"
            assert not parameter.requires_grad
    assert norms
    assert run(model).dtype == dtype
    # the norms computed in dtype before; a norm's rounding is at most 2^-8 or 2^-11 of an output of size ~1
    torch.testing.assert_close(run(model), before, rtol=0.1, atol=0.05)


def test_embeddings_and_head_are_not_copied(make_model: Any) -> None:
    model = quantised(make_model, "llama", torch.bfloat16)
    pointers = {n: p.data_ptr() for n, p in model.named_parameters() if "norm" not in n}
    prepare_model_for_kbit_training(model)
    assert pointers == {n: p.data_ptr() for n, p in model.named_parameters() if "norm" not in n}


def test_upcast_all_is_pefts(make_model: Any) -> None:
    model = quantised(make_model, "llama", torch.bfloat16)
    prepare_model_for_kbit_training(model, upcast="all")
    floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    assert floats == {torch.float32}
    assert run(model).dtype == torch.float32
    with pytest.raises(ValueError, match="upcast='some'; allowed: 'norms', 'all'"):
        prepare_model_for_kbit_training(model, upcast="some")  # type: ignore[arg-type]


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
def test_prepared_model_trains_with_gradient_checkpointing(kwargs: Any, make_model: Any) -> None:
    model = quantised(make_model, "llama", torch.bfloat16)
    prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=kwargs)
    assert model.is_gradient_checkpointing
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    peft_model.train()
    peft_model(input_ids=IDS, labels=IDS).loss.backward()
    grads = [p.grad for n, p in peft_model.named_parameters() if "lora_" in n]
    assert grads
    assert all(g is not None and g.isfinite().all() for g in grads)
    assert any(g.abs().max() > 0 for g in grads if g is not None)


def test_dense_models_are_not_checkpointed(make_model: Any) -> None:
    model = prepare_model_for_kbit_training(make_model("llama", dtype=torch.bfloat16))
    assert not model.is_gradient_checkpointing
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.model.norm.weight.dtype == torch.float32
    model = quantised(make_model, "llama", torch.bfloat16)
    assert not prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=False
    ).is_gradient_checkpointing


def test_prepared_model_copies_and_pickles(make_model: Any) -> None:
    model = quantised(make_model, "llama", torch.bfloat16)
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # its hook is a closure
    expected = run(model)
    assert torch.equal(run(copy.deepcopy(model)), expected)
    assert torch.equal(run(pickle.loads(pickle.dumps(model))), expected)


@pytest.mark.parametrize("method", ["gptq", "hqq", "torchao"])
def test_other_quantisers_keep_their_dtypes(method: str, make_model: Any) -> None:
    model = make_model("llama", dtype=torch.float16)
    model.quantization_method = method
    prepare_model_for_kbit_training(model)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert model.is_gradient_checkpointing


def test_a_model_that_is_not_transformers_is_cast_but_for_embeddings() -> None:
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8)).half()
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert model[0].weight.dtype == torch.float16
    assert model[1].weight.dtype == model[1].bias.dtype == torch.float32


@pytest.mark.parametrize("clear", [True, False])
def test_auto_clear_cache(clear: bool) -> None:
    with (
        patch("torch.cuda.is_available", return_value=True),
        patch("torch.cuda.empty_cache") as empty_cache,
    ):
        prepare_model_for_kbit_training(
            nn.Linear(4, 4).half(), use_gradient_checkpointing=False, auto_clear_cache=clear
        )
    assert empty_cache.call_count == int(clear)


def test_is_quantized(make_model: Any) -> None:
    assert not is_quantized(nn.Linear(2, 2))
    assert is_quantized(quantised(make_model, "llama", torch.bfloat16))
    flagged = nn.Linear(2, 2)
    flagged.is_loaded_in_8bit = True
    assert is_quantized(flagged)


def test_cast_mixed_precision_params(make_model: Any) -> None:
    model = quantised(make_model, "llama", torch.float32)
    codes = model.model.layers[0].self_attn.q_proj.codes.clone()
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    cast_mixed_precision_params(peft_model, torch.bfloat16)
    for name, parameter in peft_model.named_parameters():
        if parameter.is_floating_point():
            assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    assert torch.equal(model.model.layers[0].self_attn.q_proj.base_layer.codes, codes)
