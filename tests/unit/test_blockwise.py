from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_engine.blocks import NotSequential, find_blocks
from qlora_engine.blockwise import walk_blocks
from qlora_engine.errors import InputError
from qlora_engine.observe import Observer, find_targets

MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    # Layers of two kinds, each called with its own mask and rotary positions; window shorter than the texts.
    "gemma3": ("Gemma3TextConfig", "AutoModelForCausalLM", {"sliding_window": 8, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention"], "num_hidden_layers": 3}),
    "gpt_oss": ("GptOssConfig", "AutoModelForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4": ("Llama4TextConfig", "AutoModelForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 1,
        "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1, "attention_chunk_size": 16}),
    "opt": ("OPTConfig", "AutoModelForCausalLM", {"ffn_dim": 96, "word_embed_proj_dim": 32}),
    "mamba": ("MambaConfig", "AutoModelForCausalLM", {}),
}  # fmt: skip
SMALL = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def build(name: str, make_model: Callable[..., Any]) -> Any:
    if name not in MORE:
        return make_model(name)
    import transformers

    config_class, auto_class, arguments = MORE[name]
    config = getattr(transformers, config_class)(**{**SMALL, **arguments})
    model = getattr(transformers, auto_class).from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 3:  # Llama 4 and GPT-OSS start their experts at zero or with what memory held
            nn.init.normal_(parameter, std=0.02)
    return model


def windows(*lengths: int) -> list[Tensor]:
    return [torch.randint(3, 380, (n,)) for n in lengths]


def whole(model: Any, texts: list[Tensor], names: list[str] | None = None) -> dict[str, tuple[int, Tensor]]:
    """Tokens and H by layer from hooks on the whole model, a window at a time and nothing shared."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    with torch.no_grad(), Observer(find_targets(model, names), share=False) as observer:
        for ids in texts:
            observer.start()
            model(input_ids=ids[None])
    return {name: (group.moment.tokens, group.moment.mean()) for name, group in observer.finish().items()}


@pytest.mark.parametrize(
    "name",
    ["llama", "qwen3", "gpt2", "bert", "qwen3_moe", "mixtral", "gemma3", "gpt_oss", "llama4", "opt", "mamba"],
)
def test_block_by_block_equals_whole_model(make_model: Callable[..., Any], name: str) -> None:
    model, texts = build(name, make_model), windows(20, 20, 20, 13)
    expected = whole(copy.deepcopy(model), texts)
    found: dict[str, tuple[int, Tensor]] = {}
    for step in walk_blocks(model, texts, batch_size=2):
        found |= {n: (moment.tokens, moment.hessian) for n, moment in step.moments.items()}
        assert step.moments.keys() <= step.targets.keys()
    assert found.keys() == expected.keys()
    assert len(found) >= 6
    for layer, (tokens, hessian) in expected.items():
        assert found[layer][0] == tokens, layer
        torch.testing.assert_close(
            found[layer][1], hessian, rtol=1e-3, atol=1e-5 * float(hessian.abs().max())
        )


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "mixtral", "bert"])
def test_from_a_checkpoint_on_disk(
    make_checkpoint: Callable[..., Path], make_model: Callable[..., Any], name: str
) -> None:
    folder, texts = make_checkpoint(name, dtype=torch.float32, shard_size="60KB"), windows(20, 20, 20)
    expected = whole(make_model(name), texts)
    real: list[set[str]] = []
    found: dict[str, Tensor] = {}
    for step in walk_blocks(folder, texts):
        found |= step.hessians
        real.append({n for n, p in step.block.named_parameters() if p.is_meta})
    assert len(real) == (3 if name == "bert" else 2)  # BERT's pooler stands behind the blocks
    assert not any(real[:2])  # the block that is given is loaded
    assert found.keys() == expected.keys()
    for layer, (_, hessian) in expected.items():
        torch.testing.assert_close(found[layer], hessian, rtol=1e-3, atol=1e-5 * float(hessian.abs().max()))


def test_one_block_is_loaded_at_a_time(make_checkpoint: Callable[..., Path]) -> None:
    from qlora_engine.partial_model import PartialModel

    partial = PartialModel(make_checkpoint("llama"))
    for step in walk_blocks(partial, windows(8)):
        real = {n for n, p in partial.model.named_parameters() if not p.is_meta}
        assert real
        assert all(n.startswith(step.path) for n in real)
    assert all(p.is_meta for p in partial.model.parameters())


def test_layers_with_one_input_give_one_tensor(make_model: Callable[..., Any]) -> None:
    for step in walk_blocks(make_model("llama"), windows(10)):
        h = {name.rpartition(".")[2]: tensor for name, tensor in step.hessians.items()}
        assert h["q_proj"] is h["k_proj"] is h["v_proj"]
        assert h["gate_proj"] is h["up_proj"]
        assert len({id(t) for t in h.values()}) == 4
        assert h["down_proj"].shape == (96, 96)


def test_layers_around_the_blocks(make_model: Callable[..., Any]) -> None:
    model, texts = (
        build("opt", make_model),
        windows(20, 20, 9),
    )
    names = ["model.decoder.embed_tokens", "model.decoder.project_in", "model.decoder.project_out", "lm_head"]
    names += ["model.decoder.layers.1.fc2"]
    expected = whole(copy.deepcopy(model), texts, names)
    steps = list(walk_blocks(model, texts, names))
    assert [step.index for step in steps] == [-1, 1, 2]
    assert [set(step.hessians) for step in steps] == [set(names[:2]), {names[4]}, set(names[2:4])]
    for step in steps:
        for layer, hessian in step.hessians.items():
            assert step.moments[layer].tokens == 49
            torch.testing.assert_close(hessian, expected[layer][1], rtol=1e-3, atol=1e-6)


def noisy(step: Any) -> None:
    for name, target in step.targets.items():
        weight = target.weight
        assert weight is not None
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        step.replace(name, weight + 0.3 * weight.std() * torch.randn(weight.shape, generator=generator))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("inputs", ["replaced", "both"])
def test_inputs_behind_replaced_blocks(make_model: Callable[..., Any], name: str, inputs: Any) -> None:
    texts = windows(20, 20, 11)
    expected = whole(make_model(name), texts)
    model = make_model(name)
    finished = make_model(name)  # will be replaced up to the block in question
    for step in walk_blocks(model, texts, inputs=inputs):
        drifted = whole(finished, texts)
        for layer, hessian in step.hessians.items():
            reference = (drifted if inputs == "replaced" else expected)[layer][1]
            torch.testing.assert_close(hessian, reference, rtol=1e-3, atol=1e-6)
        if inputs == "both":
            for layer, moment in step.replaced.items():
                torch.testing.assert_close(moment.hessian, drifted[layer][1], rtol=1e-3, atol=1e-6)
            assert step.replaced.keys() == step.cross.keys() == step.hessians.keys()
        noisy(step)
        finished.load_state_dict(model.state_dict())
    moved = max(float((drifted[n][1] - expected[n][1]).abs().max()) for n in step.hessians)
    assert moved > 1e-3  # the replacement did reach the last block


def test_cross_moment_is_between_the_two_streams(make_model: Callable[..., Any]) -> None:
    texts, model = windows(20, 20), make_model("llama")
    layer = "model.layers.1.mlp.down_proj"

    def inputs_of(any_model: Any) -> Tensor:
        caught: list[Tensor] = []
        hook = any_model.get_submodule(layer).register_forward_pre_hook(lambda _, a: caught.append(a[0]))
        with torch.no_grad():
            any_model(torch.stack(texts))
        hook.remove()
        return caught[0].reshape(-1, 96).double()

    x, cross = inputs_of(model), None
    for step in walk_blocks(model, texts, inputs="both"):
        if layer in step.cross:
            cross = step.cross[layer]
        else:
            noisy(step)
    assert cross is not None
    y = inputs_of(model)
    torch.testing.assert_close(cross.double(), y.T @ x / 40, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(cross, cross.T, atol=1e-4)


def test_a_block_may_be_given_other_modules(make_checkpoint: Callable[..., Path]) -> None:
    class Half(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) / 2

    folder, texts = make_checkpoint("llama"), windows(12)
    plain = [s.hessians["model.layers.1.mlp.up_proj"] for s in walk_blocks(folder, texts) if s.index == 1]
    changed = []
    for step in walk_blocks(folder, texts, inputs="replaced"):
        if step.index == 0:
            mlp: Any = step.block.get_submodule("mlp")
            mlp.down_proj = Half(mlp.down_proj)
        else:
            changed.append(step.hessians["model.layers.1.mlp.up_proj"])
    assert not torch.allclose(plain[0], changed[0], atol=1e-5)


def test_model_and_gradient_mode_are_as_before(make_model: Callable[..., Any]) -> None:
    model = make_model("mixtral").train()
    now = getattr(model, "get_experts_implementation", lambda: None)  # transformers 5.0 has but one
    experts = now()
    forwards = [layer.__dict__.get("forward") for layer in model.model.layers]
    for _ in walk_blocks(model, windows(9)):
        assert torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert model.training
    assert model.config.use_cache
    assert now() == experts
    assert [layer.__dict__.get("forward") for layer in model.model.layers] == forwards
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_activation_dtype_and_diagonal(make_model: Callable[..., Any]) -> None:
    model, texts = make_model("llama"), windows(20, 20)
    exact = {n: h for s in walk_blocks(model, texts) for n, h in s.hessians.items()}
    rough = {
        n: h
        for s in walk_blocks(model, texts, activation_dtype=torch.bfloat16, max_full_width=64)
        for n, h in s.hessians.items()
    }
    assert {h.ndim for n, h in rough.items() if "down_proj" in n} == {1}
    assert {h.ndim for n, h in rough.items() if "down_proj" not in n} == {2}
    name = "model.layers.1.self_attn.o_proj"
    assert not torch.equal(exact[name], rough[name])
    torch.testing.assert_close(exact[name], rough[name], rtol=0.1, atol=0.02 * float(exact[name].abs().max()))


def test_models_that_are_not_a_list_of_blocks(make_model: Callable[..., Any]) -> None:
    with pytest.raises(NotSequential, match="an encoder with a decoder"):
        find_blocks(make_model("t5"))
    with pytest.raises(NotSequential, match="Linear has no configuration"):
        find_blocks(nn.Linear(2, 2))

    class Shifted(nn.Module):
        """Does something to the hidden state between two blocks."""

        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.config = inner, inner.config

        def forward(self, input_ids: Tensor) -> Tensor:
            base = self.inner.model
            x = base.embed_tokens(input_ids)
            positions = base.rotary_emb(x, torch.arange(x.shape[1])[None])
            for layer in base.layers:
                x = 1.5 * layer(x, position_embeddings=positions)
            return x

    with pytest.raises(NotSequential, match="something happens to the hidden state between blocks 0 and 1"):
        list(walk_blocks(Shifted(make_model("llama")), windows(5)))


def test_refuses_windows_that_do_not_fit(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    with pytest.raises(InputError, match="a window of 129 tokens; the model takes 128"):
        list(walk_blocks(model, windows(129)))
    with pytest.raises(InputError, match="token id 384 in a model of 384 tokens"):
        list(walk_blocks(model, [torch.tensor([3, 384])]))
    with pytest.raises(InputError, match="no windows"):
        list(walk_blocks(model, []))
    with pytest.raises(ValueError, match="inputs must be one of original, replaced, both"):
        list(walk_blocks(model, windows(5), inputs="neither"))  # type: ignore[arg-type]
