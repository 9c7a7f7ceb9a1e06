"""Some rows of an embedding that train, alone and together with a tied head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qlora_engine.config import LoraConfig
from qlora_engine.peft_api import PeftModel, get_peft_model
from qlora_engine.trainable_tokens import TrainableTokensWrapper
from quant import QuantSpec, quantize
from quant.linear import QuantEmbedding

TOKENS = [3, 7, 200]
IDS = torch.tensor([[1, 3, 7, 9]])


def model_of(make_model: Any, name: str, **options: Any) -> Any:
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=TOKENS, **options)
    return get_peft_model(make_model(name), config)


def rows(model: Any) -> torch.Tensor:
    return model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]


def test_only_these_rows_train(make_model: Any) -> None:
    model = model_of(make_model, "llama")
    before = model.get_base_model()(IDS).logits
    torch.testing.assert_close(before, make_model("llama")(IDS).logits)
    model(IDS).logits.sum().backward()
    grad = rows(model).grad
    assert grad is not None
    assert grad[0].any()
    assert not grad[2].any()  # token 200 is not in the text
    assert rows(model).shape == (3, 64)
    with torch.no_grad():
        rows(model)[1] += 1
    embedded = model.get_input_embeddings()(IDS)
    plain = make_model("llama").get_input_embeddings()(IDS)
    assert (embedded != plain).any(-1).tolist() == [[False, False, True, False]]


def test_a_deleted_adapter_is_forgotten_by_the_tied_head(make_model: Any) -> None:
    """The two share their rows, so the head finds them gone when its turn comes."""
    model = model_of(make_model, "llama_tied")
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    model.delete_adapter("other")
    wrapped = [m for m in model.modules() if isinstance(m, TrainableTokensWrapper)]
    assert len(wrapped) == 2
    for wrapper in wrapped:
        assert wrapper._adapters == {"default"}
        assert wrapper.active_adapters == ["default"]
    model.delete_adapter("default")
    assert [(w._adapters, w.active_adapters) for w in wrapped] == [(set(), [])] * 2
    expected = make_model("llama_tied")(IDS).logits
    assert torch.equal(model.base_model(IDS).logits, expected)


def test_a_tied_head_follows(make_model: Any) -> None:
    model = model_of(make_model, "llama_tied")
    head = model.get_base_model().lm_head
    assert isinstance(head, TrainableTokensWrapper)
    with torch.no_grad():
        rows(model).mul_(3)
    expected = make_model("llama_tied")
    with torch.no_grad():
        expected.get_input_embeddings().weight[TOKENS] *= 3
    torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(head.weight, expected.lm_head.weight)
    keys = [key for key in model.state_dict() if "trainable_tokens_delta" in key]
    saved = {
        key for key in __import__("qlora_engine").get_peft_model_state_dict(model) if "token_adapter" in key
    }
    assert saved == {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"}
    assert len(keys) == 2  # the head shows the same rows, and saves nothing


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_save_load_merge(make_model: Any, name: str, tmp_path: Any) -> None:
    model = model_of(make_model, name)
    with torch.no_grad():
        rows(model).mul_(3)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(name), tmp_path)
    assert torch.equal(loaded(IDS).logits, expected)
    weight = model.get_input_embeddings().token_adapter.base_layer.weight
    bits = weight.detach().clone()
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(weight, bits)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_two_adapters_and_mixed_batches(make_model: Any) -> None:
    model = model_of(make_model, "llama").eval()
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [9]})
    model.add_adapter("other", config)
    with torch.no_grad():
        rows(model).mul_(3)
        model.get_input_embeddings().token_adapter.trainable_tokens_delta["other"].mul_(-2)
    ids = IDS.repeat(3, 1)
    mixed = model(ids, adapter_names=["other", "__base__", "default"]).logits
    for row, name in ((0, "other"), (2, "default")):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], model(IDS).logits[0], rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], model(IDS).logits[0], rtol=1e-4, atol=1e-4)
    model.delete_adapter("default")
    wrapper = model.get_input_embeddings()
    assert set(wrapper.token_adapter.token_indices) == {"other"}
    assert model.active_adapters == ["other"]


def test_errors(make_model: Any) -> None:
    config = LoraConfig(
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        trainable_token_indices={"embed_tokens": [1]},
    )
    with pytest.raises(ValueError, match="already marked to be trained fully"):
        get_peft_model(make_model("llama"), config)
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"nope": [1]})
    with pytest.raises(ValueError, match=r"Target modules \{'nope'\} not found"):
        get_peft_model(make_model("llama"), config)
    tokens: Any = {"embed_tokens": [1], "lm_head": [2]}
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=tokens, ensure_weight_tying=True)
    with pytest.raises(ValueError, match="Cannot ensure weight tying when different token indices"):
        get_peft_model(make_model("llama_tied"), config)
    wrapper = TrainableTokensWrapper(nn.Embedding(10, 4), "one", [1, 2])
    wrapper.update("two", token_indices=[2, 3])
    layer = wrapper.token_adapter
    with pytest.raises(ValueError, match="Only disjunct token indices"):
        layer.forward_adapters(torch.tensor([1]), ["one", "two"])
    with torch.no_grad():
        layer.trainable_tokens_delta["one"][0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True, adapter_names=["one"])
    assert not layer.merged


def test_rows_of_a_quantised_embedding() -> None:
    table = QuantEmbedding.from_quantized(quantize(torch.randn(10, 64), QuantSpec()))
    wrapper = TrainableTokensWrapper(table, "one", [2, 5])
    ids = torch.tensor([[5, 1, 2]])
    assert torch.equal(wrapper(ids), table(ids))
    with torch.no_grad():
        wrapper.token_adapter.trainable_tokens_delta["one"].zero_()
    assert wrapper(ids).any(-1).tolist() == [[False, True, False]]
    with pytest.raises(ValueError, match="cannot be merged into a quantised embedding"):
        wrapper.token_adapter.merge()
