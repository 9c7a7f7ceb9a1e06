"""EVA: A spans the inputs' principal directions, B is zero."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_engine.errors import InputError
from qlora_engine.inits.method import InitRequest, Method, Solution
from qlora_engine.lowrank import LowRankFactors, truncated_svd


def solve(weight: Tensor, request: InitRequest) -> Solution:
    """A (r, in): eigenvectors of the inputs' covariance, each with its largest element positive.

    Without ``request.mean`` the second moment is taken for the covariance. ``request.whiten`` divides every
    direction by the root of its singular value in the centred (tokens, in) matrix of inputs.

    Raises:
        InputError: fewer tokens than the rank; ``whiten`` without ``tokens``.
    """
    assert request.hessian is not None
    rank, tokens = request.rank, request.tokens
    if tokens is not None and tokens < rank:
        raise InputError(f"eva: {tokens} inputs were seen, fewer than the rank {rank}")
    covariance = request.hessian.float()
    if request.mean is not None:
        covariance = torch.addr(covariance, request.mean.float(), request.mean.float(), alpha=-1)
    _, variances, directions = truncated_svd(covariance, rank, method=request.svd, seed=request.svd_seed)
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))  # (r, 1)
    A = directions * torch.where(largest < 0, -1.0, 1.0)
    if request.whiten:
        if tokens is None:
            raise InputError("eva: whitening needs the count of tokens behind the second moment")
        A = A / (variances * tokens).pow(0.25).clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    return Solution(LowRankFactors(A.to(weight.device), weight.new_zeros(weight.shape[0], rank)))


METHOD = Method("eva", solve, source="Paischer et al. 2024, arXiv:2410.07170", needs_hessian=True)
