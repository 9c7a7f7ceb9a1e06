"""compute="fp8" from the user's side: set_compute, LoraConfig, from_pretrained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_engine import (
    LoftQConfig,
    LoraConfig,
    LoraRuntimeConfig,
    from_pretrained,
    get_peft_model,
    set_compute,
)
from qlora_engine.errors import InputError
from quant import fp8
from quant.linear import QuantLinear

float8 = pytest.mark.skipif(
    fp8.unavailable(torch.device("cpu")) is not None, reason="this torch multiplies float8 on CUDA alone"
)


def adapted(make_model: Callable[..., Any], **runtime: Any) -> Any:
    config = LoraConfig(
        r=4,
        target_modules="all-linear",
        init_lora_weights="loftq",
        loftq_config=LoftQConfig(loftq_bits=4),
        runtime_config=LoraRuntimeConfig(**runtime),
    )
    return get_peft_model(make_model("llama"), config)


def gradients(model: Any) -> tuple[float, list[torch.Tensor]]:
    ids = torch.arange(40).reshape(2, 20)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


@float8
def test_lora_config_switches_it_on_and_set_compute_off(make_model: Callable[..., Any]) -> None:
    model = adapted(make_model, compute="fp8")
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert {layer.compute for layer in layers} == {"fp8"}
    loss, grads = gradients(model)
    assert set_compute(model, "same") == len(layers) == 14
    exact_loss, exact = gradients(model)
    plain_loss, plain = gradients(adapted(make_model))
    assert exact_loss == plain_loss
    assert all(torch.equal(a, b) for a, b in zip(exact, plain, strict=True))
    assert 0 < abs(loss - exact_loss) < 0.01
    for got, want in zip(grads, exact, strict=True):
        assert 0 < (got - want).norm() < 0.15 * want.norm() + 1e-6
    assert "compute" not in model.peft_config["default"].to_dict()


@float8
def test_from_pretrained(make_model: Callable[..., Any], tmp_path: Path) -> None:
    adapted(make_model).unload().save_pretrained(tmp_path)
    model = from_pretrained(tmp_path, compute="fp8")
    assert {m.compute for m in model.modules() if isinstance(m, QuantLinear)} == {"fp8"}
    assert model(input_ids=torch.arange(5)[None]).logits.isfinite().all()


@float8
def test_what_cannot_be_is_refused_and_changes_nothing(make_model: Callable[..., Any]) -> None:
    model = adapted(make_model)
    with pytest.raises(InputError, match="compute='fp9'; allowed: same, fp8"):
        set_compute(model, "fp9")
    with pytest.raises(InputError, match="the model has none"):
        set_compute(make_model("llama"), "fp8")
    layer = next(m for m in model.modules() if isinstance(m, QuantLinear))
    layer.shape = torch.Size((64, 72))
    with pytest.raises(InputError, match=r"q_proj.*\(64, 72\); both must be multiples of 16"):
        set_compute(model, "fp8")
    assert {m.compute for m in model.modules() if isinstance(m, QuantLinear)} == {"same"}
