"""The recompute budget: what is measured, what is chosen, and that gradients do not depend on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_engine.errors import InputError
from qlora_engine.training import recompute


@pytest.fixture
def model(make_model: Any) -> Any:
    from qlora_engine import LoftQConfig, LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights="loftq",
        loftq_config=LoftQConfig(loftq_bits=4),
    )
    return get_peft_model(make_model("llama"), config)


def planned(model: Any, **options: Any) -> recompute.MemoryPlan:
    return recompute.plan(model, batch_size=2, length=64, **options)


def test_activations_are_what_the_layers_save(model: Any) -> None:
    none, full = planned(model, recompute="none"), planned(model, recompute="full")
    assert none.layers == len(recompute.decoder_layers(model)) > 1
    assert none.recomputed == 0
    assert full.recomputed == none.layers
    # at the least what every product of a layer keeps: the inputs of seven Linears, float32, 128 tokens
    config = model.get_base_model().config
    inputs = 4 * 2 * 64 * (3 * config.hidden_size + config.intermediate_size)
    assert none.per_layer > inputs
    assert none.activations == pytest.approx(none.layers * none.per_layer, rel=1e-6)
    assert full.activations < none.activations
    measured = recompute.plan(model, batch_size=4, length=64, recompute="none")
    assert measured.per_layer == pytest.approx(2 * none.per_layer, rel=1e-6)


def test_auto_recomputes_as_few_layers_as_the_budget_needs(model: Any) -> None:
    totals = [planned(model, recompute=n).total for n in range(planned(model).layers + 1)]
    assert planned(model, recompute="auto", available=max(totals)).recomputed == 0
    for available in {*totals, max(totals) + 1}:
        chosen = planned(model, recompute="auto", available=available)
        assert chosen.total <= available
        assert all(total > available for total in totals[: chosen.recomputed])


def test_the_figures_are_those_of_the_model(model: Any) -> None:
    found = planned(model, recompute=1, optimizer_bytes=3, available=10**9, packed=torch.float32)
    tensors = [*model.parameters(), *model.buffers()]
    trained = [tensor for tensor in tensors if tensor.requires_grad]
    assert found.weights == sum(tensor.nbytes for tensor in tensors if not tensor.requires_grad)
    assert found.adapter == sum((4 + 4 + 3) * tensor.numel() for tensor in trained)
    assert planned(model).adapter == sum((4 + 4 + 8) * tensor.numel() for tensor in trained)  # AdamW's
    assert found.workspace == 4 * 64 * 96  # the largest quantised weight in float32
    assert found.mask > 0
    parts = (found.weights, found.adapter, found.activations, found.mask, found.loss, found.workspace)
    assert found.total == found.to_json()["total"] == sum(parts)
    shown = {line[:48].rstrip(): line.split()[-2] for line in found.lines()}
    assert shown["available"] == "0.93"
    assert "available" not in {line[:48].rstrip() for line in planned(model).lines()}
    assert planned(model).mask == 0


def test_the_head_s_dtype_is_the_logits(model: Any) -> None:
    head = model.get_base_model().lm_head
    whole = planned(model, loss_function="").loss
    head.to(torch.bfloat16)
    assert planned(model, loss_function="").loss != whole


def test_unwrapped_is_transformers_model(model: Any, make_model: Any) -> None:
    assert recompute.unwrapped(model) is model.get_base_model()
    plain = make_model("llama")
    assert recompute.unwrapped(plain) is plain


def test_too_small_a_budget_names_the_options_to_change(model: Any) -> None:
    with pytest.raises(InputError, match=r"--batch-size or --max-length"):
        planned(model, recompute="auto", available=1000)
    least = planned(model, recompute="full").total
    assert planned(model, recompute="auto", available=least).recomputed == planned(model).layers
    with pytest.raises(
        InputError, match=r"a step needs [1-9][\d.]+ MiB .* layer recomputed, [1-9][\d.]+ MiB"
    ):
        planned(model, recompute="auto", available=least - 1)
    with pytest.raises(InputError, match="allowed: 0 to"):
        planned(model, recompute=99)


def test_apply_checkpoints_the_last_layers_and_changes_no_gradient(model: Any) -> None:
    ids = torch.arange(30).reshape(2, 15)

    def gradients(count: int) -> list[torch.Tensor]:
        recompute.apply(model, count)
        flags = [bool(layer.gradient_checkpointing) for layer in recompute.decoder_layers(model)]
        assert flags == [False] * (len(flags) - count) + [True] * count
        if count:
            model.get_base_model().enable_input_require_grads()
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    want = gradients(0)
    for count in (1, 2):
        for a, b in zip(gradients(count), want, strict=True):
            torch.testing.assert_close(a, b)


def kept_by_attention(key_heads: int, mask: torch.Tensor | None) -> int:
    """Bytes, but for masks, that torch's attention of four heads keeps for backward: 100 tokens, float32."""
    q, k, v = (torch.randn(2, heads, 50, 16, requires_grad=True) for heads in (4, key_heads, key_heads))
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-2:] != (50, 50):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, enable_gqa=key_heads < 4
        )
    return sum(kept.values())


@pytest.mark.parametrize("of_a_layer", [False, True])
def test_masks_of_packed_rows_are_counted(of_a_layer: bool, make_model: Any) -> None:
    """One for all layers; where a model makes its own, one for each not recomputed and for one that is.

    Beside a mask, a layer keeps its two key heads and value heads repeated to four; torch 2.6 always does.
    """
    from qlora_engine import LoraConfig, get_peft_model

    base = make_model("llama")
    if of_a_layer:
        base.config.sliding_window = 64
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    each = 2 * 50 * 64 * 2  # rows of 50 tokens, each padded to 64 numbers of 16 bits

    def plan(count: int, packed: torch.dtype | None = torch.bfloat16) -> recompute.MemoryPlan:
        return recompute.plan(model, batch_size=2, length=50, recompute=count, packed=packed)

    assert plan(0, None).mask == 0
    assert not any("mask" in line for line in plan(0, None).lines())
    assert any("mask" in line for line in plan(0).lines())
    beside_a_mask = kept_by_attention(4, torch.ones(50, 50).tril().bool()) - kept_by_attention(2, None)
    assert beside_a_mask in (2 * 50 * (2 * 2 * 16 * 4), 2 * 50 * (2 * 2 * 16 * 4 + 4 * 4))
    for count in (0, 1, 2):
        assert plan(count).mask == each * ((2 - count + (count > 0)) if of_a_layer else 1)
        more = plan(count).activations - plan(count, None).activations
        assert more == beside_a_mask * (2 - count + (count > 0))
        assert plan(count).total - plan(count, None).total == plan(count).mask + more
        assert plan(count, torch.float32).mask == 2 * plan(count).mask


def test_measuring_leaves_nothing_behind(model: Any) -> None:
    """Outputs that autograd saves and hooks hand back as they are would keep all weights alive."""
    import gc
    import weakref

    layers = recompute.decoder_layers(model)
    planned(model)
    kept = [weakref.ref(parameter) for layer in layers for parameter in layer.parameters()]
    storages = [weakref.ref(buffer.untyped_storage()) for buffer in layers[0].buffers()]
    base = model.get_base_model()
    base.model.layers = torch.nn.ModuleList()  # the fixture holds the model itself
    del layers
    gc.collect()
    assert kept
    assert not any(ref() is not None for ref in kept + storages)


def test_experts_decoded_together_are_counted(make_model: Any) -> None:
    from qlora_engine import LoraConfig, get_peft_model, quantize_experts

    base = make_model("mixtral")
    if not hasattr(torch, "_grouped_mm") or not base._can_set_experts_implementation():
        pytest.skip("no grouped products here")
    quantize_experts(base, "nf4")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))

    def workspace() -> int:
        return recompute.plan(model, batch_size=1, length=32).workspace

    alone = workspace()
    base.set_experts_implementation("grouped_mm")
    assert alone == 2 * 96 * 64 * 4  # gate and up of one
    assert workspace() == 4 * alone
