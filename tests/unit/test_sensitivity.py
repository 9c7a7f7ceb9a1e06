from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_engine.allocate import measure
from qlora_engine.calibration import calibrate
from qlora_engine.errors import InputError
from qlora_engine.sensitivity import output_sensitivity
from quant import QuantSpec


def windows(count: int, length: int = 40) -> list[Tensor]:
    return [torch.randint(3, 380, (length,)) for _ in range(count)]


def test_head_has_the_fisher_information_of_its_logits(make_model: Callable[..., Any]) -> None:
    model = make_model("llama", vocab_size=8)
    texts = [torch.randint(3, 8, (40,)) for _ in range(60)]
    found = output_sensitivity(model, texts, ["lm_head"], batch_size=20)["lm_head"]
    with torch.no_grad():
        p = model(torch.stack(texts)).logits.softmax(-1).reshape(-1, 8)
    exact = (p * (1 - p)).mean(0)
    # 2400 labels among 8: sqrt(1 / 2400) / |exact| = 6 per cent is expected.
    assert float((found - exact).norm() / exact.norm()) < 0.15
    assert float(found.sum()) == pytest.approx(float(exact.sum()), rel=0.03)


def test_measure_predicts_the_loss(make_model: Callable[..., Any]) -> None:
    """KL of a small random change of the last block's down_proj, whose outputs touch one token each."""
    model, texts, name = make_model("llama"), windows(40), "model.layers.1.mlp.down_proj"
    model.lm_head.weight.data *= 20
    sensitivity = output_sensitivity(model, texts, [name], batch_size=20)[name]
    hessian = calibrate(model, texts, [name])[name]
    layer = model.get_submodule(name)
    weight = layer.weight.detach().clone()
    change = 0.05 * weight.std() * torch.randn(20, *weight.shape)
    predicted = [
        measure(weight, [QuantSpec()], hessian, sensitivity=sensitivity, approximate=lambda w, _, e=e: w + e)[
            0
        ].error
        for e in change
    ]
    ids, measured = torch.stack(texts), []
    with torch.no_grad():
        before = model(ids).logits.double().log_softmax(-1)
        for e in change:
            layer.weight.copy_(weight + e)
            after = model(ids).logits.double().log_softmax(-1)
            measured.append(float((before.exp() * (before - after)).sum(-1).mean()))
    assert sum(predicted) == pytest.approx(sum(measured), rel=0.15)


def test_without_logits_it_is_the_squared_error_of_the_output() -> None:
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 5))
    ids = [torch.randint(0, 30, (500,)) for _ in range(4)]
    found = output_sensitivity(model, ids)
    torch.testing.assert_close(found["1"], torch.full((5,), 2.0), rtol=0.15, atol=0)
    weight, hessian = model[1].weight.detach(), calibrate(model, ids)["1"]
    (half,) = measure(weight, [QuantSpec()], hessian, sensitivity=found["1"], approximate=lambda w, _: w / 2)
    outputs = model[0](torch.cat(ids)).detach() @ weight.T / 2
    assert half.error == pytest.approx(float(outputs.square().sum(1).mean()), rel=0.15)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "qwen3_moe"])
def test_every_layer_has_one(make_model: Callable[..., Any], name: str) -> None:
    model = make_model(name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = output_sensitivity(model, windows(2))
    reached = calibrate(model, windows(2), min_tokens=0)
    assert set(found) == set(reached.layers)
    for layer, values in found.items():
        if "pooler" in layer:  # BERT's last hidden state does not depend on it
            continue
        if "expert" not in layer:
            assert float(values.sum()) > 0, layer
            weight = model.get_submodule(layer).weight
            assert values.shape == (weight.shape[1 if name == "gpt2" else 0],)
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_experts_by_the_tokens_they_get(make_model: Callable[..., Any]) -> None:
    model = make_model("mixtral")
    for layer in model.model.layers:  # every token goes to the same two experts
        layer.mlp.gate.weight.data.zero_()
    texts, fused = windows(2), "model.layers.1.mlp.experts"
    found, reached = output_sensitivity(model, texts), calibrate(model, texts)
    for expert in range(4):
        gate_up, down = found[f"{fused}.gate_up_proj.{expert}"], found[f"{fused}.down_proj.{expert}"]
        assert (gate_up.shape, down.shape) == ((2 * 96,), (64,))
        has_tokens = f"{fused}.down_proj.{expert}" in reached
        assert bool((down > 0).all()) == bool((gate_up > 0).any()) == has_tokens
    assert sum(f"{fused}.down_proj.{expert}" in reached for expert in range(4)) == 2


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "bert", "mixtral"])
def test_block_by_block_agrees_with_the_whole_model(
    make_checkpoint: Callable[..., Path], make_model: Callable[..., Any], name: str
) -> None:
    texts = windows(3)
    whole = output_sensitivity(make_model(name), texts)
    memory = output_sensitivity(make_model(name), texts, mode="blocks")
    disk = output_sensitivity(make_checkpoint(name, dtype=torch.float32, shard_size="60KB"), texts)
    assert set(whole) == set(memory) == set(disk)
    for layer, values in whole.items():
        torch.testing.assert_close(memory[layer], values, rtol=1e-3, atol=1e-4 * float(values.max()))
        torch.testing.assert_close(disk[layer], values, rtol=1e-3, atol=1e-4 * float(values.max()))


def test_blocks_and_what_stands_around_them(make_model: Callable[..., Any]) -> None:
    import transformers

    config = transformers.OPTConfig(
        vocab_size=384, hidden_size=64, ffn_dim=96, word_embed_proj_dim=32, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config).eval()
    names = ["model.decoder.project_in", "model.decoder.project_out", "lm_head", "model.decoder.layers.0.fc1"]
    texts = windows(2)
    whole, blocks = (output_sensitivity(model, texts, names, mode=mode) for mode in ("whole", "blocks"))
    for layer in names:
        assert float(whole[layer].min()) > 0
        torch.testing.assert_close(blocks[layer], whole[layer], rtol=1e-3, atol=0)


def test_a_folder_that_is_no_list_of_blocks(make_checkpoint: Callable[..., Path]) -> None:
    found = output_sensitivity(make_checkpoint("t5"), windows(1))
    assert float(found["decoder.block.0.layer.0.SelfAttention.q"].sum()) > 0
    with pytest.raises(InputError, match="cannot run this model block by block: an encoder with a decoder"):
        output_sensitivity(make_checkpoint("t5"), windows(1), mode="blocks")


def test_is_deterministic_and_seeded(make_model: Callable[..., Any]) -> None:
    model, texts, name = make_model("llama"), windows(2), "model.layers.0.mlp.up_proj"
    first = output_sensitivity(model, texts, [name])[name]
    assert torch.equal(first, output_sensitivity(model, texts, [name])[name])
    assert not torch.equal(first, output_sensitivity(model, texts, [name], seed=1)[name])


def test_refuses(make_model: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="no windows"):
        output_sensitivity(make_model("llama"), [])

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, ids: Tensor) -> dict[str, int]:
            return {"nothing": 1}

    with pytest.raises(InputError, match="a model that returns dict has neither logits nor a hidden state"):
        output_sensitivity(Odd(), windows(1))
