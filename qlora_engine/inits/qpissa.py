"""QPiSSA: LoftQ's alternation, started from the SVD of the weight instead of zero."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from qlora_engine.inits import loftq
from qlora_engine.inits.method import InitRequest, Method, Solution


def solve(weight: Tensor, request: InitRequest) -> Solution:
    return loftq.solve(weight, replace(request, start="svd"))


METHOD = Method(
    "qpissa", solve, source="Meng et al. 2024, arXiv:2404.02948, section 4", corrects=True, quantizes=True
)
