"""The metric that rounding works in: damping, factorisation, and what is left of it beside an adapter.

J = tr(E H E^T) is a layer's expected squared output error for H = E[x x^T]. If B of an adapter B A is free to
follow, the error that A's rows can carry costs nothing, and what remains is the metric
M = H - H A^T (A H A^T)^-1 A H: min over B of tr((E - B A) H (E - B A)^T) = tr(E M E^T).
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 2048  # of the metric in float64 at once


def damp(hessian: Tensor, damping: float) -> Tensor:
    """Add ``damping`` times the mean of the diagonal to the diagonal; a zero matrix becomes the identity.

    Args:
        hessian: Second moment of a layer's inputs, (in, in), made symmetric on the way, or its diagonal
            (in,).
        damping: Not negative; 0.01 to 0.05 generalises better to text that was not calibrated on than 0.001.

    Returns:
        float32 of the same shape; a new tensor.

    Raises:
        ValueError: ``hessian`` not square, not finite, or with a negative diagonal; ``damping`` negative.
    """
    if hessian.ndim not in (1, 2) or hessian.shape[0] != hessian.shape[-1]:
        raise ValueError(f"hessian must be (in, in) or (in,), got {tuple(hessian.shape)}")
    if not damping >= 0:
        raise ValueError(f"damping must not be negative, got {damping}")
    hessian = hessian.float()
    hessian = (hessian + hessian.T) / 2 if hessian.ndim == 2 else hessian.clone()
    diagonal = hessian.diagonal() if hessian.ndim == 2 else hessian
    mean = diagonal.mean()
    if not bool(torch.isfinite(hessian.sum())):
        raise ValueError("hessian holds values that are not finite")
    if bool((diagonal < 0).any()):
        raise ValueError(f"hessian has a negative diagonal entry ({diagonal.min().item():g})")
    if bool(mean == 0):
        return (
            torch.ones_like(hessian) if hessian.ndim == 1 else torch.eye(len(hessian), device=hessian.device)
        )
    diagonal.add_(damping * mean)
    return hessian


def cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor of a positive semi-definite matrix in float64, damped as far as it needs.

    Args:
        matrix: (n, n), symmetric up to rounding.

    Returns:
        L (n, n) float64 with L L^T = matrix + epsilon I, epsilon the least of 0, 1e-10, 1e-9, ... times the
        mean of the diagonal with which the factorisation succeeds.

    Raises:
        ValueError: It fails even with the mean of the diagonal added: ``matrix`` is far from semi-definite.
    """
    damped = matrix.to(torch.float64, copy=True)
    mean = damped.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    added = 0.0
    for epsilon in (0.0, *(10.0**exponent for exponent in range(-10, 1))):
        damped.diagonal().add_((epsilon - added) * mean)
        added = epsilon
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            return factor
    raise ValueError(f"matrix {tuple(matrix.shape)} is not positive semi-definite, even damped by its mean")


def feedback_factor(metric: Tensor, order: Tensor, damping: float) -> Tensor:
    """Unit upper triangular N with metric + damping = N D N^T: column j takes up sum_{i<j} e_i N_ij.

    Block by block of rows, as a wide metric is large: beside it, two matrices in float64 at the peak.

    Args:
        metric: (in, in), positive semi-definite.
        order: Of the columns as they are processed, (in,) int64; N's rows and columns are in it.
        damping: Multiple of the mean of the diagonal that is added to it.

    Returns:
        (in, in) float32.
    """
    n = len(order)
    backwards = order.flip(0)
    flipped = torch.empty(n, n, dtype=torch.float64, device=metric.device)
    for start in range(0, n, _ROWS):
        rows = backwards[start : start + _ROWS]
        flipped[start : start + _ROWS] = metric[rows[:, None], backwards]
    flipped.diagonal().add_(damping * flipped.diagonal().mean())
    lower = cholesky(flipped)  # its flip U is upper triangular, U U^T = metric in that order
    del flipped
    diagonal = lower.diagonal().flip(0)
    factor = torch.empty_like(metric)
    for start in range(0, n, _ROWS):
        stop = min(start + _ROWS, n)
        factor[start:stop] = lower[n - stop : n - start].flip(0, 1) / diagonal
    return factor


def downdate(hessian: Tensor, A: Tensor) -> Tensor:
    """Metric that the rounded base sees when B is free: H - H A^T (A H A^T)^-1 A H, float32.

    Args:
        hessian: Damped and symmetric, (in, in) float32.
        A: Rows of the adapter, (rank, in); rows that are zero or depend on others are harmless.

    The subtraction is made in float64, in blocks of rows: the directions that A takes out are the largest
    of H, and what is left is what matters.
    """
    exact = A.double()
    blocks = [slice(start, start + _ROWS) for start in range(0, hessian.shape[0], _ROWS)]
    seen = torch.cat([exact @ hessian[rows].double().T for rows in blocks], dim=1)  # A H, (rank, in)
    values, vectors = torch.linalg.eigh(seen @ exact.T)
    keep = values > values[-1].clamp_min(0) * 1e-12
    weights = torch.where(keep, values, torch.ones_like(values)).rsqrt() * keep
    taken = (vectors * weights).T @ seen  # (rank, in); taken.T @ taken is the part of H that B can follow
    metric = torch.empty_like(hessian)
    for rows in blocks:
        metric[rows] = torch.addmm(hessian[rows].double(), taken[:, rows].T, taken, alpha=-1).float()
    # What float32 cannot resolve counts as a trace of plain error: M stays definite if A takes all of H.
    floor = 1e-7 * hessian.diagonal().mean()
    metric.diagonal().clamp_min_(0).add_(floor)
    return metric


def objective(error: Tensor, metric: Tensor) -> Tensor:
    """tr(E M E^T) by row: transposed error (in, out) -> (out,), float32."""
    return (error * (metric @ error)).sum(0)
