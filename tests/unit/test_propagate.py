"""Layers solved one block after another, behind what the blocks before have become."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_engine import LoftQConfig, LoraConfig, error_report, get_peft_model
from qlora_engine.calibration import calibrate
from qlora_engine.errors import InputError
from qlora_engine.propagate import propagate
from qlora_engine.rounding import drifted_target


def token_windows(count: int = 12, length: int = 64, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 384, (length,), generator=generator) for _ in range(count)]


def adapt(model: Any, **options: Any) -> Any:
    settings = LoftQConfig(loftq_bits=2, calibration=token_windows(), method="qera", **options)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="loftq", loftq_config=settings)
    return get_peft_model(model, config)


@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
def test_the_target_is_the_least_squares_solution(blend: float) -> None:
    x = torch.randn(500, 12, dtype=torch.float64)
    y = x + 0.3 * torch.randn(500, 12, dtype=torch.float64) + 0.1 * x.roll(1, 1)
    W = torch.randn(5, 12, dtype=torch.float64)
    wanted = ((1 - blend) * y + blend * x) @ W.T
    expected = torch.linalg.lstsq(y, wanted).solution.T
    H, cross = (y.T @ y / 500).float(), (y.T @ x / 500).float()
    V = drifted_target(W.float(), H, cross, blend=blend, damping=0)
    torch.testing.assert_close(V.double(), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(drifted_target(W.float(), H, H, blend=blend), W.float())
    damped = drifted_target(W.float(), H, cross, blend=blend, damping=10.0)
    assert (damped - W).norm() <= (V - W).norm()


def test_the_target_refuses_what_does_not_fit() -> None:
    W, H = torch.randn(3, 4), torch.eye(4)
    with pytest.raises(ValueError, match=r"expected \(4, 4\) twice"):
        drifted_target(W, H, torch.eye(5))
    with pytest.raises(ValueError, match=r"blend 2 is not in \[0, 1\]"):
        drifted_target(W, H, H, blend=2)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_targets_and_moments(make_model: Callable[..., Any], name: str) -> None:
    model, plain = make_model(name), make_model(name)
    known = calibrate(make_model(name), token_windows())
    solved: dict[str, Tensor] = {}

    def solve(layer: str, weight: Tensor, hessian: Tensor) -> Tensor:
        assert hessian.shape == (weight.shape[1],) * 2
        solved[layer] = weight
        return weight + 0.2 * weight.std() * torch.randn(weight.shape)

    found = propagate(model, token_windows(), list(known.layers), solve)
    assert set(found.layers) == set(known.layers) == set(solved)
    for layer in known.layers:
        now, before = model.get_submodule(layer).weight, plain.get_submodule(layer).weight
        kept = now.T if name == "gpt2" else now
        assert torch.equal(kept, solved[layer])  # the model holds what is to be solved for
        if ".0." in layer:  # nothing is quantised before the first block
            assert torch.equal(now, before)
            torch.testing.assert_close(found[layer], known[layer], rtol=1e-4, atol=1e-6)
        else:
            assert not torch.equal(now, before)
            assert (now - before).norm() < before.norm()
            assert not torch.allclose(found[layer], known[layer], rtol=1e-3)
    rest = [n for n, p in plain.named_parameters() if n.removesuffix(".weight") not in known.layers]
    assert all(torch.equal(model.get_parameter(n), plain.get_parameter(n)) for n in rest)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "qwen3_moe"])
def test_get_peft_model_with_propagate(make_model: Callable[..., Any], name: str) -> None:
    ids = torch.stack(token_windows(4, seed=7))
    errors = []
    with torch.no_grad():
        want = make_model(name)(input_ids=ids)[0]
        for propagated in (False, True):
            adapted = adapt(make_model(name), propagate=propagated)
            errors.append(float((adapted(input_ids=ids)[0] - want).norm() / want.norm()))
            reached = [layer for layer in error_report(adapted) if layer.name != "pooler.dense"]
            assert all(layer.output_error is not None for layer in reached)
    assert errors[0] != errors[1]
    assert errors[1] < 1.03 * errors[0]


def test_an_encoder_decoder_is_refused(make_model: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="propagate: cannot run this model block by block"):
        propagate(
            make_model("t5"), token_windows(), ["encoder.block.0.layer.0.SelfAttention.q"], lambda *_: _[1]
        )
