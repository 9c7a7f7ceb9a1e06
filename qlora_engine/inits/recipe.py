"""The full recipe: round in the metric that is left beside the adapter, fit the adapter, and again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_engine.inits import calibrated, qera_alternating
from qlora_engine.inits.method import InitRequest, Method, Solution
from qlora_engine.lowrank import LowRankFactors, truncated_svd
from qlora_engine.rounding import Feedback, Grid, anneal, coordinate_descent, downdate, gptq, objective

# Relative gain of J^(1/2) below which a round is the last.
_LEAST_GAIN = 5e-5


@dataclass(frozen=True)
class Schedule:
    """How much is spent.

    Attributes:
        rounds: T, alternations after the first closed form.
        warm: Times that GPTQ is repeated with refitted scales before the first closed form.
        again: Try GPTQ again in every round, row by row beside the present codes.
        sweeps: Of annealed coordinate descent in a round; 0: one plain sweep.
        temperature: Of the annealing's first sweep.
        damping: GPTQ's own, a multiple of the mean of diag(M).
    """

    rounds: int
    warm: int = 1
    again: bool = True
    sweeps: int = 6
    temperature: float = 0.1
    damping: float = 0.1


def run(weight: Tensor, request: InitRequest, schedule: Schedule) -> Solution:
    """Alternate between the base, rounded in what A leaves of H, and the factors' closed form.

    With A fixed and B free, the error that B can follow is free, so the base is rounded in
    M = H - H A^T (A H A^T)^-1 A H. J never rises after the first closed form; the best iterate is kept.
    Where only H's diagonal is known, rounding has nothing to feed back and the alternating QERA takes over.
    """
    assert request.hessian is not None
    if request.hessian.ndim == 1:
        scales = "signed-mse" if request.scales == "absmax" else request.scales
        return qera_alternating.solve(weight, replace(request, scales=scales, iters=schedule.rounds + 1))
    metric = calibrated.OutputMetric(weight, request)
    trace = [calibrated.error_of_plain(weight, request, metric)]
    generator = torch.Generator(weight.device).manual_seed(request.svd_seed)
    target = weight.T.contiguous()
    _, _, A = truncated_svd(metric.hessian, request.rank, method=request.svd, seed=request.svd_seed)
    M = downdate(metric.hessian, A)
    base = calibrated.RoundedBase(weight, request, M.diagonal())
    feedback = Feedback.of(M, schedule.damping)
    base.codes = gptq(target, base.grid, feedback)
    for _ in range(schedule.warm):
        base.refit(target, M)
        _round_again(target, base, M, feedback)
    del feedback
    fit = calibrated.closed_form(weight - base.dense(), metric, request)
    trace.append(fit.left)
    kept, best = (base.tensor(), fit), 1
    for _ in range(schedule.rounds):
        fit = _improve(weight, base, fit.factors, metric, request, schedule, generator)
        trace.append(fit.left)
        if fit.left < kept[1].left:
            kept, best = (base.tensor(), fit), len(trace) - 1
        if not trace[-1] < trace[-2] * (1 - _LEAST_GAIN):
            break
    return calibrated.solution(*kept, trace, best)


def _improve(
    weight: Tensor,
    base: calibrated.RoundedBase,
    factors: LowRankFactors,
    metric: calibrated.OutputMetric,
    request: InitRequest,
    schedule: Schedule,
    generator: torch.Generator,
) -> calibrated.Fit:
    """One round: scales, codes, factors; changes ``base``."""
    M = downdate(metric.hessian, factors.A)
    target = (weight - factors.product()).T.contiguous()
    base.refit(target, M)
    if schedule.again:
        _round_again(target, base, M, Feedback.of(M, schedule.damping))
    if schedule.sweeps:
        base.codes = anneal(
            target,
            base.codes,
            base.grid,
            M,
            sweeps=schedule.sweeps,
            temperature=schedule.temperature,
            generator=generator,
        )
    else:
        base.codes = coordinate_descent(target, base.codes, base.grid, M)
    return calibrated.closed_form(weight - base.dense(), metric, request, factors)


def _round_again(target: Tensor, base: calibrated.RoundedBase, M: Tensor, feedback: Feedback) -> None:
    """GPTQ under the present scales; a row takes the new codes if they are better."""
    codes = gptq(target, base.grid, feedback)
    better = _cost(target, codes, base.grid, M) < _cost(target, base.codes, base.grid, M)
    base.codes = torch.where(better, codes, base.codes)


def _cost(target: Tensor, codes: Tensor, grid: Grid, M: Tensor) -> Tensor:
    return objective(target - grid.values(codes), M)


def solve(weight: Tensor, request: InitRequest) -> Solution:
    """The recipe with T = ``request.iters`` rounds."""
    return run(weight, request, Schedule(request.iters))


METHOD = Method(
    "recipe",
    solve,
    source="QERA (arXiv:2410.06040), GPTQ (arXiv:2210.17323) and CALDERA's alternation (arXiv:2405.18886)",
    corrects=True,
    quantizes=True,
    needs_hessian=True,
    diagonal_hessian=True,
)
