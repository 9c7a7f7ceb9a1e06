"""Helpers on adapted models."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_engine import LoftQConfig, LoraConfig, get_peft_model
from qlora_engine.helpers import (
    DoraCaching,
    KappaTuneSelector,
    check_if_peft_model,
    disable_input_dtype_casting,
    find_kappa_target_modules,
    rescale_adapter_scale,
    update_signature,
)
from qlora_engine.lora_layer import LoraLayer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(16, 32)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.two = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        """What it does."""
        return self.two(self.conv(torch.relu(self.one(x))))


def make(**options: Any) -> Any:
    config = LoraConfig(**{"target_modules": ["one", "conv"], "init_lora_weights": False, **options})
    return get_peft_model(Net(), config).eval()


X = torch.randn(2, 4, 16)


def scalings(model: nn.Module) -> list[dict[str, float]]:
    return [m.scaling for m in model.modules() if isinstance(m, LoraLayer)]


def test_check_if_peft_model(tmp_path: Path) -> None:
    assert not check_if_peft_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"foo": "bar"}')
    assert not check_if_peft_model(tmp_path)
    model = make()
    model.save_pretrained(tmp_path / "good")
    assert check_if_peft_model(tmp_path / "good")
    assert check_if_peft_model(str(tmp_path / "good"))


@pytest.mark.parametrize("use_dora", [False, True])
def test_rescale_adapter_scale_and_back(use_dora: bool) -> None:
    model = make(use_dora=use_dora)
    expected, before = model(X), scalings(model)
    with rescale_adapter_scale(model, 0.5):
        assert [s["default"] for s in scalings(model)] == [0.5 * s["default"] for s in before]
        assert not torch.allclose(model(X), expected)
    assert scalings(model) == before
    assert torch.equal(model(X), expected)
    with pytest.raises(KeyError), rescale_adapter_scale(model, 3):
        raise KeyError
    assert scalings(model) == before
    if not use_dora:  # DoRA's magnitudes stay
        with rescale_adapter_scale(model, 0.0), model.disable_adapter():
            base = model(X)
        with rescale_adapter_scale(model, 0.0):
            torch.testing.assert_close(model(X), base)


def test_rescale_adapter_scale_refuses() -> None:
    with pytest.raises(TypeError, match="Argument multiplier should be of type float, got <class 'str'>"):
        rescale_adapter_scale(make(), "1").__enter__()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scaling is only supported for models with `LoraLayer`s"):
        rescale_adapter_scale(Net(), 1.0).__enter__()


def test_disable_input_dtype_casting_and_back() -> None:
    model = make()
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    context = disable_input_dtype_casting(model)
    context.__enter__()
    assert not any(layer.cast_input_dtype_enabled for layer in layers)
    assert not context.__exit__(KeyError, KeyError(), None)  # an error in the block is not swallowed
    assert all(layer.cast_input_dtype_enabled for layer in layers)
    with disable_input_dtype_casting(model, active=False):
        assert all(layer.cast_input_dtype_enabled for layer in layers)


def norms_computed(monkeypatch: pytest.MonkeyPatch, model: Any, run: Any) -> int:
    from qlora_engine import dora, lora_layer

    calls = []
    real = dora.adapted_norm
    monkeypatch.setattr(
        lora_layer, "adapted_norm", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs)
    )
    run()
    monkeypatch.undo()
    return len(calls)


def test_dora_norms_are_kept_in_evaluation_until_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(use_dora=True)
    expected = model(X)

    def computed(run: Any = lambda: None) -> int:
        run()
        return norms_computed(monkeypatch, model, lambda: model(X))

    assert computed() == 0
    layer = model.base_model.model.one

    def change_in_place() -> None:
        with torch.no_grad():
            layer.lora_A["default"].weight.mul_(2)

    def replace_data() -> None:
        layer.lora_A["default"].weight.data = layer.lora_A["default"].weight.data / 2

    def change_base() -> None:
        with torch.no_grad():
            layer.base_layer.weight.add_(0)

    assert computed(change_in_place) == 1
    assert not torch.equal(model(X), expected)
    assert computed(replace_data) == 1
    assert computed(change_base) == 1
    torch.testing.assert_close(model(X), expected)
    with DoraCaching(False):
        assert computed() == 2
    model.train()
    assert computed() == 2
    model.eval()
    assert computed() == 2
    assert computed() == 0


def test_dora_caching_is_seen_as_in_peft() -> None:
    model = make(use_dora=True)
    caches = [m._dora_cache for m in model.modules() if hasattr(m, "_dora_cache")]
    assert len(caches) == 2
    expected = model(X)
    assert not any(caches)
    with DoraCaching():
        assert torch.equal(model(X), expected)
        assert all(caches)
        with DoraCaching(False):
            assert torch.equal(model(X), expected)
    assert torch.equal(model(X), expected)
    assert not any(caches)
    DoraCaching()(enabled=True)
    try:
        model(X)
        assert all(caches)
        model.train()
        assert not any(caches)
    finally:
        DoraCaching()(enabled=False)
    model.eval()(X)
    assert not any(caches)


def test_update_signature() -> None:
    model = make()
    expected = model(X)
    assert set(inspect.signature(model.forward).parameters) == {"args", "kwargs"}
    update_signature(model, "forward")
    assert set(inspect.signature(model.forward).parameters) == {"x"}
    assert model.forward.__doc__ == "What it does."
    assert model.forward.__annotations__.keys() == {"x", "return"}
    assert torch.equal(model(X), expected)
    with pytest.raises(ValueError, match="method both is not supported please choose one of"):
        update_signature(model, "both")


class Conditioned(nn.Module):
    """Linear layers and a stack of experts whose condition numbers are known."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.middle, self.bad = (nn.Linear(8, 8) for _ in range(3))
        self.mlp = nn.Module()
        self.mlp.gate_up_proj = nn.Parameter(torch.stack([torch.eye(4), torch.eye(4)]))
        worse = torch.diag(torch.tensor([9.0, 1, 1, 1]))
        self.mlp.down_proj = nn.Parameter(torch.stack([torch.eye(4), worse]))
        for layer, kappa in ((self.good, 1.0), (self.middle, 10.0), (self.bad, 100.0)):
            layer.weight.data = torch.diag(torch.tensor([kappa, *[1.0] * 7]))


def test_kappa_ranks_by_condition_number() -> None:
    selector = KappaTuneSelector(Conditioned(), show_progress=False)
    assert selector.get_best_targets() == ["good", "middle", "bad"]
    assert selector.get_best_targets(num_modules=1) == ["good"]
    assert selector.get_best_targets(threshold=20.0) == ["good", "middle"]
    assert selector.get_best_targets(top_p=0.1) == ["good"]
    assert selector.get_best_target_parameters() == ["mlp.gate_up_proj", "mlp.down_proj"]
    assert selector.get_best_target_parameters(threshold=2.0) == ["mlp.gate_up_proj"]
    small = KappaTuneSelector(Conditioned(), max_dim_size_to_analyze=7, show_progress=False)
    assert small.get_best_targets() == []
    assert small.get_best_target_parameters(num_modules=1) == ["mlp.gate_up_proj"]


def test_find_kappa_target_modules() -> None:
    found = find_kappa_target_modules(Conditioned(), top_p=0.7, show_progress=False)
    assert found == {"target_modules": ["good", "middle"], "target_parameters": ["mlp.gate_up_proj"]}
    assert find_kappa_target_modules(Net(), show_progress=False)["target_parameters"] is None


def test_kappa_reads_quantised_layers() -> None:
    loftq = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=8)}
    config = LoraConfig(r=2, target_modules=["good", "middle", "bad"], **loftq)
    model = get_peft_model(Conditioned(), config).unload()
    selector = KappaTuneSelector(model, show_progress=False)
    assert set(selector.get_best_targets()) == {"good", "middle", "bad"}
