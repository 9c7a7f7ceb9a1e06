"""Hot-swapping beside PEFT's: equal, except that PEFT never matches a pattern (U12) nor swaps DoRA."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qlora_engine as ours
from qlora_engine.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from tests.parity.releases import since

peft = pytest.importorskip("peft")
theirs = pytest.importorskip("peft.utils.hotswap")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(12, 16)
        self.two = nn.Linear(16, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))


X = torch.randn(3, 12)


def saved(folder: Path, seed: int, **options: Any) -> Path:
    """An adapter written by PEFT."""
    torch.manual_seed(seed)
    options = {"target_modules": ["one", "two"], "init_lora_weights": False, **options}
    peft.get_peft_model(Net(), peft.LoraConfig(**options)).save_pretrained(folder)
    return folder


def load(folder: Path) -> tuple[Any, Any]:
    torch.manual_seed(9)
    base = Net()
    return tuple(
        library.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval() for library in (peft, ours)
    )  # type: ignore[return-value]


@since("0.20", "a smaller adapter leaves something of the larger one")
@pytest.mark.parametrize("target_rank", [None, 8])
@pytest.mark.parametrize("ranks", [(4, 4), (8, 2), (2, 8)])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.filterwarnings("ignore:.*has no bias")
def test_same_weights_and_scalings(
    options: dict[str, Any], ranks: tuple[int, int], target_rank: int | None, tmp_path: Path
) -> None:
    first = saved(tmp_path / "first", 1, r=ranks[0], lora_alpha=5, **options)
    second = saved(tmp_path / "second", 2, r=ranks[1], lora_alpha=3, **options)
    one, two = load(first)
    if target_rank is not None:
        theirs.prepare_model_for_compiled_hotswap(one, target_rank=target_rank)
        prepare_model_for_compiled_hotswap(two, target_rank=target_rank)
    theirs.hotswap_adapter(one, second, "default")
    hotswap_adapter(two, second, "default")
    expected, got = one.state_dict(), two.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    for name in ("one", "two"):
        a, b = (float(m.base_model.model.get_submodule(name).scaling["default"]) for m in (one, two))
        assert a == b
    torch.testing.assert_close(two(X), one(X))


def test_u12_patterns_are_honoured(tmp_path: Path) -> None:
    options = {"r": 2, "lora_alpha": 2, "alpha_pattern": {"one": 16}}
    first, second = saved(tmp_path / "first", 1, **options), saved(tmp_path / "second", 2, **options)
    one, two = load(first)
    theirs.hotswap_adapter(one, second, "default")
    hotswap_adapter(two, second, "default")
    assert one.base_model.model.one.scaling["default"] == 1.0  # should be 8
    assert two.base_model.model.one.scaling["default"] == 8.0
    expected = load(second)[0](X)
    assert not torch.allclose(one(X), expected, atol=0.1)
    torch.testing.assert_close(two(X), expected)


def test_dora_can_be_swapped_and_in_peft_not(tmp_path: Path) -> None:
    first, second = (saved(tmp_path / str(seed), seed, use_dora=True) for seed in (1, 2))
    one, two = load(first)
    with pytest.raises((AttributeError, KeyError)):
        theirs.hotswap_adapter(one, second, "default")
    hotswap_adapter(two, second, "default")
    torch.testing.assert_close(two(X), load(second)[0](X), rtol=1e-5, atol=1e-5)
