"""QERA alternated: quantise what the correction leaves, correct what quantising left, by output error."""

from __future__ import annotations

from torch import Tensor

from qlora_engine.inits import calibrated
from qlora_engine.inits.method import InitRequest, Method, Solution
from qlora_engine.lowrank import LowRankFactors


def solve(weight: Tensor, request: InitRequest) -> Solution:
    """Up to ``request.iters`` alternations with nearest codes; the best is kept, a rising error ends it.

    LoftQ in the metric of the layer's output. A scale search is weighted by diag(H).
    """
    metric = calibrated.OutputMetric(weight, request)
    trace = [calibrated.error_of_plain(weight, request, metric)]
    previous: LowRankFactors | None = None
    kept = None
    for iteration in range(1, request.iters + 1):
        target = weight if previous is None else weight - previous.product()
        base = calibrated.plainly_quantised(target, request, metric)
        fit = calibrated.closed_form(weight - base.dequantize(), metric, request, previous)
        trace.append(fit.left)
        if kept is None or fit.left < kept[1].left:
            kept = base, fit, iteration
        elif trace[-1] > trace[-2]:
            break
        previous = fit.factors
    assert kept is not None
    return calibrated.solution(kept[0], kept[1], trace, kept[2])


METHOD = Method(
    "qera-alternating",
    solve,
    source="Li et al. 2023, arXiv:2310.08659, with the closed form of arXiv:2410.06040",
    corrects=True,
    quantizes=True,
    needs_hessian=True,
    diagonal_hessian=True,
)
