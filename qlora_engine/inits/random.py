"""Both factors random, as two layers that nothing initialised: the adapter is not an identity. For tests."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_engine.inits.default import uniform
from qlora_engine.inits.method import InitRequest, Method, Solution
from qlora_engine.lowrank import LowRankFactors


def solve(weight: Tensor, request: InitRequest) -> Solution:
    out_features, in_features = weight.shape
    generator, rank = request.generator(), request.rank
    if request.kind == "embedding":
        A = torch.randn(rank, in_features, generator=generator)
        B = torch.randn(out_features, rank, generator=generator)
    else:
        A = uniform(rank, in_features, generator)
        B = uniform(out_features, rank, generator)
    return Solution(LowRankFactors(A.to(weight.device), B.to(weight.device)))


METHOD = Method("random", solve, source="PEFT's init_lora_weights=False")
