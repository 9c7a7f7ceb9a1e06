"""Replayed decoder layers: without a GPU a "graph" runs its function again into the same tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_engine import LoraConfig, get_peft_model
from qlora_engine.errors import InputError
from qlora_engine.training import graphs, recompute

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def capture_again(function: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
    kept = [tensor.clone() for tensor in function()]

    def replay() -> None:
        for old, new in zip(kept, function(), strict=True):
            old.copy_(new)

    return replay, kept


def capture() -> graphs.Capture:
    return graphs.capture_cuda(torch.device("cuda")) if DEVICE == "cuda" else capture_again


def adapted(make_model: Any, recomputed: int, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(
        make_model("llama"),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian", **changes),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    model.to(DEVICE).train()
    recompute.apply(model, recomputed)
    if recomputed:
        recompute.unwrapped(model).enable_input_require_grads()
    return model


def batches(count: int, length: int = 12, rows: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for step in range(count):
        ids = torch.randint(3, 300, (rows, length), generator=generator).to(DEVICE)
        # packed rows: the mask that is made of these differs from step to step
        cut = 3 + step % 5
        positions = torch.cat([torch.arange(cut), torch.arange(length - cut)]).expand(rows, -1).to(DEVICE)
        found.append({"input_ids": ids, "labels": ids, "position_ids": positions, "use_cache": False})
    return found


def train(model: Any, steps: list[dict[str, Tensor]], accumulate: int = 1) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for number, batch in enumerate(steps, 1):
        loss = model(**batch).loss
        loss.backward()
        losses.append(float(loss.detach()))
        if number % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("recomputed", [0, 1, 2])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_losses_are_those_without_graphs(make_model: Any, recomputed: int, accumulate: int) -> None:
    plain = adapted(make_model, recomputed)
    replayed = copy.deepcopy(plain)
    switched = graphs.GraphedLayers(replayed, capture)
    steps = batches(7)
    got = train(replayed, steps, accumulate)
    assert switched.failure is None
    assert switched.ready
    assert [layer.runs for layer in switched.layers] == [6, 6]  # all but the first step
    assert got == pytest.approx(train(plain, steps, accumulate), rel=1e-5)
    assert got[-1] != got[0]


def test_gradients_are_those_without_graphs(make_model: Any) -> None:
    plain = adapted(make_model, 1)
    replayed = copy.deepcopy(plain)
    graphs.GraphedLayers(replayed, capture)
    for model in (plain, replayed):
        for batch in batches(3):
            model(**batch).loss.backward()  # three steps' gradients add up
    for (name, p), (_, q) in zip(plain.named_parameters(), replayed.named_parameters(), strict=True):
        if p.requires_grad:
            assert p.grad is not None, name
            assert q.grad is not None, name
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-7)


def test_other_shapes_eval_and_no_grad_run_as_ever(make_model: Any) -> None:
    plain = adapted(make_model, 2)
    replayed = copy.deepcopy(plain)
    switched = graphs.GraphedLayers(replayed, capture)
    steps = batches(3) + batches(1, length=7) + batches(2)
    for batch in steps:
        losses = []
        for model in (plain, replayed):
            loss = model(**batch).loss
            loss.backward()
            losses.append(float(loss.detach()))
            model.eval()
            with torch.no_grad():
                losses.append(float(model(**batch).loss))
            model.train()
        assert losses[2:] == pytest.approx(losses[:2], rel=1e-5)
    assert [layer.runs for layer in switched.layers] == [4, 4]  # the first and the short one are not replayed


def test_lengths_that_change_every_step_are_never_captured(make_model: Any) -> None:
    model = adapted(make_model, 0)
    switched = graphs.GraphedLayers(model, capture)
    train(model, [batches(1, length=length)[0] for length in (8, 9, 10, 11)])
    assert not switched.ready
    assert switched.failure is None


def test_disable_restores_forward_and_checkpointing(make_model: Any) -> None:
    model = adapted(make_model, 1)
    before = [
        (type(layer).forward, layer.gradient_checkpointing) for layer in recompute.decoder_layers(model)
    ]
    switched = graphs.GraphedLayers(model, capture)
    assert not any(layer.gradient_checkpointing for layer in recompute.decoder_layers(model))
    train(model, batches(3))
    switched.disable()
    layers = recompute.decoder_layers(model)
    assert [(type(layer).forward, layer.gradient_checkpointing) for layer in layers] == before
    assert not any("forward" in layer.__dict__ for layer in layers)


def test_a_second_forward_before_backward_is_refused(make_model: Any) -> None:
    model = adapted(make_model, 1)
    graphs.GraphedLayers(model, capture)
    steps = batches(4)
    train(model, steps[:2])
    first = model(**steps[2]).loss
    model(**steps[3])
    with pytest.raises(RuntimeError, match=r"ran forward again before its backward|modified by an inplace"):
        first.backward()


def test_a_moved_parameter_is_refused(make_model: Any) -> None:
    model = adapted(make_model, 1)
    switched = graphs.GraphedLayers(model, capture)
    steps = batches(5)
    train(model, steps[:2])
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.data = parameter.data.clone()
    with pytest.raises(RuntimeError, match="has moved since"):
        model(**steps[2])
    switched.forget()
    train(model, steps[3:])
    assert switched.ready


def test_layers_that_cannot_be_captured_run_as_ever_and_say_why(make_model: Any) -> None:
    def refuse(function: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    plain = adapted(make_model, 2)
    model = copy.deepcopy(plain)
    switched = graphs.GraphedLayers(model, lambda: refuse)
    steps = batches(3)
    assert train(model, steps) == pytest.approx(train(plain, steps), rel=1e-6)
    assert (
        switched.failure == "the layers cannot be captured: operation not permitted when stream is capturing"
    )


def test_what_cannot_be_replayed_is_known_before(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        assert graphs.reason_against(adapted(make_model, 0)) == "CUDA graphs need a CUDA GPU"
    found = graphs._structural_reason(adapted(make_model, 0, lora_dropout=0.1))
    assert found is not None
    assert "dropout in" in found
    assert graphs._structural_reason(adapted(make_model, 0)) is None
    assert "no decoder layers" in str(graphs._structural_reason(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize("recompute_layers", ["none", "1"])
def test_a_run_with_graphs_has_the_losses_of_one_without(
    make_model: Any,
    make_tokenizer: Any,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    recompute_layers: str,
) -> None:
    from qlora_engine.training.run import finetune
    from qlora_engine.training.settings import Settings

    if DEVICE == "cpu":
        monkeypatch.setattr(graphs, "capture_cuda", lambda device: capture())
        monkeypatch.setattr(graphs, "reason_against", graphs._structural_reason)
    data = tmp_path / "rows.txt"
    data.write_text("\n\n".join(f"row {i} says {'so ' * (i % 7)}" for i in range(60)))
    curves = []
    for wanted in ("on", "off"):
        settings = Settings(
            data=data,
            output=tmp_path / wanted,
            max_steps=6,
            evaluate_every=3,
            batch_size=2,
            accumulate=2,
            max_length=64,
            precision="fp32",
            recompute=recompute_layers,
            cuda_graphs=wanted,
        )
        outcome = finetune(adapted(make_model, 0), make_tokenizer(), settings)
        curves.append([*outcome.losses, *outcome.evaluations])
        assert any("replayed from CUDA graphs" in note for note in outcome.notes) == (wanted == "on")
    for with_graphs, without in zip(*curves, strict=True):
        assert with_graphs == pytest.approx(without, rel=1e-4)


def test_graphs_that_cannot_be_are_refused_only_when_asked_for(make_model: Any) -> None:
    model = adapted(make_model, 0)
    assert graphs.enable(model, "auto", "of a reason") is None
    assert graphs.enable(model, "off") is None
    with pytest.raises(InputError, match=r"cuda_graphs='on': of a reason; allowed here: auto, off"):
        graphs.enable(model, "on", "of a reason")


@pytest.mark.gpu
@pytest.mark.parametrize("recomputed", [0, 1, 2])
def test_fused_layers_in_graphs_on_a_gpu(recomputed: int, make_model: Any) -> None:
    """Quantised layers with their kernels under autocast: the gradients of the same layers without graphs."""
    from qlora_engine import LoftQConfig, fused_blocks

    config = LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=4)
    )
    plain = get_peft_model(make_model("qwen3", dtype=torch.bfloat16), config).cuda().train()
    recompute.apply(plain, recomputed)
    if recomputed:
        recompute.unwrapped(plain).enable_input_require_grads()
    fused_blocks.enable(plain)
    replayed = copy.deepcopy(plain)
    switched = graphs.enable(replayed, "on")
    assert switched is not None
    for batch in batches(4):
        found = []
        for model in (plain, replayed):
            model.zero_grad()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        assert len(found[0]) == len(found[1]) == 1 + 2 * 7 * 2
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))
    assert switched.failure is None
    assert switched.ready
