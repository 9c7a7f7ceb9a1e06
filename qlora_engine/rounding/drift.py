"""A target for layers whose inputs have drifted because earlier layers were quantised."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_engine.hessian import ieee_float32

from .metric import cholesky, damp


def drifted_target(
    weight: Tensor, hessian: Tensor, cross: Tensor, *, blend: float = 0.5, damping: float = 0.01
) -> Tensor:
    """Weight that, fed drifted inputs y, comes nearest to what ``weight`` makes of ((1 - blend) y + blend x).

    The minimiser of E||W ((1 - b) y + b x) - V y||^2 is V = (1 - b) W + b W E[x y^T] E[y y^T]^-1. Solved in
    the metric E[y y^T], it lets a layer undo some of the error before it: b = 0 ignores the drift, b = 1 asks
    for the original output, of which some can't be had from y and is learned as noise.

    Args:
        weight: W, (out_features, in_features) float32.
        hessian: E[y y^T] of the drifted inputs, (in, in).
        cross: E[y x^T], rows of the drifted inputs y, columns of the original x, (in, in).
        blend: In [0, 1]; how much of the original input is asked for.
        damping: Multiple of the mean of diag(hessian): pulls V back to W where y says little.

    Returns:
        V, (out, in) float32.

    Raises:
        ValueError: shapes that do not fit, or ``blend`` out of range.
    """
    n = weight.shape[1]
    if hessian.shape != (n, n) or cross.shape != (n, n):
        shapes = f"hessian {tuple(hessian.shape)} and cross {tuple(cross.shape)}"
        raise ValueError(f"{shapes}; expected ({n}, {n}) twice for a weight {tuple(weight.shape)}")
    if not 0 <= blend <= 1:
        raise ValueError(f"blend {blend} is not in [0, 1]")
    H = hessian.to(weight.device)
    L = cholesky(damp(H, damping))
    # x = y + (x - y): only what differs is regressed on y, so that damping pulls towards W and not towards 0.
    with ieee_float32():
        gap = (cross.to(weight.device) - H).double()  # E[y (x - y)^T]
        change = torch.cholesky_solve(gap, L).float()  # (in, in), x - y ~= change^T y
        return torch.addmm(weight, weight, change.T, alpha=blend)
