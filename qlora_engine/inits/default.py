"""The default of LoRA: A as nn.Linear starts its weight, B zero. For embeddings A standard normal, B zero."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_engine.inits.method import InitRequest, Method, Solution
from qlora_engine.lowrank import LowRankFactors


def uniform(rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    """nn.Linear's start, Kaiming-uniform with a = sqrt(5): uniform in +-1/sqrt(columns), (rows, columns)."""
    return (torch.rand(rows, columns, generator=generator) * 2 - 1) / columns**0.5


def start(weight: Tensor, request: InitRequest) -> LowRankFactors:
    """A random, B zero: the layer's output does not change, and B's gradient is not zero."""
    out_features, in_features = weight.shape
    if request.kind == "embedding":
        A = torch.randn(request.rank, in_features, generator=request.generator())
    else:
        A = uniform(request.rank, in_features, request.generator())
    return LowRankFactors(A.to(weight.device), weight.new_zeros(out_features, request.rank))


def solve(weight: Tensor, request: InitRequest) -> Solution:
    return Solution(start(weight, request))


METHOD = Method("default", solve, source="Hu et al. 2021, arXiv:2106.09685; PEFT's init_lora_weights=True")
