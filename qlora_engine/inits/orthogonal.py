"""Both factors random and not zero, yet B @ A = 0: their inner sides span orthogonal halves of the rank."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_engine.errors import InputError
from qlora_engine.inits.method import InitRequest, Method, Solution
from qlora_engine.lowrank import LowRankFactors


def solve(weight: Tensor, request: InitRequest) -> Solution:
    """The odd rows of a random orthogonal matrix carry A, the even ones B; entries have variance 1/200.

    Raises:
        InputError: odd rank.
    """
    rank, (out_features, in_features) = request.rank, weight.shape
    if rank % 2:
        raise InputError(f"orthogonal initialisation needs an even rank, got {rank}")
    generator = request.generator()
    Q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))
    # (rank, in) and (out, rank), drawn in PEFT's order and shapes: one seed, the same factors.
    A = Q[0::2].T @ torch.randn(in_features, rank // 2, generator=generator).T / 10
    B = torch.randn(rank // 2, out_features, generator=generator).T @ Q[1::2] / 10
    return Solution(LowRankFactors(A.to(weight.device), B.to(weight.device)))


METHOD = Method(
    "orthogonal",
    solve,
    source="PEFT's init_lora_weights='orthogonal'; datta0.github.io/posts/rethink-lora-init",
)
