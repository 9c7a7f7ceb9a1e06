"""PiSSA: the factors are the weight's leading singular triplets, the base what they leave."""

from __future__ import annotations

import functools
from dataclasses import replace

from torch import Tensor

from qlora_engine.errors import InputError
from qlora_engine.inits.method import InitRequest, Method, Solution
from qlora_engine.lowrank import LowRankFactors, truncated_svd


def solve(weight: Tensor, request: InitRequest, *, applications: int | None = None) -> Solution:
    """``svd="exact"`` is PEFT's "pissa"; "fast" gives the same effective weight in a fraction of the time."""
    U, S, Vh = truncated_svd(
        weight, request.rank, method=request.svd, seed=request.svd_seed, applications=applications
    )
    return Solution(LowRankFactors.from_svd(U, S, Vh))


def _variant(name: str) -> Method:
    """``pissa_niter_N``: the fast SVD with N applications of W^T W."""
    count = name.removeprefix("pissa_niter_")
    if not count.isdecimal():
        raise InputError(f"unknown initialisation {name!r}; expected pissa or pissa_niter_N, N a number")

    def fast(weight: Tensor, request: InitRequest) -> Solution:
        return solve(weight, replace(request, svd="fast"), applications=int(count))

    return replace(METHOD, name=name, solve=functools.wraps(solve)(fast))


METHOD = Method("pissa", solve, source="Meng et al. 2024, arXiv:2404.02948", corrects=True, variant=_variant)
