"""The alternation itself: its trace, what it keeps, when it stops, and its start."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_engine import inits
from qlora_engine.inits import InitRequest, Solution, initialise, loftq
from quant import QuantizedTensor, QuantSpec, quantize


def gaussian(out_features: int = 192, in_features: int = 256) -> Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(3))


def solve(
    W: Tensor, format_name: str = "nf4", rank: int = 8, *, double_quant: bool = False, **options
) -> Solution:
    return loftq.solve(W, InitRequest(rank, QuantSpec(format_name, 64, double_quant), **options))


def left(W: Tensor, solution: Solution) -> float:
    assert solution.base is not None
    E = W.double() - solution.base.dequantize().double() - solution.factors.product().double()
    return float(E.norm() / W.double().norm())


def by_hand(W: Tensor, spec: QuantSpec, rank: int, iters: int, scales: str) -> list[float]:
    """Algorithm 1 with exact SVDs in float64: the error after every iteration."""
    BA, errors = torch.zeros_like(W), []
    for _ in range(iters):
        Q = quantize(W - BA, spec, scales=scales).dequantize()
        U, S, Vh = torch.linalg.svd((W - Q).double(), full_matrices=False)
        BA = ((U[:, :rank] * S[:rank]) @ Vh[:rank]).float()
        errors.append(float((W - Q - BA).double().norm() / W.double().norm()))
    return errors


@pytest.mark.parametrize("format_name", ["nf4", "nf3", "int4", "fp4"])
@pytest.mark.parametrize("scales", ["absmax", "signed-mse"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_trace_is_algorithm_1(format_name: str, scales: str, double_quant: bool) -> None:
    W = gaussian()
    solution = solve(W, format_name, scales=scales, double_quant=double_quant)
    expected = by_hand(W, QuantSpec(format_name, 64, double_quant), 8, 5, scales)
    # The fast SVD sends the alternation a slightly different way, as often to a lower error.
    assert solution.trace[1:] == pytest.approx(expected, rel=3e-3)
    assert solution.trace[solution.best] == pytest.approx(left(W, solution), rel=1e-4)


def test_trace_begins_with_plain_quantisation() -> None:
    W = gaussian()
    for scales in ("absmax", "mse"):
        solution = solve(W, scales=scales)
        plain = quantize(W, QuantSpec("nf4"), scales=scales).dequantize()
        assert solution.trace[0] == pytest.approx(float((W - plain).norm() / W.norm()), rel=1e-5)
        assert (solution.error_plain is None) == (scales != "absmax")


@pytest.mark.parametrize("iters", [1, 2, 3, 7])
def test_iters_is_the_number_of_alternations(iters: int) -> None:
    solution = solve(gaussian(), iters=iters)
    assert len(solution.trace) == iters + 1
    assert solution.best == iters  # at 4 bits it falls every time


@pytest.mark.parametrize("format_name", ["nf2", "uint2"])
def test_a_rising_error_ends_the_loop_and_the_best_is_kept(format_name: str) -> None:
    W = gaussian(512, 512)
    solution = solve(W, format_name, rank=16, iters=40)
    assert 3 <= solution.best < len(solution.trace) - 1 < 40
    assert solution.trace[solution.best] == min(solution.trace)
    assert solution.trace[-1] > solution.trace[-2]
    assert left(W, solution) == pytest.approx(min(solution.trace), rel=1e-4)


def test_the_plain_base_is_kept_where_nothing_is_better() -> None:
    """A weight that the format holds exactly: no correction is as good as none."""
    spec = QuantSpec("nf4")
    W = quantize(gaussian(), spec).dequantize()
    solution = solve(W)
    assert (solution.trace[0], solution.best) == (0.0, 0)
    assert not solution.factors.B.any()
    assert solution.base is not None
    assert torch.equal(solution.base.codes, quantize(W, spec).codes)


def test_exact_and_fast_agree() -> None:
    W = gaussian(512, 512)
    for iters in (1, 5):
        fast, exact = (solve(W, rank=16, iters=iters, svd=svd) for svd in ("fast", "exact"))
        assert left(W, fast) <= 1.001 * left(W, exact)


def test_warm_starts_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []
    real = loftq.truncated_svd

    def spy(matrix: Tensor, rank: int, **options):
        starts.append(options["start"])
        return real(matrix, rank, **options)

    monkeypatch.setattr(loftq, "truncated_svd", spy)
    solve(gaussian(), iters=3)
    assert [start is None for start in starts] == [True, False, False]
    assert starts[1].shape == (256, 8)


def test_the_kept_base_is_packed_and_its_residual_is_against_what_is_stored() -> None:
    """With double quantisation the scales move after the codes are chosen; the factors must see the move."""
    W = gaussian(512, 512) * torch.logspace(-2, 0, 512).unsqueeze(1)  # so that the 8-bit scales are coarse
    solution = solve(W, rank=16, double_quant=True)
    assert isinstance(solution.base, QuantizedTensor)
    assert solution.base.scales.dtype == torch.uint8
    assert left(W, solution) == pytest.approx(solution.trace[solution.best], rel=1e-4)
    # Requantising a dequantised base, as a checkpoint without its codes must, is what costs accuracy.
    again = quantize(solution.base.dequantize(), solution.base.spec).dequantize()
    drifted = float((W - again - solution.factors.product()).norm() / W.norm())
    assert drifted > 1.001 * solution.trace[solution.best]


def test_qpissa_is_loftq_from_the_svd() -> None:
    W = gaussian(512, 512)
    spec = QuantSpec("nf4")
    one = initialise(W, method="qpissa", rank=16, spec=spec)
    same = initialise(W, method="loftq", rank=16, spec=spec, start="svd")
    zero = initialise(W, method="loftq", rank=16, spec=spec)
    assert torch.equal(one.A, same.A)
    assert one.trace[0] == zero.trace[0]
    assert one.trace[1] < zero.trace[1]
    assert one.error < zero.error  # on a Gaussian; not on every weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_gains(bits: int) -> None:
    format_name = {2: "nf2", 3: "nf3", 4: "nf4", 8: "int8"}[bits]
    done = inits.initialise(gaussian(), method="loftq", rank=8, spec=QuantSpec(format_name))
    assert done.error_plain is not None
    assert done.error < 0.95 * done.error_plain
    assert done.iterations == len(done.trace) - 1


# What is left after each iteration; the plain base's first. What is kept, and where the alternation ends.
TRACES = [
    ((1.0, 0.9, 0.7, 0.8, 0.6), 2, 4),  # it ends where it gets worse, though still below the first
    ((1.0, 0.9, 0.8, 0.7, 0.6), 4, 5),
    ((1.0, 0.9, 0.9, 0.9, 0.8), 4, 5),  # as good is not worse
    ((1.0, 0.9, 0.95, 0.1, 0.1), 1, 3),
    ((0.5, 0.9, 0.8, 0.7, 0.6), 0, 5),  # plain is better than all
    ((0.6, 0.9, 0.8, 0.7, 0.6), 0, 5),  # and when it is as good
]


@pytest.mark.parametrize(("left", "best", "length"), TRACES)
def test_which_iterate_is_kept(
    left: tuple[float, ...], best: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loftq._chosen(list(left)) == (best, left[:length])
    errors = iter(left)
    monkeypatch.setattr(loftq, "relative", lambda *_: next(errors))
    request = InitRequest(4, QuantSpec("nf4", 64), iters=4)
    solution = loftq.solve(torch.randn(64, 64), request)
    assert (solution.best, solution.trace) == (best, left[:length])
    assert (solution.factors.B == 0).all() == (best == 0)


@pytest.mark.parametrize("start", ["zero", "svd"])
@pytest.mark.parametrize("scales", ["absmax", "signed-mse"])
def test_many_are_solved_as_one_by_one(start: str, scales: str) -> None:
    weights = torch.randn(3, 96, 64)
    request = InitRequest(4, QuantSpec("nf3", 64), iters=3, start=start, scales=scales)
    for alone, together in zip(
        [loftq.solve(weight, request) for weight in weights],
        loftq.solve_many(weights, [request] * 3),
        strict=True,
    ):
        assert together.trace == pytest.approx(alone.trace, rel=1e-4)
        assert together.best == alone.best
        assert (together.error_plain is None) == (alone.error_plain is None) == (scales != "absmax")
        difference = together.factors.product() - alone.factors.product()
        assert float(difference.norm() / alone.factors.product().norm()) < 0.05
