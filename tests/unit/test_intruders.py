"""reduce_intruder_dimension, on layers whose singular vectors are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qlora_engine import LoftQConfig, LoraConfig, get_peft_model
from qlora_engine.intruders import reduce_intruder_dimension


class Net(nn.Module):
    """A base whose left singular vectors are the unit vectors."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        diagonal = torch.diag(torch.linspace(2.0, 1.0, 16))
        self.lin = nn.Linear(16, 16)
        self.gpt = Conv1D(16, 16)
        self.emb = nn.Embedding(16, 16)
        for layer in (self.lin, self.gpt, self.emb):
            layer.weight.data = diagonal.clone()


def make(**options: Any) -> Any:
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["lin", "gpt", "emb"], "init_lora_weights": False}
    return get_peft_model(Net(), LoraConfig(**{**config, **options}))


def put(layer: Any, adapter: str, u: torch.Tensor, v: torch.Tensor, size: float) -> None:
    """Make the adapter add ``size * u v^T`` (in the orientation (out, in), of an embedding (rows, width))."""
    A, B = layer.get_factors(adapter)
    if adapter in layer.lora_embedding_A:
        u, v = v, u
    A.data.zero_()
    B.data.zero_()
    A.data[0] = v
    B.data[:, 0] = u * size / layer.scaling[adapter]


OUTSIDER = torch.ones(16) / 4  # its cosine with every unit vector is 1/4


@pytest.mark.parametrize("name", ["lin", "gpt", "emb"])
def test_an_intruder_is_damped(name: str) -> None:
    model = make()
    layer = model.base_model.model.get_submodule(name)
    size = 20.0
    put(layer, "default", OUTSIDER, OUTSIDER, size)
    lines: list[str] = []
    reduce_intruder_dimension(model, mitigation_lambda=0.75, logging_sink=lines.append)
    assert model.active_adapters == ["intruder_reduced"]
    assert any(line == f"base_model.model.{name}: Intruders: 1" for line in lines)
    W = layer.get_base_layer().weight.detach()
    before, after = (W + layer.get_delta_weight(n).detach() for n in ("default", "intruder_reduced"))
    U, S, Vh = torch.linalg.svd(before)
    ideal = before - 0.25 * S[0] * torch.outer(U[:, 0], Vh[0])
    # cut to rank 2; what is cut is at most the rest of the outsider's direction
    assert ((after - ideal).norm() / (before - ideal).norm()).item() < 0.05
    assert torch.linalg.matrix_rank(layer.get_delta_weight("intruder_reduced"), rtol=1e-4) <= 2


def test_without_intruders_the_factors_are_copied() -> None:
    model = make(target_modules=["lin"], lora_bias=True)
    layer = model.base_model.model.lin
    unit = torch.eye(16)[3]
    put(layer, "default", unit, unit, 5.0)
    layer.lora_B["default"].bias.data.fill_(0.5)
    lines: list[str] = []
    reduce_intruder_dimension(model, new_adapter_name="new", logging_sink=lines.append)
    assert lines == ["base_model.model.lin: No intruders", "Enabling new adapter new"]
    for old, new in zip(layer.get_factors("default"), layer.get_factors("new")):
        assert torch.equal(old, new)
        assert old.data_ptr() != new.data_ptr()
    assert torch.equal(layer.lora_B["default"].bias, layer.lora_B["new"].bias)


def test_the_source_and_the_base_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    model = make(target_modules=["lin"], init_lora_weights="pissa")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    reduce_intruder_dimension(model, threshold_epsilon=999)
    assert "Intruders: 10" in capsys.readouterr().out
    reduce_intruder_dimension(model, new_adapter_name="again", logging_sink=None)
    assert capsys.readouterr().out == ""
    after = dict(model.named_parameters())
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_quantised_bases(dtype: torch.dtype) -> None:
    config = LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False)
    model = get_peft_model(Net().to(dtype), config, autocast_adapter_dtype=False)
    reduce_intruder_dimension(model, threshold_epsilon=999, logging_sink=None)
    assert model.base_model.model.lin.lora_A["intruder_reduced"].weight.dtype == dtype
    loftq = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=4)}
    model = make(target_modules=["lin"], **loftq)
    codes = model.base_model.model.lin.base_layer.codes.clone()
    reduce_intruder_dimension(model, threshold_epsilon=999, logging_sink=None)
    assert torch.equal(model.base_model.model.lin.base_layer.codes, codes)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="The provided model is not using LoRA"):
        reduce_intruder_dimension(Net())
    with pytest.raises(ValueError, match="Adapter missing does not exist"):
        reduce_intruder_dimension(make(), old_adapter_name="missing")
    with pytest.raises(ValueError, match="DoRA adapters are not supported"):
        reduce_intruder_dimension(make(target_modules=["lin"], use_dora=True))
