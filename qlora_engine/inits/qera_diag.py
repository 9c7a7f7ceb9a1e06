"""QERA approximate: the closed form with H's diagonal alone, where H is too wide to hold or to factorise."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from qlora_engine.hessian import diagonal
from qlora_engine.inits import qera
from qlora_engine.inits.method import InitRequest, Method, Solution


def solve(weight: Tensor, request: InitRequest) -> Solution:
    """QERA with every input taken as uncorrelated with the others."""
    assert request.hessian is not None
    return qera.solve(weight, replace(request, hessian=diagonal(request.hessian)))


METHOD = Method(
    "qera-diag",
    solve,
    source="Zhang et al. 2024, arXiv:2410.06040, theorem 2",
    corrects=True,
    quantizes=True,
    needs_hessian=True,
    diagonal_hessian=True,
)
