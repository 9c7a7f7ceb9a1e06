"""What a file holds of an adapter: embeddings, renamed keys, the base's own state, files that are missing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_engine import (
    LoraConfig,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from qlora_engine import adapter_state as module

EMBEDDINGS = {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}


@pytest.fixture
def model(make_model: Any) -> Any:
    return adapted(make_model)


def adapted(make_model: Any, name: str = "llama", **options: Any) -> Any:
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options}
    return get_peft_model(make_model(name), LoraConfig(**settings))


def test_embeddings_are_saved_where_they_are_asked_for(model: Any) -> None:
    plain = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert all(".lora_" in key for key in plain)
    whole = get_peft_model_state_dict(model, save_embedding_layers=True)
    assert whole.keys() - plain.keys() == EMBEDDINGS
    base = model.get_base_model()
    assert torch.equal(whole["base_model.model.lm_head.weight"], base.lm_head.weight)


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], r".*\.(embed_tokens|q_proj)"])
def test_an_adapted_embedding_is_saved_with_its_base(targets: Any, make_model: Any) -> None:
    model = adapted(make_model, target_modules=targets)
    with pytest.warns(UserWarning, match="Setting `save_embedding_layers` to `True`"):
        found = get_peft_model_state_dict(model)
    base = "base_model.model.model.embed_tokens.base_layer.weight"
    assert {key for key in found if ".lora_" not in key} == {base}
    assert torch.equal(found[base], model.get_base_model().get_input_embeddings().base_layer.weight)


@pytest.mark.parametrize("targets", ["all-linear", r".*\.q_proj"])
def test_words_that_target_no_embedding_save_none(targets: str, make_model: Any) -> None:
    assert not any(
        "embed" in key for key in get_peft_model_state_dict(adapted(make_model, target_modules=targets))
    )


def test_a_resized_vocabulary_is_saved(model: Any, make_checkpoint: Any) -> None:
    model.peft_config["default"].base_model_name_or_path = str(make_checkpoint("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not EMBEDDINGS & get_peft_model_state_dict(model).keys()
    model.get_base_model().resize_token_embeddings(400)
    with pytest.warns(UserWarning, match="has been resized during"):
        found = get_peft_model_state_dict(model)
    assert {found[key].shape for key in EMBEDDINGS} == {(400, 64)}


def test_a_base_that_cannot_be_found_is_taken_as_it_is(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    model.peft_config["default"].base_model_name_or_path = "nobody/nothing"
    with pytest.warns(UserWarning, match="Could not find a config file in nobody/nothing"):
        assert not EMBEDDINGS & get_peft_model_state_dict(model).keys()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def answer(result: Any) -> Any:
        def file_exists(*_: Any, **__: Any) -> bool:
            if isinstance(result, Exception):
                raise result
            return bool(result)

        return file_exists

    monkeypatch.setattr(huggingface_hub, "file_exists", answer(OSError("no network")))
    with pytest.warns(UserWarning, match="following error no network - silently ignoring"):
        assert not EMBEDDINGS & get_peft_model_state_dict(model).keys()
    monkeypatch.setattr(huggingface_hub, "file_exists", answer(False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not EMBEDDINGS & get_peft_model_state_dict(model).keys()
    config = type(model.config)
    monkeypatch.setattr(huggingface_hub, "file_exists", answer(True))
    monkeypatch.setattr(config, "from_pretrained", lambda name: config(vocab_size=7))
    with pytest.warns(UserWarning, match="has been resized during"):
        assert get_peft_model_state_dict(model).keys() > EMBEDDINGS


def test_a_model_without_embeddings_says_so() -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(8, 8))
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["0"]))
    with pytest.warns(UserWarning, match="Could not identify embedding layer"):
        found = get_peft_model_state_dict(model, save_embedding_layers=True)
    assert set(found) == {"base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"}


def test_a_compiled_model_is_unwrapped(model: Any) -> None:
    compiled = torch.compile(model)
    found = get_peft_model_state_dict(compiled, unwrap_compiled=True)
    assert found.keys() == get_peft_model_state_dict(model).keys()


def test_parts_of_shards_are_warned_of(model: Any) -> None:
    layers = model.get_base_model().model.layers
    for layer in layers:
        for name in ("q_proj", "v_proj"):
            getattr(layer.self_attn, name).lora_A["default"].weight.data = torch.empty(0)
    with pytest.warns(module.PeftWarning, match=r"4 LoRA tensor\(s\) have invalid shape: .* \(\+1 more\)"):
        get_peft_model_state_dict(model)


def test_the_bases_state_has_its_own_names(model: Any, make_model: Any) -> None:
    dense = make_model("llama").state_dict()
    found = get_base_model_state_dict(model)
    assert found.keys() == dense.keys()
    assert all(torch.equal(found[key], dense[key]) for key in dense)
    factors = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    set_base_model_state_dict(model, {key: value + 1 for key, value in dense.items()})
    now = get_base_model_state_dict(model)
    assert all(torch.equal(now[key], dense[key] + 1) for key in dense)
    assert all(torch.equal(factors[k], v) for k, v in get_peft_model_state_dict(model).items())
    some = {"lm_head.weight": dense["lm_head.weight"], "strange": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r"Missing key.*embed_tokens(.|\n)*Unexpected key.*strange"):
        set_base_model_state_dict(model, some)
    result = set_base_model_state_dict(model, some, strict=False)
    assert result.unexpected_keys == ["strange"]
    assert len(result.missing_keys) == len(dense) - 1
    assert torch.equal(get_base_model_state_dict(model)["lm_head.weight"], dense["lm_head.weight"])


def test_the_bases_state_without_what_adapters_train(make_model: Any) -> None:
    model = adapted(make_model, modules_to_save=["lm_head"], trainable_token_indices=[1, 2])
    assert get_base_model_state_dict(model).keys() == make_model("llama").state_dict().keys()


def test_a_file_fits_a_model_with_adapters_injected(model: Any, make_model: Any) -> None:
    """Such a model has no ``base_model.model`` in front of its names."""
    found = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    other = inject_adapter_in_model(config, make_model("llama"))
    result = set_peft_model_state_dict(other, found)
    assert not result.unexpected_keys
    got = get_peft_model_state_dict(other)
    assert all(torch.equal(got[key.removeprefix("base_model.model.")], value) for key, value in found.items())


def test_sizes_that_differ_are_left_out_where_asked(model: Any) -> None:
    found = {key: value.clone() + 1 for key, value in get_peft_model_state_dict(model).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_peft_model_state_dict(model, found, ignore_mismatched_sizes=True)
    now = get_peft_model_state_dict(model)
    assert all(torch.equal(now[key], value) for key, value in found.items())


def test_keys_are_renamed_by_the_first_pattern_that_matches(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    mapping = {r"^model\.layers\.": "backbone.blocks.", r"self_attn": "never"}
    found = load_peft_weights(tmp_path, key_mapping=mapping)
    want = {
        key.replace("base_model.model.model.layers.", "base_model.model.backbone.blocks.")
        for key in load_peft_weights(tmp_path)
    }
    assert found.keys() == want
    from safetensors.torch import save_file

    save_file({"layers.0.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"'layers\.0\.lora_A\.weight' does not begin with 'base_model\.'"):
        load_peft_weights(tmp_path, key_mapping=mapping)


def test_missing_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    with pytest.raises(ValueError, match=r"Can't find weights for .*: no adapter_model\.safetensors in"):
        load_peft_weights(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match="a pickle that could run code"):
        load_peft_weights(tmp_path)

    def download(name: str, filename: str, **_: Any) -> str:
        raise EntryNotFoundError(f"{filename} is not in {name}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ValueError, match=r"nobody/nothing or in the Hugging Face Hub: no adapter_model"):
        load_peft_weights("nobody/nothing")
