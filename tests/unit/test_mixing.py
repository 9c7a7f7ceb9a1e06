"""add_weighted_adapter on models: what the new adapter does, and that a failure leaves nothing behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_engine import LoftQConfig, LoraConfig, get_peft_model
from qlora_engine.combine import COMBINATION_TYPES, ELEMENTWISE, PRUNING
from qlora_engine.lora_layer import LoraLayer
from qlora_engine.mixing import add_weighted_adapter


class Net(nn.Module):
    """One layer of every kind that LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 32)
        self.lin = nn.Linear(32, 64)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=1)
        self.grouped = nn.Conv1d(8, 16, 3, padding=1, groups=2)
        self.head = nn.Linear(64, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.lin(self.emb(ids)))  # (batch, 8, 64)
        return self.head(self.grouped(self.conv(x)))


ALL = ["emb", "lin", "conv", "grouped"]
IDS = torch.arange(16).reshape(2, 8)


def make(*configs: LoraConfig, seed: int = 0) -> Any:
    """A PeftModel with one random adapter a config, named p, q, s..."""
    torch.manual_seed(seed)
    model = get_peft_model(Net(), configs[0], adapter_name="p")
    for name, config in zip("qstuv", configs[1:]):
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.2
            if "magnitude" in name:
                parameter.data += 1
        elif "modules_to_save" in name or "trainable_tokens" in name:
            parameter.data += torch.randn_like(parameter) * 0.3
    return model.eval()


def config(**kwargs: Any) -> LoraConfig:
    kwargs.setdefault("target_modules", ALL)
    return LoraConfig(**{"r": 4, "lora_alpha": 6, **kwargs})


@torch.no_grad()
def output(model: Any, adapter: str | list[str]) -> Tensor:
    model.base_model.set_adapter(adapter)
    return model(IDS)


def pieces(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "target_modules": ["emb", "lin", "conv"]},
    "lora_bias": {"lora_bias": True, "target_modules": ["lin", "conv", "grouped"]},
    "patterns": {"rank_pattern": {"lin": 2}, "alpha_pattern": {"emb": 3}},
    "modules_to_save": {"modules_to_save": ["head"]},
    "tokens": {"target_modules": ["lin"], "trainable_token_indices": {"emb": [1, 3, 15]}},
}


@pytest.mark.parametrize("kind", COMBINATION_TYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_identity_combination_leaves_the_output_alone(options: dict[str, Any], kind: str) -> None:
    model = make(config(**options))
    expected = output(model, "p")
    model.add_weighted_adapter(["p"], [1.0], "m", combination_type=kind, density=0.5)
    torch.testing.assert_close(output(model, "m"), expected, rtol=1e-5, atol=2e-6)
    assert torch.equal(output(model, "p"), expected)


@pytest.mark.parametrize("kind", ["cat", "svd"])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -1.3]])
def test_exact_kinds_add_what_the_adapters_do(kind: str, weights: list[float]) -> None:
    model = make(config(), config(r=6, lora_alpha=5, use_rslora=True))
    arguments = {"svd_rank": 10} if kind == "svd" else {}
    model.add_weighted_adapter(["p", "q"], weights, "m", combination_type=kind, **arguments)
    seen = 0
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and getattr(layer.get_base_layer(), "groups", 1) == 1:
            expected = sum(w * layer.get_delta_weight(n) for w, n in zip(weights, "pq"))
            torch.testing.assert_close(layer.get_delta_weight("m"), expected, rtol=0, atol=2e-6)
            assert layer.scaling["m"] == 1.0
            seen += 1
    assert seen == 3
    if weights == [1.0, 1.0]:
        torch.testing.assert_close(output(model, "m"), output(model, ["p", "q"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_exact_kinds_work_group_by_group_on_grouped_convolutions(kind: str) -> None:
    model = make(config(target_modules=["grouped"]), config(r=6, target_modules=["grouped"]))
    arguments = {"svd_rank": 10} if kind == "svd" else {}
    model.add_weighted_adapter(["p", "q"], [1.0, 1.0], "m", combination_type=kind, **arguments)
    torch.testing.assert_close(output(model, "m"), output(model, ["p", "q"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_dora_is_combined_exactly_with_dora_and_with_lora(kind: str) -> None:
    targets = ["emb", "lin", "conv"]
    model = make(
        config(target_modules=targets, use_dora=True),
        config(target_modules=targets, use_dora=True, r=6),
        config(target_modules=targets, use_rslora=True),
    )
    names, weights = ["p", "q", "s"], [0.6, -0.4, 1.5]
    arguments = {"svd_rank": 14} if kind == "svd" else {}
    model.add_weighted_adapter(names, weights, "m", combination_type=kind, **arguments)
    assert model.peft_config["m"].use_dora
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            base = layer.get_base_weight().clone()
            changes = []
            for name in (*names, "m"):
                layer.merge(adapter_names=[name])
                changes.append(layer.get_base_weight() - base)
                layer.unmerge()
            expected = sum(w * change for w, change in zip(weights, changes))
            torch.testing.assert_close(changes[-1], expected, rtol=0, atol=5e-6)


def test_dora_where_a_row_vanishes() -> None:
    model = make(config(target_modules=["lin"], use_dora=True))
    layer = model.base_model.model.lin
    layer.lora_magnitude_vector["p"].weight.data[0] = (
        2 * layer.weight_norm("p")[0]
    )  # g = 2, so c = 0 at w = -1
    base = layer.get_base_weight().clone()
    layer.merge(adapter_names=["p"])
    change = layer.get_base_weight() - base
    layer.unmerge()
    model.add_weighted_adapter(["p"], [-1.0], "m")
    layer.merge(adapter_names=["m"])
    torch.testing.assert_close(layer.get_base_weight(), base - change, rtol=0, atol=5e-6)


def test_lora_biases_are_summed_with_their_scalings() -> None:
    targets = ["lin"]
    model = make(
        config(target_modules=targets, lora_bias=True), config(target_modules=targets, lora_bias=True, r=2)
    )
    model.add_weighted_adapter(["p", "q"], [2.0, -0.5], "m", combination_type="cat")
    layer = model.base_model.model.lin
    expected = 2.0 * 1.5 * layer.lora_B["p"].bias - 0.5 * 3.0 * layer.lora_B["q"].bias
    torch.testing.assert_close(layer.lora_B["m"].bias, expected)


def test_layers_that_only_one_adapter_has() -> None:
    model = make(config(target_modules=["emb", "lin"]), config(target_modules=["lin", "conv"]))
    model.add_weighted_adapter(["p", "q"], [1.0, 1.0], "m", combination_type="cat")
    torch.testing.assert_close(output(model, "m"), output(model, ["p", "q"]), rtol=1e-5, atol=1e-5)
    assert model.peft_config["m"].target_modules == {"emb", "lin", "conv"}


def test_regex_targets_are_joined() -> None:
    model = make(config(target_modules="lin|emb"), config(target_modules=r".*conv"))
    model.add_weighted_adapter(["p", "q"], [1.0, 1.0], "m", combination_type="cat")
    assert model.peft_config["m"].target_modules == "(lin|emb)|(.*conv)"
    torch.testing.assert_close(output(model, "m"), output(model, ["p", "q"]), rtol=1e-5, atol=1e-5)


def test_targets_chosen_by_different_filters_become_full_names() -> None:
    model = make(
        config(target_modules=["emb", "lin"], exclude_modules=["emb"]), config(target_modules=["emb"])
    )
    model.add_weighted_adapter(["p", "q"], [1.0, 1.0], "m", combination_type="cat")
    assert model.peft_config["m"].target_modules == {"emb", "lin"}
    assert model.peft_config["m"].exclude_modules is None
    torch.testing.assert_close(output(model, "m"), output(model, ["p", "q"]), rtol=1e-5, atol=1e-5)


def test_a_module_trained_in_full_is_copied_from_the_adapter_that_has_it() -> None:
    model = make(config(), config(modules_to_save=["head"]))
    model.add_weighted_adapter(["p", "q"], [1.0, 0.5], "m", combination_type="cat")
    versions = model.base_model.model.head.modules_to_save
    assert torch.equal(versions["m"].weight, versions["q"].weight)
    assert versions["m"].weight is not versions["q"].weight


def test_token_rows_are_combined_as_changes_of_the_base() -> None:
    options = {"target_modules": ["lin"]}
    model = make(
        config(**options, trainable_token_indices={"emb": [1, 3]}),
        config(**options, trainable_token_indices={"emb": [3, 7]}),
    )
    model.add_weighted_adapter(["p", "q"], [1.0, -2.0], "m", combination_type="cat")
    layer = model.base_model.model.emb.token_adapter
    base, a, b = layer.base_layer.weight, *(layer.trainable_tokens_delta[n] for n in "pq")
    expected = torch.stack(
        [a[0], base[3] + (a[1] - base[3]) - 2 * (b[0] - base[3]), base[7] - 2 * (b[1] - base[7])]
    )
    assert layer.token_indices["m"] == [1, 3, 7]
    torch.testing.assert_close(layer.trainable_tokens_delta["m"].data, expected)


def test_new_adapter_is_frozen_inactive_and_plain() -> None:
    model = make(config(use_rslora=True, rank_pattern={"lin": 2}, lora_dropout=0.1), config())
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    model.add_weighted_adapter(["p", "q"], [1.0, 1.0], "m")
    new = model.peft_config["m"]
    assert (new.r, new.lora_alpha, new.use_rslora, new.rank_pattern) == (4, 4, False, {})
    assert new.init_lora_weights is True
    assert new.lora_dropout == 0.1
    assert model.active_adapters == ["p"]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == grads.get(name, False), name


def test_source_initialised_from_the_weight_leaves_the_base_alone() -> None:
    model = make(config(target_modules=["lin"], init_lora_weights="pissa"))
    base = model.base_model.model.lin.get_base_weight().clone()
    model.add_weighted_adapter(["p"], [1.0], "m")
    assert torch.equal(model.base_model.model.lin.get_base_weight(), base)


@pytest.mark.parametrize("bits", [4, 2])
def test_quantised_base_keeps_its_codes(bits: int) -> None:
    options = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=bits)}
    model = make(config(target_modules=["lin"], **options))
    codes = model.base_model.model.lin.get_base_layer().codes
    before = codes.clone()
    expected = output(model, "p")
    model.add_weighted_adapter(["p"], [1.0], "m")
    assert model.base_model.model.lin.get_base_layer().codes is codes
    assert torch.equal(codes, before)
    torch.testing.assert_close(output(model, "m"), expected, rtol=1e-5, atol=2e-6)


def test_half_precision_adapters_keep_their_dtype() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        Net().bfloat16(),
        config(target_modules=["lin"], init_lora_weights=False),
        "p",
        autocast_adapter_dtype=False,
    )
    model.add_weighted_adapter(["p"], [1.0], "m")
    assert model.base_model.model.lin.lora_A["m"].weight.dtype == torch.bfloat16


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"weights": [1.0]}, ValueError, "got 2 adapters and 1 weights"),
    ({"weights": [1.0, float("nan")]}, ValueError, "weights must be finite"),
    ({"adapter_name": "q"}, ValueError, "Adapter with name 'q' already exists."),
    ({"adapters": ["p", "zzz"]}, ValueError, "Adapter zzz does not exist"),
    ({"adapters": [], "weights": []}, ValueError, "Found no adapter matching the names in"),
    ({"combination_type": "average"}, ValueError, "Invalid combination_type: average"),
    ({"combination_type": "ties"}, ValueError, "needs a density"),
    ({"combination_type": "dare_linear_svd", "density": -0.1}, ValueError, "Density should be >= 0"),
    ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "x"}, ValueError, "majority_sign"),
    ({"svd_rank": 0}, ValueError, "svd_rank must be at least 1"),
    ({"svd_clamp": 1.5}, ValueError, "svd_clamp is a quantile"),
    (
        {"svd_rank": 3},
        ValueError,
        "grouped: the combined rank 3 is not divisible by the convolution's 2 groups",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_refusal_leaves_nothing_behind(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    model = make(config(), config())
    before, configs = pieces(model), list(model.peft_config)
    arguments = {"adapters": ["p", "q"], "weights": [1.0, 1.0], "adapter_name": "m", **changes}
    with pytest.raises(error, match=message):
        model.add_weighted_adapter(**arguments)
    after = pieces(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert list(model.peft_config) == configs
    output(model, "p")


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_elementwise_kinds_refuse_unequal_ranks(kind: str) -> None:
    model = make(config(), config(r=6))
    with pytest.raises(ValueError, match="All adapters must have the same r value"):
        model.add_weighted_adapter(["p", "q"], [1.0, 1.0], "m", combination_type=kind, density=0.5)
    model = make(config(rank_pattern={"lin": 2}), config(rank_pattern={"conv": 2}))
    with pytest.raises(ValueError, match="lin: adapters p, q have ranks 2, 4 here"):
        model.add_weighted_adapter(["p", "q"], [1.0, 1.0], "m", combination_type=kind, density=0.5)
    assert list(model.peft_config) == ["p", "q"]


def test_failure_while_writing_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(config(), config())
    before, expected = pieces(model), output(model, "p")

    def fail(*args: Any) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr("qlora_engine.mixing._write_extra", fail)
    with pytest.raises(MemoryError):
        model.add_weighted_adapter(["p", "q"], [1.0, 1.0], "m")
    assert pieces(model).keys() == before.keys()
    assert list(model.peft_config) == ["p", "q"]
    assert torch.equal(output(model, "p"), expected)


def test_same_modules_to_save_twice_is_refused() -> None:
    model = make(config(modules_to_save=["head"]), config(modules_to_save=["head"]))
    with pytest.raises(ValueError, match=r"modules_to_save, but found 1 such instance\(s\)\."):
        model.add_weighted_adapter(["p", "q"], [1.0, 1.0], "m")


def test_mixed_kinds_of_targets_are_refused() -> None:
    model = make(config(target_modules="lin"), config(target_modules=["lin"]))
    with pytest.raises(ValueError, match="all adapter configs should follow the same target modules type"):
        model.add_weighted_adapter(["p", "q"], [1.0, 1.0], "m")


def test_dora_with_lora_bias_is_refused() -> None:
    model = make(
        config(target_modules=["lin"], use_dora=True), config(target_modules=["lin"], lora_bias=True)
    )
    with pytest.raises(ValueError, match="use_dora and adapters with lora_bias cannot be combined"):
        model.add_weighted_adapter(["p", "q"], [1.0, 1.0], "m")


def test_dora_is_refused_while_merged() -> None:
    model = make(config(target_modules=["lin"], use_dora=True))
    model.merge_adapter()
    with pytest.raises(ValueError, match="lin: DoRA adapters cannot be combined while an adapter is merged"):
        model.add_weighted_adapter(["p"], [1.0], "m")


def test_trained_biases_stay_with_the_base_and_say_so() -> None:
    model = make(config(bias="lora_only"))
    expected = output(model, "p")
    with pytest.warns(UserWarning, match="biases that p trained"):
        model.add_weighted_adapter(["p"], [1.0], "m")
    torch.testing.assert_close(output(model, "m"), expected, rtol=1e-5, atol=2e-6)


def test_svd_rank_for_one_adapter_warns() -> None:
    model = make(config())
    with pytest.warns(UserWarning, match="svd_rank has no effect"):
        model.add_weighted_adapter(["p"], [1.0], "m", svd_rank=2)


def test_combined_adapter_is_saved_and_loads(tmp_path: Any) -> None:
    from qlora_engine import PeftModel

    model = make(config(use_rslora=True), config(r=6))
    base = copy.deepcopy(model).unload()
    model.add_weighted_adapter(["p", "q"], [0.5, 0.5], "m", combination_type="cat")
    expected = output(model, "m")
    model.save_pretrained(tmp_path, selected_adapters=["m"])
    loaded = PeftModel.from_pretrained(base, tmp_path / "m").eval()
    torch.testing.assert_close(loaded(IDS), expected)


def test_pruning_kinds_are_all_covered() -> None:
    assert set(PRUNING) < set(COMBINATION_TYPES)
    assert add_weighted_adapter.__doc__
