"""QLoRA: quantise the base, start the factors as LoRA does."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_engine.inits import default
from qlora_engine.inits.method import InitRequest, Method, Solution, frobenius, relative
from quant import quantize


def solve(weight: Tensor, request: InitRequest) -> Solution:
    assert request.spec is not None
    base = quantize(weight, request.spec, scales=request.scales, name=request.name)
    left = torch.sub(weight, base.dequantize())
    error = relative(frobenius(left), frobenius(weight))
    plain = error if request.scales == "absmax" else None
    return Solution(default.start(weight, request), base, trace=(error,), error_plain=plain)


METHOD = Method("qlora", solve, source="Dettmers et al. 2023, arXiv:2305.14314", quantizes=True)
