from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_engine.errors import InputError
from qlora_engine.observe import Observer, find_targets


class Attention(nn.Module):
    """Three layers with one input and a fourth with another, as in attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x) * self.k(x) + self.v(x)))


def moment(rows: Iterable[Tensor]) -> Tensor:
    x = torch.cat([r.reshape(-1, r.shape[-1]) for r in rows]).double()
    return (x.T @ x / x.shape[0]).float()


def names_of_groups(observer: Observer) -> set[frozenset[str]]:
    groups = observer.finish()
    return {frozenset(n for n in groups if groups[n] is group) for group in groups.values()}


def test_layers_with_one_input_share() -> None:
    model, batches = Attention(), [torch.randn(2, 5, 6), torch.randn(1, 3, 6)]
    with Observer(find_targets(model)) as observer:
        for batch in batches:
            observer.start()
            model(batch)
    assert names_of_groups(observer) == {frozenset("qkv"), frozenset("o")}
    groups = observer.finish()
    assert groups["q"].moment.tokens == groups["o"].moment.tokens == 13
    torch.testing.assert_close(groups["k"].moment.mean(), moment(batches))
    inner = [torch.tanh(model.q(b) * model.k(b) + model.v(b)).detach() for b in batches]
    torch.testing.assert_close(groups["o"].moment.mean(), moment(inner), rtol=1e-4, atol=1e-6)


def test_share_false_gives_the_same_moments() -> None:
    model, x = Attention(), torch.randn(2, 5, 6)
    found = []
    for share in (True, False):
        with Observer(find_targets(model), share=share) as observer:
            model(x)
        found.append(observer.finish())
    assert found[1]["q"] is not found[1]["k"]
    for name in "qkvo":
        assert torch.equal(found[0][name].moment.mean(), found[1][name].moment.mean())


class Branching(nn.Module):
    """Layers that get the same first input and then go their ways."""

    def __init__(self, paths: dict[str, list[int]]) -> None:
        super().__init__()
        self.paths = paths
        self.layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in paths})

    def forward(self, xs: list[Tensor]) -> None:
        for step in range(max(map(len, self.paths.values()))):
            for name, path in self.paths.items():
                if step < len(path):
                    self.layers[name](xs[path[step]])


@pytest.mark.parametrize(
    "paths",
    [
        {"a": [0, 1], "b": [0, 2], "c": [0, 1]},  # b diverges
        {"a": [0, 1, 3], "b": [0], "c": [0]},  # two stop after the first
        {"a": [0, 1], "b": [0, 1, 2], "c": [0, 2, 1]},
        {"a": [0], "b": [0, 1, 1, 2], "c": [0, 1]},  # the same tensor twice in a row
        {"a": [0, 1], "b": [1, 0], "c": [1, 2]},
    ],
)
def test_layers_that_part_are_split(paths: dict[str, list[int]]) -> None:
    model = Branching(paths)
    xs = [torch.randn(5, 4) * (n + 1) for n in range(4)]
    with Observer(find_targets(model)) as observer:
        for _ in range(2):
            observer.start()
            model(xs)
    groups = observer.finish()
    for name, path in paths.items():
        expected = moment([xs[n] for n in path])
        assert groups[f"layers.{name}"].moment.tokens == 2 * 5 * len(path)
        torch.testing.assert_close(groups[f"layers.{name}"].moment.mean(), expected, rtol=1e-4, atol=1e-5)


def test_input_changed_in_place_is_another_input() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> None:
            self.a(x)
            self.b(x.mul_(2))

    x = torch.randn(9, 4)
    before = x.clone()
    model = Model()
    with torch.no_grad(), Observer(find_targets(model)) as observer:
        model(x)
    groups = observer.finish()
    torch.testing.assert_close(groups["a"].moment.mean(), moment([before]))
    torch.testing.assert_close(groups["b"].moment.mean(), moment([2 * before]))


def test_inactive_sees_nothing_and_leaving_removes_hooks() -> None:
    model = Attention()
    observer = Observer(find_targets(model))
    with observer:
        observer.active = False
        model(torch.randn(1, 2, 6))
    observer.active = True
    model(torch.randn(1, 2, 6))
    assert observer.finish() == {}


def test_max_full_width_keeps_the_diagonal() -> None:
    model, x = Attention(), torch.randn(8, 6)
    with Observer(find_targets(model), max_full_width=5) as observer:
        model(x)
    assert observer.finish()["q"].moment.mean().shape == (6,)
    torch.testing.assert_close(observer.finish()["q"].moment.mean(), moment([x]).diagonal())


def test_inputs_that_are_not_finite_are_named() -> None:
    model = Attention()
    with Observer(find_targets(model, ["o"])) as observer:
        model(torch.full((1, 2, 6), float("nan")))
    with pytest.raises(InputError, match="inputs of o are not finite"):
        observer.finish()


def test_embedding_and_conv1d(make_model: Callable[..., Any]) -> None:
    model = make_model("gpt2")
    targets = find_targets(model)
    assert targets["transformer.h.0.attn.c_attn"].kind == "conv1d"
    assert "lm_head" not in targets
    ids = torch.tensor([[3, 4, 3, 9]])
    with (
        torch.no_grad(),
        Observer(find_targets(model, ["transformer.wte", "transformer.h.1.mlp.c_proj"])) as o,
    ):
        model(ids)
    groups = o.finish()
    frequency = groups["transformer.wte"].moment.mean()
    assert frequency.shape == (384,)
    assert [float(frequency[i]) for i in (3, 4, 9, 5)] == [0.5, 0.25, 0.25, 0]
    assert groups["transformer.h.1.mlp.c_proj"].moment.mean().shape == (96, 96)  # in, not out (64)


def test_find_targets_refuses(make_model: Callable[..., Any]) -> None:
    model = make_model("gpt2")
    with pytest.raises(InputError, match=r"no module 'transformer.h.9'"):
        find_targets(model, ["transformer.h.9"])
    with pytest.raises(InputError, match=r"transformer.ln_f is a LayerNorm; inputs are collected for Linear"):
        find_targets(model, ["transformer.ln_f"])


def routed(model: Any, ids: Tensor) -> list[Tensor]:
    """Inputs of the experts of block 0 by expert, from the module's own arguments."""
    caught: list[tuple[Tensor, Tensor]] = []
    experts = model.model.layers[0].mlp.experts
    hook = experts.register_forward_pre_hook(lambda _, args: caught.append((args[0], args[1])))
    model(ids)
    hook.remove()
    x, chosen = caught[0]
    return [x[(chosen == e).any(-1)] for e in range(4)]


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_stacked_experts_see_their_tokens(make_model: Callable[..., Any], name: str) -> None:
    model = make_model(name)
    model.set_experts_implementation("eager")
    fused = "model.layers.0.mlp.experts"
    targets = find_targets(model, [f"{fused}.gate_up_proj", f"{fused}.down_proj.2"])
    assert len(targets) == 5
    ids = torch.randint(3, 300, (2, 20))
    with torch.no_grad(), Observer(targets) as observer:
        model(ids)
        expected = routed(model, ids)  # runs the model again: every sum doubles, no mean moves
    groups = observer.finish()
    assert sum(groups[f"{fused}.gate_up_proj.{e}"].moment.tokens for e in range(4)) == 2 * 2 * 40
    for e in range(4):
        found = groups[f"{fused}.gate_up_proj.{e}"].moment
        assert found.tokens == 2 * expected[e].shape[0]
        torch.testing.assert_close(found.mean(), moment([expected[e]]), rtol=1e-4, atol=1e-6)
    gate, up = (expected[2] @ model.model.layers[0].mlp.experts.gate_up_proj[2].T).chunk(2, -1)
    inner = (nn.functional.silu(gate) * up).detach()
    torch.testing.assert_close(
        groups[f"{fused}.down_proj.2"].moment.mean(), moment([inner]), rtol=1e-3, atol=1e-8
    )


def test_tape_pairs_drifted_with_original_inputs() -> None:
    model, batches = Attention(), [torch.randn(2, 5, 6), torch.randn(2, 5, 6)]
    first = Observer(find_targets(model), record_tape=True)
    second = Observer(find_targets(model), tape=first.tape)
    drifted = [b + 0.1 * torch.randn_like(b) for b in batches]
    for x, y in zip(batches, drifted):
        with first:
            first.start()
            model(x)
        with second:
            second.start()
            model(y)
    groups = second.finish()
    assert groups["q"] is groups["v"]
    cross = groups["q"].cross
    assert cross is not None
    y, x = torch.cat(drifted).reshape(-1, 6).double(), torch.cat(batches).reshape(-1, 6).double()
    torch.testing.assert_close(cross.mean().double(), y.T @ x / 20, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(groups["q"].moment.mean(), moment(drifted))


def test_tape_of_other_tokens_gives_no_cross_moment() -> None:
    model = Attention()
    first = Observer(find_targets(model), record_tape=True)
    second = Observer(find_targets(model), tape=first.tape)
    with first:
        model(torch.randn(1, 5, 6))
    with second:
        model(torch.randn(1, 4, 6))
    assert second.finish()["q"].cross is None
