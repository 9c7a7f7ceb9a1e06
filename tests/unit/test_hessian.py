from __future__ import annotations

import math

import pytest
import torch

from qlora_engine.hessian import (
    CrossMoment,
    SecondMoment,
    condition,
    dead_inputs,
    diagonal,
    energy,
    ieee_float32,
    mirror_,
    pack_upper,
    unpack_upper,
)


@pytest.mark.parametrize("width", [1, 5, 127, 128, 300, 1100])
def test_add_is_the_mean_outer_product_and_symmetric(width: int) -> None:
    x = torch.randn(3, 7, width)
    moment = SecondMoment(width)
    moment.add(x[:2])
    moment.add(x[2:])
    rows = x.reshape(-1, width).double()
    assert moment.tokens == 21
    torch.testing.assert_close(moment.mean().double(), rows.T @ rows / 21, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moment.mean_input().double(), rows.mean(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(moment.mean(), moment.mean().T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_add_converts_before_it_multiplies(dtype: torch.dtype) -> None:
    x = (torch.randn(50, 8) * 300).to(dtype)  # squares overflow float16
    moment = SecondMoment(8)
    moment.add(x)
    torch.testing.assert_close(moment.mean(), (x.double().T @ x.double() / 50).float(), rtol=1e-5, atol=0.1)


def test_add_takes_away_what_it_added() -> None:
    x, y = torch.randn(40, 6), torch.randn(30, 6)
    moment, expected = SecondMoment(6), SecondMoment(6)
    for rows in (x, y):
        moment.add(rows)
    expected.add(x)
    moment.add(y, sign=-1)
    assert moment.tokens == 40
    torch.testing.assert_close(moment.mean(), expected.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moment.mean_input(), expected.mean_input(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moment.copy().mean_input(), moment.mean_input())


def test_add_refuses_another_width() -> None:
    with pytest.raises(ValueError, match=r"\(4, 5\).*6 features"):
        SecondMoment(6).add(torch.randn(4, 5))
    with pytest.raises(ValueError, match="positive"):
        SecondMoment(0)


def test_diagonal_is_the_diagonal_of_the_full_one() -> None:
    x = torch.randn(64, 33)
    full, diag = SecondMoment(33), SecondMoment(33, diagonal=True)
    full.add(x)
    diag.add(x)
    assert diag.mean().shape == (33,)
    torch.testing.assert_close(diag.mean(), full.mean().diagonal())
    assert torch.equal(diagonal(full.mean()), full.mean().diagonal())
    assert torch.equal(diagonal(diag.mean()), diag.mean())


def test_add_ids_gives_token_frequencies() -> None:
    moment = SecondMoment(5, diagonal=True)
    moment.add_ids(torch.tensor([[0, 1, 1], [4, 1, 0]]))
    moment.add_ids(torch.tensor([], dtype=torch.long))
    torch.testing.assert_close(moment.mean(), torch.tensor([2 / 6, 3 / 6, 0, 0, 1 / 6]))
    assert torch.equal(moment.mean_input(), moment.mean())
    with pytest.raises(IndexError, match="5 embeddings"):
        moment.add_ids(torch.tensor([5]))
    with pytest.raises(ValueError, match="diagonal=True"):
        SecondMoment(5).add_ids(torch.tensor([1]))


def test_mean_of_no_token_is_zero() -> None:
    assert torch.equal(SecondMoment(3).mean(), torch.zeros(3, 3))


def test_mean_can_release_the_sum() -> None:
    x = torch.randn(9, 200)
    kept, released = SecondMoment(200), SecondMoment(200)
    kept.add(x)
    released.add(x)
    pointer = released.sum.data_ptr()
    mean = released.mean(release=True)
    assert torch.equal(mean, kept.mean())
    assert mean.data_ptr() == pointer
    with pytest.raises(RuntimeError, match="released"):
        released.add(x)


def test_copy_is_independent() -> None:
    moment = SecondMoment(4)
    moment.add(torch.randn(5, 4))
    other = moment.copy()
    assert torch.equal(other.mean(), moment.mean())
    other.add(torch.randn(5, 4))
    assert (moment.tokens, other.tokens) == (5, 10)
    assert not torch.equal(other.mean(), moment.mean())


def test_cross_moment() -> None:
    y, x = torch.randn(2, 30, 6), torch.randn(2, 30, 6)
    moment = CrossMoment(6)
    moment.add(y[0], x[0])
    moment.add(y[1], x[1])
    expected = y.reshape(-1, 6).double().T @ x.reshape(-1, 6).double() / 60
    torch.testing.assert_close(moment.mean().double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="twice"):
        moment.add(y[0], x[0][:5])
    other = moment.copy()
    other.add(y[1], x[1], sign=-1)
    assert (moment.tokens, other.tokens) == (60, 30)
    torch.testing.assert_close(
        other.mean().double(), y[0].double().T @ x[0].double() / 30, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("n", [1, 2, 9, 1030, 2050])
def test_pack_upper_round_trip(n: int) -> None:
    matrix = mirror_(torch.randn(n, n))
    assert torch.equal(matrix, matrix.T)
    packed = pack_upper(matrix)
    assert packed.shape == (n * (n + 1) // 2,)
    assert torch.equal(unpack_upper(packed, n), matrix)


def test_unpack_upper_refuses_another_size() -> None:
    with pytest.raises(ValueError, match="4 columns"):
        unpack_upper(torch.zeros(9), 4)


def test_dead_inputs() -> None:
    x = torch.randn(20, 4)
    x[:, 2] = 0
    moment = SecondMoment(4)
    moment.add(x)
    assert dead_inputs(moment.mean()).tolist() == [False, False, True, False]
    assert dead_inputs(torch.tensor([1.0, 0.0])).tolist() == [False, True]


def test_energy_is_the_mean_squared_output() -> None:
    x, error = torch.randn(500, 12), torch.randn(7, 12)
    moment = SecondMoment(12)
    moment.add(x)
    expected = float((x.double() @ error.double().T).square().sum(1).mean())
    assert energy(error, moment.mean()) == pytest.approx(expected, rel=1e-5)
    assert energy(error, None) == pytest.approx(float(error.square().sum()), rel=1e-6)
    weights = torch.rand(12)
    assert energy(error, weights) == pytest.approx(energy(error, torch.diag(weights)), rel=1e-5)


@pytest.mark.parametrize("n", [8, 100, 700])
def test_condition_is_close_to_the_eigenvalues(n: int) -> None:
    x = torch.randn(4 * n, n) * torch.logspace(0, -2, n)
    moment = SecondMoment(n)
    moment.add(x)
    values = torch.linalg.eigvalsh(moment.mean().double())
    exact = float(values[-1] / values[0])
    # Rayleigh quotients err low only; half is far beyond the few per cent seen.
    assert 0.8 * exact <= condition(moment.mean()) <= exact * (1 + 1e-6)
    assert condition(moment.mean()) == condition(moment.mean())


def test_condition_of_a_singular_matrix_is_infinite() -> None:
    x = torch.randn(50, 10)
    x[:, 3] = 0
    moment = SecondMoment(10)
    moment.add(x)
    assert condition(moment.mean()) == math.inf
    assert condition(torch.tensor([1.0, 0.0])) == math.inf
    assert condition(torch.tensor([4.0, 0.5])) == 8.0


def test_ieee_float32_restores_what_it_found() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with ieee_float32():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
