"""LoftQ: alternate quantising what the factors leave, and fitting the factors to what quantising left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qlora_engine.inits.method import (
    InitRequest,
    Method,
    Solution,
    frobenius,
    frobenius_each,
    relative,
)
from qlora_engine.lowrank import LowRankFactors, truncated_svd
from quant import QuantizedTensor, quantize

Triplets = tuple[Tensor, Tensor, Tensor]

# Of the SVD that QPiSSA starts from: its directions, not only its residual, steer the alternation. With 5 the
# error after 5 iterations scatters by up to 0.3 % about that of the exact SVD, with 8 by 0.1 %.
START_APPLICATIONS = 8


def solve(weight: Tensor, request: InitRequest) -> Solution:
    """Up to ``request.iters`` alternations; the best iterate is kept, and a rising error ends the loop.

    Every residual is taken against the codes and scales as they are stored, double-quantised or searched. One
    iteration is quantise-then-SVD. Iterate 0 is plain quantisation without a correction, so that the result
    is never worse. ``request.start="svd"`` quantises weight - SVD(weight) first (QPiSSA), which may begin
    higher.

    Source: Li et al. 2023, arXiv:2310.08659, Algorithm 1.
    """
    spec, name = request.spec, request.name
    assert spec is not None
    norm = frobenius(weight)
    work = torch.empty_like(weight)  # one dense workspace for the whole alternation

    def encode(target: Tensor) -> QuantizedTensor:
        return quantize(target, spec, scales=request.scales, name=name)

    def residual(base: QuantizedTensor) -> Tensor:
        return torch.sub(weight, base.dequantize(out=work), out=work)

    def fit(matrix: Tensor, start: Tensor | None, applications: int | None = None) -> Triplets:
        return truncated_svd(
            matrix,
            request.rank,
            method=request.svd,
            start=start,
            seed=request.svd_seed,
            applications=applications,
        )

    base = encode(weight)
    trace = [relative(frobenius(residual(base)), norm)]
    kept: tuple[int, QuantizedTensor, LowRankFactors] | None = None
    start: Tensor | None = None
    if request.start == "svd":
        U, S, Vh = fit(weight, None, START_APPLICATIONS)
        base = encode(torch.addmm(weight, U * S, Vh, alpha=-1, out=work))
        residual(base)
    for iteration in range(1, request.iters + 1):
        squared = frobenius(work) ** 2
        U, S, Vh = fit(work, start)
        # U S Vh projects the residual, so what is left follows from Pythagoras.
        left = math.sqrt(max(squared - float(S.double().square().sum()), 0.0))
        trace.append(relative(left, norm))
        factors = LowRankFactors.from_svd(U, S, Vh)
        if kept is None or trace[-1] < trace[kept[0]]:
            kept = iteration, base, factors
        elif trace[-1] > trace[-2]:
            break
        if iteration < request.iters:
            base = encode(torch.addmm(weight, factors.B, factors.A, alpha=-1, out=work))
            residual(base)
            start = Vh.mT
    assert kept is not None
    best, base, factors = kept
    if trace[0] <= trace[best]:
        best, base, factors = 0, encode(weight), replace(factors, B=torch.zeros_like(factors.B))
    plain = trace[0] if request.scales == "absmax" else None
    return Solution(factors, base, tuple(trace), best, plain)


def solve_many(weights: Tensor, requests: Sequence[InitRequest]) -> list[Solution]:
    """``solve`` for weights of one shape (n, out, in) at once, without waiting for the device in between.

    Which iterate is the best, and where the alternation would have ended, is read from the device once, at
    the end: every iterate's codes and factors are kept until then, about 0.6 bytes a weight and iteration.
    """
    request, count = requests[0], len(weights)
    spec = request.spec
    assert spec is not None
    norms = frobenius_each(weights)
    work = torch.empty_like(weights)

    def encode(targets: Tensor) -> list[QuantizedTensor]:
        return [quantize(target, spec, scales=request.scales, check=False) for target in targets]

    def residual(bases: list[QuantizedTensor]) -> None:
        for base, out in zip(bases, work, strict=True):
            base.dequantize(out=out)
        torch.sub(weights, work, out=work)

    def fit(matrices: Tensor, start: Tensor | None, applications: int | None = None) -> Triplets:
        return truncated_svd(
            matrices,
            request.rank,
            method=request.svd,
            start=start,
            seed=request.svd_seed,
            applications=applications,
        )

    plain = bases = encode(weights)
    residual(bases)
    errors = [frobenius_each(work)]
    start: Tensor | None = None
    if request.start == "svd":
        U, S, Vh = fit(weights, None, START_APPLICATIONS)
        bases = encode(torch.baddbmm(weights, U * S.unsqueeze(-2), Vh, alpha=-1, out=work))
        residual(bases)
    iterates: list[tuple[list[QuantizedTensor], LowRankFactors]] = []
    for iteration in range(1, request.iters + 1):
        U, S, Vh = fit(work, start)
        squared = frobenius_each(work).square() - S.double().square().sum(-1)
        errors.append(squared.clamp_min(0).sqrt())
        factors = LowRankFactors.from_svd(U, S, Vh)
        iterates.append((bases, factors))
        if iteration < request.iters:
            bases = encode(torch.baddbmm(weights, factors.B, factors.A, alpha=-1, out=work))
            residual(bases)
            start = Vh.mT
    measured = torch.stack([norms, *errors]).T.tolist()  # the one synchronisation
    solutions = []
    for i in range(count):
        norm, *left = measured[i]
        best, trace = _chosen([relative(error, norm) for error in left])
        bases, factors = iterates[max(best, 1) - 1]
        # clones: the others of the batch, and what belongs to them, can go
        kept = LowRankFactors(factors.A[i].clone(), factors.B[i].clone())
        base = bases[i]
        if best == 0:
            base, kept = plain[i], replace(kept, B=torch.zeros_like(kept.B))
        solutions.append(Solution(kept, base, trace, best, trace[0] if request.scales == "absmax" else None))
    return solutions


def _chosen(trace: list[float]) -> tuple[int, tuple[float, ...]]:
    """The iterate that ``solve`` keeps of this trace, and the trace up to where it would have stopped."""
    best = 1
    for i in range(2, len(trace)):
        if trace[i] < trace[best]:
            best = i
        elif trace[i] > trace[i - 1]:
            trace = trace[: i + 1]
            break
    return (0 if trace[0] <= trace[best] else best), tuple(trace)


METHOD = Method(
    "loftq",
    solve,
    source="Li et al. 2023, arXiv:2310.08659, Algorithm 1",
    corrects=True,
    quantizes=True,
    solve_many=solve_many,
)
