"""QERA exact: plain quantisation, then the best low-rank correction of the layer's output."""

from __future__ import annotations

from torch import Tensor

from qlora_engine.inits import calibrated
from qlora_engine.inits.method import InitRequest, Method, Solution


def solve(weight: Tensor, request: InitRequest) -> Solution:
    """Quantise by ``request.scales`` (a search is weighted by diag(H)), then the closed form in H."""
    metric = calibrated.OutputMetric(weight, request)
    base = calibrated.plainly_quantised(weight, request, metric)
    fit = calibrated.closed_form(weight - base.dequantize(), metric, request)
    plain = calibrated.error_of_plain(weight, request, metric)
    return calibrated.solution(base, fit, [plain, fit.left], 1)


METHOD = Method(
    "qera",
    solve,
    source="Zhang et al. 2024, arXiv:2410.06040, theorem 1",
    corrects=True,
    quantizes=True,
    needs_hessian=True,
    diagonal_hessian=True,
)
