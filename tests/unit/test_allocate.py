from __future__ import annotations

import random
import time
from itertools import product

import pytest
import torch

from qlora_engine.allocate import (
    Candidate,
    LayerChoices,
    allocate,
    candidate_specs,
    layer_choices,
    measure,
    scale_searched,
)
from qlora_engine.errors import InputError
from qlora_engine.hessian import energy
from quant import QuantSpec

SPECS = candidate_specs(["nf2", "nf3", "nf4", "int8"], [32, 64])


def instance(
    seed: int, layers: int, specs: list[QuantSpec] = SPECS, *, decades: float = 3.0
) -> list[LayerChoices]:
    rng = random.Random(seed)
    made = []
    for n in range(layers):
        numel = rng.choice([4096, 6400, 64 * 96, 640])
        importance = 10 ** rng.uniform(-decades, 0)
        found = tuple(
            Candidate(s, 8 * s.nbytes(numel), importance * 4.0**-s.bits * rng.uniform(0.5, 1.5))
            for s in specs
        )
        made.append(LayerChoices(f"layer{n}", numel, found, weight=rng.choice([1.0, 0.1, 3.0])))
    return made


def brute_force(layers: list[LayerChoices], budget: float) -> float:
    numel = sum(layer.numel for layer in layers)
    fitting = [
        sum(layer.weight * c.error for layer, c in zip(layers, choice))
        for choice in product(*(layer.candidates for layer in layers))
        if sum(c.bits for c in choice) <= budget * numel
    ]
    return min(fitting)


@pytest.mark.parametrize("seed", range(25))
def test_optimum_of_small_instances(seed: int) -> None:
    layers = instance(seed, 4)
    budget = random.Random(seed).uniform(2.7, 8.6)
    found = allocate(layers, budget)
    assert found.error == pytest.approx(brute_force(layers, budget), rel=1e-5)
    assert found.bits_per_weight <= budget
    chosen = {
        layer.name: next(c for c in layer.candidates if c.spec == found.specs[layer.name]) for layer in layers
    }
    numel = sum(layer.numel for layer in layers)
    assert found.bits_per_weight == sum(c.bits for c in chosen.values()) / numel
    assert found.error == pytest.approx(sum(layer.weight * chosen[layer.name].error for layer in layers))


@pytest.mark.parametrize("budget", [2.6, 3.0, 3.25, 4.1, 4.5, 7.77])
def test_budget_is_used_but_never_exceeded(budget: float) -> None:
    found = allocate(instance(1, 210), budget)
    assert budget - 0.01 <= found.bits_per_weight <= budget


def test_a_budget_that_is_met_exactly() -> None:
    specs = [QuantSpec("nf2", 64), QuantSpec("nf4", 64)]
    layers = [
        LayerChoices(f"l{n}", 4096, tuple(Candidate(s, 8 * s.nbytes(4096), 1 / s.bits) for s in specs))
        for n in range(9)
    ]
    assert allocate(layers, 2.5).bits_per_weight == 2.5
    assert allocate(layers, 4.5).bits_per_weight == 4.5
    assert set(allocate(layers, 4.5).specs.values()) == {specs[1]}
    assert allocate(layers, 100).bits_per_weight == 4.5


def test_is_deterministic_and_quick() -> None:
    layers = instance(3, 300, candidate_specs(["nf2", "nf3", "nf4", "int8"], [32, 64, 128], [False, True]))
    start = time.perf_counter()
    first = allocate(layers, 3.3)
    assert time.perf_counter() - start < 20
    assert allocate(layers, 3.3) == first
    assert list(first.specs) == [layer.name for layer in layers]


def test_errors_of_any_unit_give_the_same_choice() -> None:
    layers = instance(5, 40, decades=8)
    scaled = [
        LayerChoices(
            x.name, x.numel, tuple(Candidate(c.spec, c.bits, c.error * 1e-9) for c in x.candidates), x.weight
        )
        for x in layers
    ]
    assert allocate(layers, 3.6).error * 1e-9 == pytest.approx(allocate(scaled, 3.6).error, rel=3e-6)


def test_more_budget_is_never_worse() -> None:
    layers = instance(7, 12)
    errors = [allocate(layers, budget).error for budget in (2.7, 3.0, 3.5, 4.0, 5.0, 8.0, 10.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1]


def test_groups_get_one_spec_each() -> None:
    free = instance(11, 12)
    grouped = [
        LayerChoices(x.name, x.numel, x.candidates, x.weight, f"g{n // 3}" if n < 9 else None)
        for n, x in enumerate(free)
    ]
    found = allocate(grouped, 3.4)
    for start in (0, 3, 6):
        assert len({found.specs[f"layer{n}"] for n in range(start, start + 3)}) == 1
    assert found.error >= allocate(free, 3.4).error
    assert found.bits_per_weight <= 3.4


def test_groups_choose_among_common_specs() -> None:
    def layer(name: str, formats: list[str]) -> LayerChoices:
        found = tuple(Candidate(QuantSpec(f), 8 * QuantSpec(f).nbytes(4096), 1.0) for f in formats)
        return LayerChoices(name, 4096, found, group="g")

    found = allocate([layer("a", ["nf2", "nf3"]), layer("b", ["nf3", "nf4"])], 8)
    assert set(found.specs.values()) == {QuantSpec("nf3")}
    with pytest.raises(InputError, match="group g: its layers share no format"):
        allocate([layer("a", ["nf2"]), layer("b", ["nf4"])], 8)


def test_infeasible_names_the_least_budget() -> None:
    layers = instance(2, 5)
    with pytest.raises(
        InputError, match=r"a budget of 2.1 bits a weight cannot be met.*at least (\d\.\d+)"
    ) as error:
        allocate(layers, 2.1)
    least = float(str(error.value).split()[-1])
    assert allocate(layers, least + 1e-4).bits_per_weight == pytest.approx(least, abs=1e-4)
    with pytest.raises(InputError, match="cannot be met"):
        allocate(layers, least - 1e-3)
    with pytest.raises(InputError, match="cannot be met"):
        allocate(layers, float("-inf"))


def test_refuses_what_cannot_be_added_up() -> None:
    (layer,) = instance(0, 1)
    bad = LayerChoices("bad", 64, (Candidate(SPECS[0], 100, float("nan")),))
    with pytest.raises(InputError, match="bad: errors and weight must be finite"):
        allocate([layer, bad], 4)
    with pytest.raises(InputError, match="layer0 is given twice"):
        allocate([layer, layer], 4)
    with pytest.raises(InputError, match="empty has no candidates"):
        allocate([LayerChoices("empty", 64, ())], 4)
    with pytest.raises(InputError, match="no layers"):
        allocate([], 4)


def test_measure_is_the_relative_output_error() -> None:
    weight, x = torch.randn(24, 64), torch.randn(300, 64) * torch.linspace(0.1, 3, 64)
    hessian = x.T @ x / 300
    specs = candidate_specs(["nf2", "nf4"], [32, 64], [False, True])
    found = measure(weight.bfloat16(), specs, hessian)
    dense = weight.bfloat16().float()
    for candidate, spec in zip(found, specs):
        error = dense - scale_searched(dense, spec)
        outputs, signal = x @ error.T, x @ dense.T
        expected = float(outputs.square().sum() / signal.square().sum())
        assert candidate.spec == spec
        assert candidate.bits == 8 * spec.nbytes(24 * 64)
        assert candidate.error == pytest.approx(expected, rel=1e-4)
    scaled = measure(4 * weight.bfloat16(), specs, 3 * hessian)
    assert [c.error for c in scaled] == pytest.approx([c.error for c in found], rel=1e-4)


def test_measure_without_hessian_is_the_relative_frobenius_error() -> None:
    weight, spec = torch.randn(16, 64), QuantSpec("nf3")
    error = weight - scale_searched(weight, spec)
    (found,) = measure(weight, [spec])
    assert found.error == pytest.approx(float(error.square().sum() / weight.square().sum()), rel=1e-5)
    (diagonal,) = measure(weight, [spec], torch.ones(64))
    assert diagonal.error == pytest.approx(found.error, rel=1e-5)


def test_measure_with_sensitivity_is_the_loss_to_second_order() -> None:
    weight, x, spec = torch.randn(8, 64), torch.randn(200, 64), QuantSpec("nf2")
    hessian, sensitivity = x.T @ x / 200, torch.rand(8)
    (found,) = measure(weight, [spec], hessian, sensitivity=sensitivity)
    outputs = x @ (weight - scale_searched(weight, spec)).T
    assert found.error == pytest.approx(float(0.5 * (outputs.square().mean(0) * sensitivity).sum()), rel=1e-4)
    with pytest.raises(InputError, match=r"sensitivity \(7,\) for a weight of 8 outputs"):
        measure(weight, [spec], hessian, sensitivity=torch.rand(7))


def test_layer_choices_measures_a_stream() -> None:
    weights = {name: torch.randn(8, 64) for name in "abc"}
    hessians = {"a": torch.eye(64) * 4, "b": torch.rand(64)}
    specs = candidate_specs(["nf2", "nf3"])
    made = layer_choices(iter(weights.items()), specs, hessians, groups={"a": "g", "b": "g"})
    assert [(c.name, c.numel, c.group) for c in made] == [("a", 512, "g"), ("b", 512, "g"), ("c", 512, None)]
    for choice in made:
        assert choice.candidates == measure(weights[choice.name], specs, hessians.get(choice.name))
    sensitivities = {"a": torch.rand(8), "b": torch.rand(8), "c": torch.rand(16)}
    minded = layer_choices(weights.items(), specs, hessians, sensitivities)
    assert minded[1].candidates == measure(weights["b"], specs, hessians["b"], sensitivity=sensitivities["b"])
    whole = sensitivities["c"].mean().expand(8)
    assert minded[2].candidates == measure(weights["c"], specs, sensitivity=whole)


def test_layers_that_no_token_reached_are_not_free() -> None:
    weights = {name: torch.randn(8, 64) for name in "abcde"} | {"other": torch.randn(16, 64)}
    hessians = {name: torch.rand(64) for name in weights} | {"d": torch.zeros(64)}
    minded = {name: n * torch.rand(8) for n, name in enumerate("abc", 1)} | {"other": 100 * torch.rand(16)}
    minded |= {"d": torch.rand(8), "e": torch.zeros(8)}
    specs = candidate_specs(["nf2", "nf3", "nf4"])
    for unreached in ("d", "e", None):
        if unreached is None:  # an embedding, say: nothing was measured
            del minded["e"]
            unreached = "e"
        made = {c.name: c for c in layer_choices(weights.items(), specs, hessians, minded)}
        assert [name for name, c in made.items() if c.estimated] == ["d", "e"]
        assert made[unreached].candidates == measure(weights[unreached], specs)
        rows = {name: (minded[name] / 2).sqrt()[:, None] * weights[name] for name in "abc"}
        lost = sorted(energy(rows[name], hessians[name]) for name in "abc")
        assert made[unreached].weight == pytest.approx(lost[1], rel=1e-5)  # of its shape, not of "other"
    allocation = allocate(list(made.values()), 3.3)
    assert allocation.specs["other"].format == "nf4"
    assert all(allocation.specs[name].bits >= allocation.specs["a"].bits for name in "de")


def test_zero_sensitivities_everywhere_leave_relative_errors() -> None:
    weights = {name: torch.randn(8, 64) for name in "ab"}
    specs = candidate_specs(["nf2", "nf3"])
    made = layer_choices(weights.items(), specs, None, {"a": torch.zeros(8)})
    assert made == layer_choices(weights.items(), specs)


def test_a_layer_fed_with_zeros_is_measured_without_its_hessian() -> None:
    weight, specs = torch.randn(8, 64), candidate_specs(["nf2", "nf3"])
    assert measure(weight, specs, torch.zeros(64, 64)) == measure(weight, specs)


def test_measure_takes_the_method_in_use() -> None:
    weight, spec = torch.randn(16, 64), QuantSpec("nf3")
    (found,) = measure(weight, [spec], approximate=lambda w, s: w * (1 - s.bits / 100))
    assert found.error == pytest.approx(0.03**2, rel=1e-4)


def test_measure_of_a_zero_weight_and_bad_input() -> None:
    (found,) = measure(torch.zeros(4, 64), [QuantSpec("nf4")])
    assert found.error == 0
    with pytest.raises(InputError, match=r"weight \(4, 64\) with hessian \(32, 32\)"):
        measure(torch.zeros(4, 64), [QuantSpec("nf4")], torch.eye(32))
    with pytest.raises(ValueError):
        measure(torch.full((4, 64), float("nan")), [QuantSpec("nf4")])


def test_energy_orders_candidates_as_bits_do() -> None:
    weight = torch.randn(64, 64)
    errors = [c.error for c in measure(weight, candidate_specs(["nf2", "nf3", "nf4", "int8"]))]
    assert errors == sorted(errors, reverse=True)
    assert energy(weight, None) > 0
