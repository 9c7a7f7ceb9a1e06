"""task_vectors: pruning, sign election and weighted sums, on tensors small enough to check by hand."""

from __future__ import annotations

import pytest
import torch

from qlora_engine.task_vectors import (
    calculate_majority_sign_mask,
    combine,
    dare_linear,
    dare_ties,
    disjoint_merge,
    magnitude_based_pruning,
    magnitude_prune,
    prune,
    random_pruning,
    reshape_weight_task_tensors,
    task_arithmetic,
    ties,
)

ONE = torch.tensor([[4.0, -1.0], [0.5, -3.0]])
TWO = torch.tensor([[-2.0, -5.0], [0.25, 1.0]])
WEIGHTS = torch.tensor([1.0, 2.0])


def test_reshape_weight_task_tensors() -> None:
    assert reshape_weight_task_tensors(torch.zeros(2, 3, 4), WEIGHTS).shape == (2, 1, 1)


@pytest.mark.parametrize(("density", "kept"), [(0.0, 0), (0.24, 0), (0.25, 1), (0.5, 2), (0.99, 3)])
def test_magnitude_based_pruning_keeps_the_largest(density: float, kept: int) -> None:
    pruned = magnitude_based_pruning(ONE, density)
    assert int((pruned != 0).sum()) == kept
    largest = ONE.abs().flatten().sort(descending=True).values[:kept]
    assert torch.equal(pruned[pruned != 0].abs().sort(descending=True).values, largest)


def test_random_pruning_keeps_the_expectation_when_rescaled() -> None:
    ones = torch.ones(100_000)
    pruned = random_pruning(ones, 0.3, rescale=True)
    assert pruned.unique().tolist() == pytest.approx([0.0, 1 / 0.3])
    # the mean of 1e5 draws has standard deviation sqrt(0.7 / 0.3 / 1e5) = 0.0048; 5 sigma
    assert pruned.mean().item() == pytest.approx(1.0, abs=0.025)
    assert set(random_pruning(ones, 0.3, rescale=False).unique().tolist()) == {0.0, 1.0}


def test_random_pruning_at_density_zero_gives_zeros_and_not_nan() -> None:
    assert torch.equal(random_pruning(ONE, 0.0, rescale=True), torch.zeros_like(ONE))


def test_prune_at_density_one_warns_and_keeps_all() -> None:
    with pytest.warns(UserWarning, match=r"The density 1.5 is greater than or equal to 1, no pruning"):
        assert torch.equal(prune(ONE, 1.5, method="magnitude"), ONE)


def test_prune_refuses_a_negative_density_and_an_unknown_method() -> None:
    with pytest.raises(ValueError, match=r"Density should be >= 0, got -0.1"):
        prune(ONE, -0.1, method="magnitude")
    with pytest.raises(ValueError, match="Unknown method largest"):
        prune(ONE, 0.5, method="largest")  # type: ignore[arg-type]


def test_calculate_majority_sign_mask() -> None:
    stack = torch.tensor([[3.0, -1.0, 1.0, 0.0], [-1.0, -1.0, -1.0, 0.0], [-1.0, 5.0, 0.0, 0.0]])
    total = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
    frequency = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    assert torch.equal(calculate_majority_sign_mask(stack, "total"), total)
    assert torch.equal(calculate_majority_sign_mask(stack, "frequency"), frequency)


def test_calculate_majority_sign_mask_refuses_an_unknown_method() -> None:
    with pytest.raises(RuntimeError, match='Unimplemented mask method "vote"'):
        calculate_majority_sign_mask(torch.zeros(2, 2), "vote")  # type: ignore[arg-type]


def test_disjoint_merge_is_the_mean_of_what_agrees() -> None:
    stack = torch.tensor([[2.0, 1.0], [4.0, 5.0]])
    mask = torch.tensor([[True, False], [True, False]])
    assert torch.equal(disjoint_merge(stack, mask), torch.tensor([3.0, 0.0]))


def test_task_arithmetic() -> None:
    assert torch.equal(task_arithmetic([ONE, TWO], WEIGHTS), ONE + 2 * TWO)


def test_magnitude_prune() -> None:
    expected = torch.tensor([[4.0, 0.0], [0.0, -3.0]]) + 2 * torch.tensor([[-2.0, -5.0], [0.0, 0.0]])
    assert torch.equal(magnitude_prune([ONE, TWO], WEIGHTS, 0.5), expected)


def test_ties() -> None:
    # pruned: [[4, 0], [0, -3]] and [[-2, -5], [0, 0]]; elected: + - + -; weights multiply after the election
    expected = torch.tensor([[4.0, 2 * -5.0], [0.0, -3.0]])
    assert torch.equal(ties([ONE, TWO], WEIGHTS, 0.5), expected)


def test_ties_by_frequency_elects_by_count() -> None:
    tensors = [torch.tensor([9.0]), torch.tensor([-1.0]), torch.tensor([-1.0])]
    with pytest.warns(UserWarning, match="no pruning"):
        total = ties(tensors, torch.ones(3), 1.0, "total")
    with pytest.warns(UserWarning, match="no pruning"):
        frequency = ties(tensors, torch.ones(3), 1.0, "frequency")
    assert (total.item(), frequency.item()) == (9.0, -1.0)


@pytest.mark.parametrize("function", [dare_linear, dare_ties])
def test_dare_keeps_the_expectation_of_one_adapter(function: object) -> None:
    tensor = torch.ones(100_000)
    merged = function([tensor], torch.tensor([1.0]), 0.5)  # type: ignore[operator]
    assert set(merged.unique().tolist()) == {0.0, 2.0}
    assert merged.mean().item() == pytest.approx(1.0, abs=5 * (1 / 1e5) ** 0.5)


def test_combine_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="needs a density in"):
        combine("ties", [ONE, TWO], WEIGHTS)
    with pytest.raises(ValueError, match="Invalid combination_type: cat"):
        combine("cat", [ONE, TWO], WEIGHTS, 0.5)
