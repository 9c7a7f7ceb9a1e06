"""CLoQ-like: round the weight in the output metric (GPTQ), then the closed form for what that leaves."""

from __future__ import annotations

from torch import Tensor

from qlora_engine.inits import calibrated
from qlora_engine.inits.method import InitRequest, Method, Solution
from qlora_engine.rounding import Feedback, gptq


def solve(weight: Tensor, request: InitRequest) -> Solution:
    """GPTQ with scales searched by diag(H), of either sign unless ``request.scales`` is "mse"; then QERA."""
    metric = calibrated.OutputMetric(weight, request)
    base = calibrated.RoundedBase(weight, request, metric.importance)
    base.codes = gptq(weight.T.contiguous(), base.grid, Feedback.of(metric.hessian))
    fit = calibrated.closed_form(weight - base.dense(), metric, request)
    plain = calibrated.error_of_plain(weight, request, metric)
    return calibrated.solution(base.tensor(), fit, [plain, fit.left], 1)


METHOD = Method(
    "cloq",
    solve,
    source="Deng et al. 2025, arXiv:2501.18475; rounding by Frantar et al., arXiv:2210.17323",
    corrects=True,
    quantizes=True,
    needs_hessian=True,
)
