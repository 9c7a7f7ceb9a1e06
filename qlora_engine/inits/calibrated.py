"""What calibrated initialisations share: their metric, the closed form in it, a base rounded in it.

Each minimises J = tr(E H E^T), E = W - Q - B A, the layer's expected squared output error over the inputs
that calibration saw, with H damped by ``request.damping``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_engine.inits.method import InitRequest, Solution, frobenius, relative
from qlora_engine.lowrank import LowRankFactors, truncated_svd
from qlora_engine.rounding import Grid, cholesky, damp, objective, refit_scales
from quant import QuantizedTensor, QuantSpec, quantize
from quant.nested import double_dequantize, double_quantize
from quant.scales import search_scales
from quant.tensor import from_codes


class OutputMetric:
    """A damped second moment and its square root L, H = L L^T.

    Attributes:
        hessian: Damped, (in, in), or its diagonal (in,).
        root: L float32 (in, in), lower triangular, or the root of the diagonal (in,).
    """

    def __init__(self, weight: Tensor, request: InitRequest) -> None:
        assert request.hessian is not None
        self.hessian = damp(request.hessian.to(weight.device), request.damping)
        self.root = self.hessian.sqrt() if self.hessian.ndim == 1 else cholesky(self.hessian).float()
        self.norm = frobenius(self.times_root(weight))

    @property
    def importance(self) -> Tensor:
        """diag(H), (in,)."""
        return self.hessian if self.hessian.ndim == 1 else self.hessian.diagonal()

    def times_root(self, error: Tensor) -> Tensor:
        """E L, (out, in): its Frobenius norm is the root of J."""
        return error * self.root if self.root.ndim == 1 else error @ self.root

    def relative(self, error: Tensor) -> float:
        """sqrt(J(E) / J(W))."""
        return relative(frobenius(self.times_root(error)), self.norm)


@dataclass(frozen=True)
class Fit:
    """The best B A for an error, and what it leaves: sqrt(J / J(W))."""

    factors: LowRankFactors
    left: float


def closed_form(
    error: Tensor, metric: OutputMetric, request: InitRequest, previous: LowRankFactors | None = None
) -> Fit:
    """Rank-r B A that minimises tr((E - B A) H (E - B A)^T): B A = U U^T E, U from the SVD of E L.

    No inverse of L is needed in this projected form.

    Args:
        error: W - Q, (out, in) float32.
        metric: H and L.
        request: rank, svd and seed.
        previous: Factors of a similar error. The row space of A is in the space that the fast SVD searches,
            so what is left is no more than the best B would leave beside that A.

    Source: Zhang et al., arXiv:2410.06040 (QERA), theorem 1; with a diagonal H its approximate variant.
    """
    rooted = metric.times_root(error)
    start = None if previous is None else metric.times_root(previous.A).T
    U, _, _ = truncated_svd(rooted, request.rank, method=request.svd, start=start, seed=request.svd_seed)
    left = relative(frobenius(torch.addmm(rooted, U, U.T @ rooted, alpha=-1)), metric.norm)
    return Fit(_balanced(U, U.T @ error), left)


def _balanced(U: Tensor, A: Tensor) -> LowRankFactors:
    """U @ A with columns of B and rows of A of equal length; one of no length can still be trained."""
    length = torch.linalg.vector_norm(A, dim=1)
    direction = A / torch.where(length > 0, length, torch.ones_like(length))[:, None]
    return LowRankFactors.from_svd(U, length, direction)


def plainly_quantised(
    weight: Tensor, request: InitRequest, metric: OutputMetric, target: Tensor | None = None
) -> QuantizedTensor:
    """The nearest codes of ``target`` (None: of the weight); a scale search is weighted by diag(H)."""
    assert request.spec is not None
    return quantize(
        weight if target is None else target,
        request.spec,
        scales=request.scales,
        importance=None if request.scales == "absmax" else metric.importance,
        name=request.name,
    )


def error_of_plain(weight: Tensor, request: InitRequest, metric: OutputMetric) -> float:
    """sqrt(J / J(W)) of absmax quantisation without a correction, where every trace begins."""
    assert request.spec is not None
    return metric.relative(weight - quantize(weight, request.spec, name=request.name).dequantize())


class RoundedBase:
    """Codes, scales and zeros of a base while it is being rounded; scales count as they will be stored.

    Attributes:
        grid: The values that the stored scales allow.
        codes: Transposed, uint8 (in, out).
    """

    def __init__(self, weight: Tensor, request: InitRequest, importance: Tensor) -> None:
        assert request.spec is not None
        self.spec: QuantSpec = request.spec
        self.shape = (weight.shape[0], weight.shape[1])
        # A negative scale costs nothing, and pays wherever a codebook is not symmetric; "mse" declines it.
        self._scales, self._zeros = search_scales(weight, self.spec, request.scales != "mse", importance)
        self.grid = Grid.of(self.spec, self.shape, self._stored(self._scales), self._zeros)
        self.codes = torch.empty(0, dtype=torch.uint8)

    def _stored(self, scales: Tensor) -> Tensor:
        if not self.spec.double_quant:
            return scales
        return double_dequantize(*double_quantize(scales, signed=bool((scales < 0).any())))

    def refit(self, target: Tensor, metric: Tensor) -> None:
        """All scales at once for the present codes, kept if they are better as stored."""
        scales = refit_scales(target, self.codes, self.grid, metric)
        grid = replace(self.grid, scales=self._stored(scales))
        if self.spec.double_quant:
            before = objective(target - self.grid.values(self.codes), metric).sum(dtype=torch.float64)
            after = objective(target - grid.values(self.codes), metric).sum(dtype=torch.float64)
            if not bool(after < before):
                return
        self._scales, self.grid = scales, grid

    def dense(self) -> Tensor:
        """(out, in) float32, as it will be dequantised."""
        return self.grid.values(self.codes).T

    def tensor(self) -> QuantizedTensor:
        flat = self.codes.T.reshape(-1)
        return from_codes(flat, self._scales, self.spec, self.shape, torch.float32, self._zeros)


def solution(base: QuantizedTensor, fit: Fit, trace: list[float], best: int) -> Solution:
    """What a solver returns; a trace is finite or the solver is wrong."""
    assert all(math.isfinite(value) for value in trace)
    return Solution(fit.factors, base, tuple(trace), best)
