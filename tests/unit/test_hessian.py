from __future__ import annotations

import math

import pytest
import torch

from qlora_engine.hessian import (
    _CAUTION,
    _MOST,
    CrossMoment,
    SecondMoment,
    condition,
    dead_inputs,
    diagonal,
    energy,
    ieee_float32,
    mirror_,
    pack_upper,
    shrink,
    unpack_upper,
)
from qlora_engine.rounding import Grid, gptq
from quant import QuantSpec, quantize


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


@pytest.mark.parametrize("diagonal", [False, True])
def test_no_token_and_one(diagonal: bool) -> None:
    x, moment = torch.randn(1, 5), SecondMoment(5, diagonal=diagonal)
    assert not moment.mean().any()
    assert not moment.mean_input().any()
    moment.add(x)
    wanted = x[0].square() if diagonal else x.T @ x
    torch.testing.assert_close(moment.mean(), wanted)
    torch.testing.assert_close(moment.mean_input(), x[0])
    torch.testing.assert_close(moment.mean(release=True), wanted)
    cross = CrossMoment(5)
    assert not cross.mean().any()
    cross.add(2 * x, x)
    torch.testing.assert_close(cross.mean(), 2 * x.T @ x)
    torch.testing.assert_close(cross.mean(release=True), 2 * x.T @ x)


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


def test_shrink_reduces_correlations_only() -> None:
    x = torch.randn(300, 40) + 1
    hessian = x.T @ x / 300
    shrunk = shrink(hessian, 0.25)
    assert torch.equal(shrunk.diagonal(), hessian.diagonal())
    off = ~torch.eye(40, dtype=torch.bool)
    assert torch.equal(shrunk[off], hessian[off] * 0.75)
    assert torch.equal(shrink(hessian, 0.0), hessian)
    assert torch.equal(shrink(hessian.diagonal(), 0.5), hessian.diagonal())


def chance_in(few: torch.Tensor, exact: torch.Tensor) -> float:
    """What part of the squared correlations in ``few`` is off the true ones."""
    off = ~torch.eye(few.shape[0], dtype=torch.bool)
    scale = exact.diagonal().sqrt()
    found, true = (few / scale / scale[:, None])[off], (exact / scale / scale[:, None])[off]
    return float((found - true).square().sum() / found.square().sum())


@pytest.mark.parametrize(("tokens", "strength"), [(512, 0.5), (2048, 0.5), (2048, 2.0), (20_000, 0.5)])
def test_shrinkage_estimates_the_chance_correlations(tokens: int, strength: float) -> None:
    mix = torch.eye(128) + strength * torch.randn(128, 16) @ torch.randn(16, 128) / 16
    mix = mix * torch.logspace(-2, 2, 128)
    moment = SecondMoment(128)
    for rows in (torch.randn(tokens, 128) @ mix).split(400):  # unequal batches
        moment.add(rows)
    mean = moment.mean()
    # 32 sketches give a tenth, few units and the fixed scales the rest.
    expected = min(_CAUTION * chance_in(mean, mix.T @ mix), _MOST)
    assert moment.shrinkage(mean) == pytest.approx(expected, rel=0.6)


@pytest.mark.parametrize("width", [40, 1030])
def test_shrinkage_of_one_text_is_that_of_independent_tokens(width: int) -> None:
    """1030: more than are looked at in one piece."""
    x = torch.randn(50, 1) * torch.ones(width) + 0.3 * torch.randn(50, width)
    x *= torch.linspace(0.1, 10, width)
    moment = SecondMoment(width)
    moment.add(x)
    scaled = x.double() / x.double().square().mean(0).sqrt()
    R = scaled.T @ scaled / 50
    correlated = float(R.square().sum() - R.diagonal().square().sum())
    expected = _CAUTION * (correlated + width**2) / 50 / correlated
    assert expected < _MOST
    assert moment.shrinkage(moment.mean()) == pytest.approx(expected, rel=1e-4)


def test_shrinkage_sees_that_neighbours_repeat_each_other() -> None:
    """100 texts that repeat one row tell as much as 100 rows."""
    mix = torch.eye(64) + torch.randn(64, 8) @ torch.randn(8, 64) / 8
    rows = torch.randn(400, 64) @ mix
    once, often = SecondMoment(64), SecondMoment(64)
    once.add(rows[:, None])  # 400 texts of a token
    often.add(rows[:, None].expand(400, 50, 64))
    torch.testing.assert_close(once.mean(), often.mean(), rtol=1e-3, atol=1e-3)
    shares = [moment.shrinkage(moment.mean()) for moment in (once, often)]
    assert shares[1] == pytest.approx(shares[0], rel=1e-2)
    assert shares[0] > 0.05


def test_shrinkage_at_the_ends() -> None:
    assert SecondMoment(8).shrinkage(torch.zeros(8, 8)) == 0
    one = SecondMoment(64)
    one.add(torch.randn(30, 64))  # a single unit, as if normal: nothing but chance
    assert one.shrinkage(one.mean()) == _MOST
    diagonal_one = SecondMoment(64, diagonal=True)
    diagonal_one.add(torch.randn(30, 64))
    assert diagonal_one.shrinkage(diagonal_one.mean()) == 0
    narrow = SecondMoment(1)
    narrow.add(torch.randn(30, 1))
    assert narrow.shrinkage(narrow.mean()) == 0
    dead = SecondMoment(64)
    dead.add(torch.randn(2000, 64) * (torch.arange(64) < 60))
    assert 0 < dead.shrinkage(dead.mean()) <= _MOST


def test_shrinkage_forgets_what_is_taken_away() -> None:
    mix = torch.eye(16) + torch.randn(16, 4) @ torch.randn(4, 16)
    x, y = torch.randn(4, 700, 16) @ mix, torch.randn(3, 500, 16) @ mix
    moment, expected = SecondMoment(16), SecondMoment(16)
    for rows in (x, y):
        moment.add(rows)
    expected.add(x)
    copied = moment.copy()
    copied.add(y, sign=-1)
    assert copied.shrinkage(copied.mean()) == pytest.approx(expected.shrinkage(expected.mean()), rel=1e-3)
    assert moment.shrinkage(moment.mean()) != copied.shrinkage(copied.mean())


def test_rounding_in_a_shrunk_hessian_holds_on_other_text() -> None:
    """GPTQ fits the correlations of a few tokens; on others it is then worse than with fewer correlations."""
    mix = torch.eye(64) + 0.2 * torch.randn(64, 8) @ torch.randn(8, 64) / 8
    few, many = (torch.randn(n, 64) @ mix for n in (96, 20_000))
    other = many.T @ many / 20_000
    weight, spec = torch.randn(128, 64), QuantSpec("nf2", 64)
    scales = quantize(weight, spec, scales="mse").dense_scales()
    grid = Grid(torch.tensor(spec.fmt.levels), scales, None, (128, 64), 64)

    def error(hessian: torch.Tensor) -> float:
        codes = gptq(weight.T.contiguous(), grid, hessian)
        return energy(weight - grid.values(codes).T, other)

    moment = SecondMoment(64)
    moment.add(few.reshape(6, 16, 64))
    counted = moment.mean()
    assert error(shrink(counted, moment.shrinkage(counted))) < 0.95 * error(counted)


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
            setting = torch.backends.cuda.matmul  # torch < 2.9 has the older name alone
            inside = setting.fp32_precision if hasattr(setting, "fp32_precision") else setting.allow_tf32
            assert inside in ("ieee", False)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
