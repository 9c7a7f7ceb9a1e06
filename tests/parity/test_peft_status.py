"""Status beside PEFT's: field for field, in every state; and its quantization_backend that stays None."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import qlora_engine as ours
from tests.parity.releases import since

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(16, 16)
        self.conv0 = nn.Conv2d(3, 10, 3)
        self.emb0 = nn.Embedding(10, 16)
        self.lin1 = nn.Linear(16, 16)
        self.emb1 = nn.Embedding(10, 16)


def make(library: Any, base: nn.Module) -> Any:
    config = library.LoraConfig(
        target_modules=["lin0", "emb0"], use_dora=True, trainable_token_indices={"emb1": [1]}
    )
    model = library.get_peft_model(copy.deepcopy(base), config)
    other = library.LoraConfig(target_modules=["lin0", "conv0"], modules_to_save=["lin1"], r=4)
    model.add_adapter("other", other)
    return model


def disable_one(model: Any) -> None:
    model.base_model.model.lin0.enable_adapters(False)


def merge_one(model: Any) -> None:
    model.base_model.model.lin0.merge(adapter_names=["other"])


STATES: dict[str, Callable[[Any], Any]] = {
    "fresh": lambda model: None,
    "other": lambda model: model.set_adapter("other"),
    "both": lambda model: model.base_model.set_adapter(["default", "other"]),
    "merged": lambda model: model.merge_adapter(["default"]),
    "disabled": lambda model: model.disable_adapter_layers(),
    "one disabled": disable_one,
    "one merged": merge_one,
    "frozen": lambda model: model.set_requires_grad("default", requires_grad=False),
    "deleted": lambda model: model.delete_adapter("other"),
}


@since("0.21", "other fields and other answers")
@pytest.mark.parametrize("state", STATES)
def test_same_status(state: str) -> None:
    results = []
    base = Net()
    for library in (peft, ours):
        model = make(library, base)
        STATES[state](model)
        layers = [dataclasses.asdict(s) for s in model.get_layer_status()]
        results.append((layers, dataclasses.asdict(model.get_model_status())))
    (their_layers, their_model), (our_layers, our_model) = results
    assert our_layers == their_layers
    assert our_model == their_model


@since("0.20", "no quantization_backend")
def test_same_fields() -> None:
    from peft.peft_model import TunerLayerStatus, TunerModelStatus

    from qlora_engine import status

    for mine, theirs in (
        (status.TunerLayerStatus, TunerLayerStatus),
        (status.TunerModelStatus, TunerModelStatus),
    ):
        assert [f.name for f in dataclasses.fields(mine)] == [f.name for f in dataclasses.fields(theirs)]


@since("0.20", "no quantization_backend")
def test_quantised_backend_is_filled_in() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    found = []
    for library in (peft, ours):
        holder = nn.Module()
        holder.lin = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")
        holder.is_loaded_in_4bit = True
        model = library.get_peft_model(holder, library.LoraConfig(target_modules=["lin"]))
        found.append(model.get_layer_status()[0].quantization_backend)
    assert found == [None, "qlora_engine nf4"]
