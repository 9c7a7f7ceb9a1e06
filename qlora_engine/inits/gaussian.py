"""A normal with standard deviation 1/rank, B zero. Embeddings as by default."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_engine.inits import default
from qlora_engine.inits.method import InitRequest, Method, Solution
from qlora_engine.lowrank import LowRankFactors


def solve(weight: Tensor, request: InitRequest) -> Solution:
    if request.kind == "embedding":
        return default.solve(weight, request)
    out_features, in_features = weight.shape
    A = torch.randn(request.rank, in_features, generator=request.generator()) / request.rank
    return Solution(LowRankFactors(A.to(weight.device), weight.new_zeros(out_features, request.rank)))


METHOD = Method("gaussian", solve, source="PEFT's init_lora_weights='gaussian'")
