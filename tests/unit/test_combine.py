"""combine: the algebra on factors of one layer, against dense float64 computations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_engine.combine import (
    COMBINATION_TYPES,
    DENSE_SVD,
    ELEMENTWISE,
    PRUNING,
    Factors,
    combine_factors,
    pad_rank,
    quantile,
    svd_of_product,
)

# (groups, out, in): wide, tall, odd, and a grouped convolution's
SHAPES = [(1, 63, 100), (1, 100, 63), (1, 7, 257), (4, 8, 30)]


def make_factors(shape: tuple[int, int, int], ranks: list[int], weights: list[float]) -> list[Factors]:
    groups, rows, columns = shape
    return [
        Factors(
            A=torch.randn(groups, rank, columns, dtype=torch.float64),
            B=torch.randn(groups, rows, rank, dtype=torch.float64),
            scaling=0.5 + index,
            weight=weight,
        )
        for index, (rank, weight) in enumerate(zip(ranks, weights))
    ]


def exact_sum(factors: list[Factors]) -> Tensor:
    return torch.stack([f.weight * f.scaling * f.B @ f.A for f in factors]).sum(dim=0)


def best_approximation(delta: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, -1.3, 0.0]])
def test_combine_factors_cat_is_the_exact_sum(shape: tuple[int, int, int], weights: list[float]) -> None:
    factors = make_factors(shape, [2, 3, 5], weights)
    A, B = combine_factors("cat", factors, rank=12)
    assert A.shape[1] == B.shape[2] == 12
    torch.testing.assert_close(B @ A, exact_sum(factors), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_combine_factors_svd_is_the_best_approximation_of_the_sum(
    shape: tuple[int, int, int], rank: int
) -> None:
    factors = make_factors(shape, [2, 3, 5], [0.7, -1.3, 2.0])
    A, B = combine_factors("svd", factors, rank=rank)
    torch.testing.assert_close(B @ A, best_approximation(exact_sum(factors), rank), rtol=0, atol=1e-11)


def test_combine_factors_svd_at_full_rank_is_the_exact_sum_and_orthonormal() -> None:
    factors = make_factors((1, 40, 50), [2, 3, 5], [0.7, -1.3, 2.0])
    A, B = combine_factors("svd", factors, rank=10)
    torch.testing.assert_close(B @ A, exact_sum(factors), rtol=0, atol=1e-12)
    torch.testing.assert_close(A @ A.mT, torch.eye(10, dtype=A.dtype)[None], rtol=0, atol=1e-12)


def test_combine_factors_svd_of_more_directions_than_the_layer_has_pads_with_zeros() -> None:
    factors = make_factors((1, 5, 6), [4, 4], [1.0, 1.0])
    A, B = combine_factors("svd", factors, rank=8)
    assert A.shape == (1, 8, 6)
    assert B.shape == (1, 5, 8)
    assert not A[:, 5:].any()
    assert not B[:, :, 5:].any()
    torch.testing.assert_close(B @ A, exact_sum(factors), rtol=0, atol=1e-12)


def test_combine_factors_linear_has_the_cross_terms_that_the_docstring_names() -> None:
    one, two = make_factors((1, 20, 30), [3, 3], [0.7, -1.3])
    A, B = combine_factors("linear", [one, two], rank=3)
    roots = [abs(f.coefficient) ** 0.5 for f in (one, two)]
    cross = -roots[0] * roots[1] * one.B @ two.A + roots[1] * roots[0] * two.B @ one.A
    torch.testing.assert_close(B @ A, exact_sum([one, two]) + cross, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weight", [1.0, -1.0, 0.25])
@pytest.mark.parametrize("kind", sorted(set(COMBINATION_TYPES) - set(PRUNING)))
def test_combine_factors_of_one_adapter_is_exact(kind: str, weight: float) -> None:
    factors = make_factors((1, 20, 30), [3], [weight])
    A, B = combine_factors(kind, factors, rank=3)
    torch.testing.assert_close(B @ A, exact_sum(factors), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", DENSE_SVD)
def test_combine_factors_dense_at_density_one_keeps_every_entry(kind: str) -> None:
    same = make_factors((1, 20, 30), [3], [1.0])[0]
    with pytest.warns(UserWarning, match="no pruning will be performed"):
        A, B = combine_factors(kind, [same, same], rank=3, density=1.0)
    # twice the same adapter: sums double it, TIES' disjoint mean does not
    factor = 1.0 if "ties" in kind else 2.0
    torch.testing.assert_close(B @ A, factor * same.scaling * same.B @ same.A, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", PRUNING)
def test_combine_factors_pruning_needs_a_density(kind: str) -> None:
    with pytest.raises(ValueError, match="needs a density"):
        combine_factors(kind, make_factors((1, 8, 8), [2, 2], [1.0, 1.0]), rank=2)


@pytest.mark.parametrize("kind", ["svd", "magnitude_prune_svd"])
def test_combine_factors_clamps_both_factors_at_the_quantile(kind: str) -> None:
    factors = make_factors((1, 20, 30), [3, 3], [1.0, 1.0])
    free_A, free_B = combine_factors(kind, factors, rank=6, density=0.5)
    bound = torch.quantile(torch.cat([free_B.flatten(), free_A.flatten()]), 0.9)
    A, B = combine_factors(kind, factors, rank=6, density=0.5, svd_clamp=0.9)
    torch.testing.assert_close(A, free_A.clamp(-bound, bound))
    torch.testing.assert_close(B, free_B.clamp(-bound, bound))
    assert (free_B != B).any()


def test_combine_factors_refuses_an_unknown_type() -> None:
    with pytest.raises(ValueError, match="Invalid combination_type: average"):
        combine_factors("average", make_factors((1, 8, 8), [2], [1.0]), rank=2)


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_combine_factors_leaves_its_arguments_alone(kind: str) -> None:
    factors = make_factors((1, 8, 9), [2, 2], [1.0, -1.0])
    before = [(f.A.clone(), f.B.clone()) for f in factors]
    combine_factors(kind, factors, rank=2, density=0.5)
    assert all(torch.equal(f.A, A) and torch.equal(f.B, B) for f, (A, B) in zip(factors, before))


@pytest.mark.parametrize(("rows", "rank", "columns"), [(30, 4, 20), (3, 8, 20), (30, 8, 5), (2, 9, 3)])
def test_svd_of_product_equals_the_dense_one(rows: int, rank: int, columns: int) -> None:
    B, A = torch.randn(rows, rank, dtype=torch.float64), torch.randn(rank, columns, dtype=torch.float64)
    U, S, Vh = svd_of_product(B, A)
    assert S.shape == (min(rows, rank, columns),)
    torch.testing.assert_close(S, torch.linalg.svdvals(B @ A)[: S.shape[0]], rtol=0, atol=1e-12)
    torch.testing.assert_close((U * S) @ Vh, B @ A, rtol=0, atol=1e-12)


def test_pad_rank_refuses_to_cut() -> None:
    with pytest.raises(ValueError, match="factors of rank 4 do not fit in rank 3"):
        pad_rank(torch.ones(1, 4, 5), 3, dim=1)


@pytest.mark.parametrize("q", [0.0, 0.01, 0.5, 0.937, 1.0])
def test_quantile_equals_torch(q: float) -> None:
    values = torch.randn(1001, dtype=torch.float64)
    torch.testing.assert_close(quantile(values, q), torch.quantile(values, q))


def test_quantile_of_more_values_than_torch_takes() -> None:
    values = torch.arange(2**24 + 2, dtype=torch.int32)
    assert quantile(values.double(), 0.5).item() == (2**24 + 1) / 2
