"""get_layer_status and get_model_status."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qlora_engine import LoftQConfig, LoraConfig, get_peft_model
from qlora_engine.lora_layer import LoraLayer
from qlora_engine.status import get_layer_status, get_model_status, quantization_backend


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(16, 16)
        self.conv0 = nn.Conv2d(3, 10, 3)
        self.emb0 = nn.Embedding(10, 16)
        self.lin1 = nn.Linear(16, 16)


def make() -> Any:
    model = get_peft_model(Net(), LoraConfig(target_modules=["lin0", "emb0"]))
    model.add_adapter("other", LoraConfig(target_modules=["lin0", "conv0"], modules_to_save=["lin1"], r=4))
    return model


def test_layers_of_every_kind() -> None:
    found = {s.name: s for s in make().get_layer_status()}
    assert {name: s.module_type for name, s in found.items()} == {
        "model.lin0": "lora.Linear",
        "model.conv0": "lora.Conv2d",
        "model.emb0": "lora.Embedding",
        "model.lin1": "ModulesToSaveWrapper",
    }
    assert found["model.lin0"].available_adapters == ["default", "other"]
    assert found["model.lin0"].requires_grad == {"default": True, "other": False}
    assert found["model.lin0"].devices == {"default": ["cpu"], "other": ["cpu"]}
    assert found["model.conv0"].available_adapters == ["other"]
    assert found["model.lin1"].requires_grad == {"other": False}
    assert all(s.enabled and s.merged_adapters == [] for s in found.values())


def test_trained_tokens_report_for_their_wrapper() -> None:
    config = LoraConfig(target_modules=["lin0"], trainable_token_indices={"emb0": [1, 2]})
    found = get_peft_model(Net(), config).get_layer_status()
    assert [(s.name, s.module_type) for s in found] == [
        ("model.lin0", "lora.Linear"),
        ("model.emb0.token_adapter", "TrainableTokensLayer"),
    ]


def test_a_status_is_a_snapshot() -> None:
    model = make()
    before = model.get_layer_status()
    model.merge_adapter()
    assert before[0].merged_adapters == []
    assert model.get_layer_status()[0].merged_adapters == ["default"]


def test_model_status() -> None:
    model = make()
    status = model.get_model_status()
    assert (status.base_model_type, status.adapter_model_type) == ("Net", "LoraModel")
    assert status.peft_types == {"default": "LORA", "other": "LORA"}
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
    assert status.num_adapter_layers == 4
    assert status.enabled is True
    assert status.requires_grad == {"default": True, "other": False}
    assert status.available_adapters == ["default", "other"]
    assert status.devices == {"default": ["cpu"], "other": ["cpu"]}
    assert status.merged_adapters == []
    assert status.quantization_backend is None


def test_irregular_states() -> None:
    model = make()
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    layers[0].merge(adapter_names=["default"])
    layers[0].enable_adapters(False)
    layers[1]._active_adapter = ["other"]
    status = model.get_model_status()
    assert status.enabled == "irregular"
    assert status.active_adapters == "irregular"
    assert status.merged_adapters == "irregular"
    assert status.requires_grad["default"] == "irregular"
    layers[0].lora_A["other"].weight.requires_grad_(True)
    assert model.get_layer_status()[0].requires_grad["other"] == "irregular"


def test_an_adapter_merged_wherever_it_is_is_regular() -> None:
    model = make()
    model.merge_adapter(["default"])  # not on conv0
    assert model.get_model_status().merged_adapters == ["default"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantised_layers_say_how(bits: int) -> None:
    settings = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=bits)}
    model = get_peft_model(Net(), LoraConfig(r=4, target_modules=["lin0", "emb0"], **settings))
    expected = f"qlora_engine {model.base_model.model.lin0.base_layer.spec.format}"
    assert [s.quantization_backend for s in model.get_layer_status()] == [expected] * 2
    assert model.get_model_status().quantization_backend == expected
    model.base_model.model.lin0.merge()
    assert model.get_model_status().quantization_backend == "irregular"


def test_bitsandbytes_layers_say_how() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    holder = nn.Module()
    holder.lin = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    model = get_peft_model(holder, LoraConfig(target_modules=["lin"]))
    assert model.get_layer_status()[0].quantization_backend == "bnb 8bit"


def test_an_attribute_of_the_layer_wins() -> None:
    class Backend:
        backend_name = "mine"

    model = make()
    layer = model.base_model.model.lin0
    assert layer.quantization_backend is None
    layer.quantization_backend = Backend()
    assert quantization_backend(layer) == "mine"


def test_models_without_a_peft_model_around_them(make_model: Any) -> None:
    inner = make().base_model.model
    assert get_layer_status(inner)[0].name == "lin0"
    status = get_model_status(inner)
    assert (status.base_model_type, status.adapter_model_type, status.peft_types) == ("other", "None", {})
    model = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"])).get_base_model()
    assert get_model_status(model).base_model_type == "LlamaForCausalLM"


def test_no_adapter_is_an_error() -> None:
    for function in (get_layer_status, get_model_status):
        with pytest.raises(ValueError, match="No adapter layers found in the model"):
            function(nn.Linear(2, 2))


def test_quantised_weights_count_as_the_dense_ones() -> None:
    settings = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=4)}
    config = {"r": 4, "target_modules": ["lin0"]}
    dense, quantised = (get_peft_model(Net(), LoraConfig(**config, **s)) for s in ({}, settings))
    assert dense.get_model_status().total_params == quantised.get_model_status().total_params
    assert torch.is_tensor(quantised.base_model.model.lin0.base_layer.codes)
