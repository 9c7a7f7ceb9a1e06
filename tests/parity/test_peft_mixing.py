"""add_weighted_adapter beside PEFT's: equal where PEFT is right; where it is not, both are measured.

Known differences, each a test below: PEFT keeps use_rslora, fresh DoRA magnitudes and nil lora_B biases,
re-runs an initialisation that changes the base, ignores a name that exists and a missing weight, leaves half
an adapter behind when it fails, and cannot take the SVD on a Conv1d.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qlora_engine as ours
from qlora_engine.combine import COMBINATION_TYPES, PRUNING
from tests.parity.releases import same_settings, since

peft = pytest.importorskip("peft")

IDS = torch.arange(24).reshape(3, 8) % 20


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 32)
        self.lin = nn.Linear(32, 48)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(48, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.lin(self.emb(ids)))  # (batch, 8, 48)
        return self.head(self.conv(x.unflatten(-1, (6, 8))).flatten(-2))


TARGETS = ["emb", "lin", "conv"]


def pair(*options: dict[str, Any]) -> tuple[Any, Any]:
    """The same base with the same adapters, p, q..., by PEFT and by us."""
    torch.manual_seed(0)
    base = Net()
    models = []
    for library in (peft, ours):
        configs = [
            library.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(TARGETS), **o})
            for o in options
        ]
        model = library.get_peft_model(copy.deepcopy(base), configs[0], adapter_name="p")
        for name, config in zip("qstuv", configs[1:]):
            model.add_adapter(name, config)
        models.append(model.eval())
    theirs, mine = models
    generator = torch.Generator().manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2 + ("magnitude" in name)
    mine.load_state_dict(theirs.state_dict())
    return theirs, mine


def deltas(model: Any, adapter: str) -> list[Tensor]:
    return [
        m.get_delta_weight(adapter).detach()
        for m in model.modules()
        if hasattr(m, "get_delta_weight") and adapter in (*m.lora_A, *m.lora_embedding_A)
    ]


@torch.no_grad()
def output(model: Any, adapter: str) -> Tensor:
    model.set_adapter(adapter)
    return model(IDS)


def off(model: Any, wanted: str, got: str) -> float:
    """Relative difference of what two adapters change of the base's output."""
    with torch.no_grad(), model.disable_adapter():
        base = model(IDS)
    change = output(model, wanted) - base
    return ((output(model, got) - base - change).norm() / change.norm()).item()


@pytest.fixture
def _same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """DARE's masks depend on the shape only, not on the order of draws or on which way a matrix lies."""
    real = torch.bernoulli

    def bernoulli(tensor: Tensor) -> Tensor:
        flat = tensor.flatten(1) if tensor.shape[0] > 1 else tensor[0]
        if flat.shape[0] > flat.shape[1]:
            return bernoulli(flat.t().contiguous()).t().reshape(tensor.shape)
        return real(flat, generator=torch.Generator().manual_seed(tensor.numel())).reshape(tensor.shape)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)


@since("0.19", "signs and decompositions count otherwise")
@pytest.mark.usefixtures("_same_masks")
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -1.3], [0.0, 2.0]])
@pytest.mark.parametrize("kind", COMBINATION_TYPES)
def test_same_deltas_and_config(kind: str, weights: list[float]) -> None:
    theirs, mine = pair({}, {"lora_alpha": 10})
    arguments: dict[str, Any] = {"density": 0.5} if kind in PRUNING else {}
    if kind.endswith("svd"):
        arguments["svd_rank"] = 3
    for model in (theirs, mine):
        model.add_weighted_adapter(["p", "q"], weights, "m", combination_type=kind, **arguments)
    for mine_delta, their_delta in zip(deltas(mine, "m"), deltas(theirs, "m"), strict=True):
        torch.testing.assert_close(mine_delta, their_delta, rtol=0, atol=5e-6)
    torch.testing.assert_close(output(mine, "m"), output(theirs, "m"), rtol=1e-5, atol=2e-5)
    one, two = theirs.peft_config["m"].to_dict(), mine.peft_config["m"].to_dict()
    assert same_settings(two, {key: one[key] for key in one if key in two})


@since("0.19", "signs and decompositions count otherwise")
@pytest.mark.parametrize("kind", ["linear", "cat", "ties", "magnitude_prune"])
def test_same_factors(kind: str) -> None:
    """Where no SVD is involved the very factors are PEFT's, not just their product."""
    theirs, mine = pair({}, {"lora_alpha": 10})
    for model in (theirs, mine):
        model.add_weighted_adapter(["p", "q"], [0.7, -1.3], "m", combination_type=kind, density=0.5)
    one, two = theirs.state_dict(), mine.state_dict()
    keys = [key for key in one if "lora_" in key and "m" in key.split(".lora_")[1].split(".")]
    assert len(keys) == 6
    for key in keys:
        torch.testing.assert_close(two[key], one[key], rtol=1e-6, atol=1e-7)


@since("0.21", "another majority")
@pytest.mark.parametrize("method", ["total", "frequency"])
def test_same_majority(method: str) -> None:
    theirs, mine = pair({}, {}, {})
    for model in (theirs, mine):
        model.add_weighted_adapter(
            ["p", "q", "s"], [1.0, 0.5, -2.0], "m", "ties_svd", density=0.6, majority_sign_method=method
        )
    for mine_delta, their_delta in zip(deltas(mine, "m"), deltas(theirs, "m"), strict=True):
        torch.testing.assert_close(mine_delta, their_delta, rtol=0, atol=5e-6)


IDENTITY = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["lin", "conv"]},
    "modules_to_save": {"modules_to_save": ["head"]},
}


@pytest.mark.parametrize("name", IDENTITY)
def test_u6_identity_combination(name: str) -> None:
    theirs, mine = pair(IDENTITY[name])
    for model in (theirs, mine):
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter.data += 0.5
        model.add_weighted_adapter(["p"], [1.0], "m")
    assert off(theirs, "p", "m") > 0.05
    assert off(mine, "p", "m") < 1e-5


def test_u7_source_initialised_by_pissa() -> None:
    theirs, mine = pair({"init_lora_weights": "pissa", "target_modules": ["lin"]})
    changes = []
    for model in (theirs, mine):
        base = model.base_model.model.lin.base_layer.weight
        before = base.detach().clone()
        model.add_weighted_adapter(["p"], [1.0], "m")
        changes.append(((base - before).norm() / before.norm()).item())
    assert changes[0] > 0.1
    assert changes[1] == 0


def test_u8_linear_has_cross_terms_in_both_and_cat_does_not() -> None:
    errors = []
    for model in pair({}, {}):
        for kind in ("linear", "cat"):
            model.add_weighted_adapter(["p", "q"], [1.0, 1.0], kind, combination_type=kind)
            exact = [p + q for p, q in zip(deltas(model, "p"), deltas(model, "q"))]
            errors.append(max((d - e).norm() / e.norm() for d, e in zip(deltas(model, kind), exact)).item())
    assert errors[0] == pytest.approx(errors[2], rel=1e-5)
    assert errors[0] > 0.5
    assert errors[3] < 1e-6


def test_u9_silence_about_bad_arguments() -> None:
    theirs, mine = pair({}, {})
    theirs.add_weighted_adapter(["p", "q"], [1.0], "m", combination_type="cat")  # the second is dropped
    before = deltas(theirs, "q")
    theirs.add_weighted_adapter(["p"], [9.0], "q")  # does nothing
    assert all(torch.equal(one, two) for one, two in zip(before, deltas(theirs, "q")))
    with pytest.raises(ValueError, match="2 adapters and 1 weights"):
        mine.add_weighted_adapter(["p", "q"], [1.0], "m", combination_type="cat")
    with pytest.raises(ValueError, match="already exists"):
        mine.add_weighted_adapter(["p"], [9.0], "q")


def test_u10_failure_leaves_half_an_adapter_in_peft() -> None:
    theirs, mine = pair({}, {})
    with pytest.raises(TypeError):
        theirs.add_weighted_adapter(["p", "q"], [1.0, 1.0], "m", combination_type="ties")
    assert "m" in theirs.peft_config
    with pytest.raises(ValueError, match="density"):
        mine.add_weighted_adapter(["p", "q"], [1.0, 1.0], "m", combination_type="ties")
    assert "m" not in mine.peft_config


def test_svd_on_conv1d_fails_in_peft() -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(8, 8, 3)

    for library in (peft, ours):
        config = library.LoraConfig(r=4, target_modules=["conv"], init_lora_weights=False)
        model = library.get_peft_model(Conv(), config, adapter_name="p")
        model.add_adapter("q", config)
        if library is peft:
            with pytest.raises(RuntimeError):
                model.add_weighted_adapter(["p", "q"], [1.0, 1.0], "m", svd_rank=8)
        else:
            model.add_weighted_adapter(["p", "q"], [1.0, 1.0], "m", svd_rank=8)
            (p,), (q,), (m,) = (deltas(model, name) for name in "pqm")
            torch.testing.assert_close(m, p + q, rtol=0, atol=1e-6)
