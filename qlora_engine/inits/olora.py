"""OLoRA: B the first r columns of Q, A the first r rows of R, of the weight's QR decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_engine.inits.method import InitRequest, Method, Solution
from qlora_engine.lowrank import LowRankFactors


def solve(weight: Tensor, request: InitRequest) -> Solution:
    """Q's first r columns come from the weight's first r, and R = Q^T W: no full decomposition."""
    Q, _ = torch.linalg.qr(weight[:, : request.rank])  # (out, r)
    return Solution(LowRankFactors(Q.T @ weight, Q.contiguous()))


METHOD = Method("olora", solve, source="Büyükakyüz 2024, arXiv:2406.01775", corrects=True)
