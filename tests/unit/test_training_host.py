"""Embeddings and layer inputs that wait on the host: same outputs, same gradients, and they do stay there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qlora_engine import LoftQConfig, LoraConfig, get_peft_model
from qlora_engine.errors import InputError
from qlora_engine.training import host, recompute


def adapted(model: Any, dropout: float = 0.0) -> Any:
    config = LoraConfig(
        r=4,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights="loftq",
        loftq_config=LoftQConfig(loftq_bits=4),
    )
    return get_peft_model(model, config)


def test_parse_offload() -> None:
    assert host.parse_offload(None) == host.parse_offload("none") == ()
    assert host.parse_offload("embedding, activations") == ("embedding", "activations")
    with pytest.raises(InputError, match="offload='disk'; allowed: none, embedding, activations"):
        host.parse_offload("embedding,disk")


def test_embedding_stays_on_the_host(make_model: Any) -> None:
    model = make_model("llama").requires_grad_(False)
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        want = model(input_ids=ids).logits
    table = model.get_input_embeddings().weight
    parameters = sum(p.numel() for p in model.parameters())
    assert host.embedding_to_host(model) == table.nbytes
    assert host.embedding_to_host(model) == table.nbytes  # once is enough
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, want)
    assert sum(p.numel() for p in model.parameters()) == parameters - table.numel()
    model.to("meta")  # as to a GPU: everything else goes
    assert all(p.is_meta for p in model.parameters())
    embedding = model.get_input_embeddings()
    assert torch.equal(embedding.weight, table)
    assert embedding(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, table.shape[1])


def test_scaled_embedding_keeps_its_scale() -> None:
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * self.embed_scale

    embedding = Scaled(11, 4)
    ids = torch.tensor([[1, 10]])
    torch.testing.assert_close(host.HostEmbedding(embedding)(ids), embedding(ids))


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("llama_tied", lambda m: None, "also the output head"),
        ("llama", lambda m: m.get_input_embeddings().weight.requires_grad_(True), "is trained"),
    ],
)
def test_embeddings_that_cannot_go(name: str, change: Any, why: str, make_model: Any) -> None:
    model = make_model(name).requires_grad_(False)
    change(model)
    with pytest.raises(InputError, match=why):
        host.embedding_to_host(model)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_layer_inputs_on_the_host_change_no_gradient(dropout: float, make_model: Any) -> None:
    model = adapted(make_model("llama"), dropout)
    ids = torch.arange(30).reshape(2, 15)

    def gradients(on_host: bool) -> list[torch.Tensor]:
        recompute.apply(model, 2)
        model.get_base_model().enable_input_require_grads()
        if on_host:
            host.activations_to_host(model)
        model.train()
        model.zero_grad()
        torch.manual_seed(3)
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    want, got = gradients(False), gradients(True)
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_only_the_input_is_kept(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What backward holds of a recomputed layer is a copy of its input on the host."""
    model = adapted(make_model("llama"))
    recompute.apply(model, 2)
    model.get_base_model().enable_input_require_grads()
    host.activations_to_host(model)
    model.train()
    ids = torch.arange(32).reshape(2, 16)
    saved: list[torch.Tensor] = []
    moved: list[torch.Tensor] = []
    real = host._to_host

    def to_host(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
        device, copy = real(tensor)
        assert not tensor.numel() or copy.data_ptr() != tensor.data_ptr()
        moved.append(copy)
        return device, copy

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor.detach()

    monkeypatch.setattr(host, "_to_host", to_host)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.get_base_model().model(input_ids=ids, use_cache=False)[0]
    base = model.get_base_model()
    shape = (2, 16, base.config.hidden_size)
    assert hidden.requires_grad
    assert [tensor.shape for tensor in moved if tensor.dim() > 1] == [shape] * len(
        recompute.decoder_layers(model)
    )
    # the final norm, which is not a layer, keeps its own input and what it made of it
    assert len([tensor for tensor in saved if tensor.shape == shape]) <= 3
    assert not any(tensor.shape[-1:] == (base.config.intermediate_size,) for tensor in saved + moved)


def test_the_plan_counts_no_inputs_on_the_gpu(make_model: Any) -> None:
    model = adapted(make_model("llama"))
    options: dict[str, Any] = {"batch_size": 2, "length": 64, "recompute": "full"}
    kept = recompute.plan(model, **options)
    on_host = recompute.plan(model, **options, inputs_on_host=True)
    width = model.get_base_model().config.hidden_size
    assert kept.activations - on_host.activations == kept.layers * 2 * 64 * width * 4
