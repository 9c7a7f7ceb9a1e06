"""All scales of a row at once: with the codes fixed the error is a quadratic in the scales."""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import Grid
from .metric import objective

# Bytes of normal matrices (rows, blocks, blocks) held at once.
_CHUNK_BYTES = 256 * 2**20
# Of every scale's own curvature: where codes make scales nearly exchangeable, they stay near what they were.
_RIDGE = 1e-5


def refit_scales(target: Tensor, codes: Tensor, grid: Grid, metric: Tensor) -> Tensor:
    """Scales that minimise tr((W - Q) M (W - Q)^T) with codes and zeros fixed.

    A row that is a whole number of blocks is one small least-squares problem, solved in batches of rows;
    rows that would not improve keep their scales. Where blocks straddle rows all scales hang together and
    conjugate gradients descend from the present ones.

    Args:
        target: Transposed weight to approximate, (in_features, out_features) float32.
        codes: Transposed codes, (in_features, out_features) uint8.
        grid: Levels, zeros and the present scales.
        metric: Positive semi-definite (in_features, in_features) float32.

    Returns:
        New scales, (n_blocks,) float32; the objective is not above that of ``grid.scales``.
    """
    units = grid.unit_values(codes)  # (in, out)
    error = target - grid.values(codes)
    if grid.rows_are_whole_blocks:
        return _refit_rows(units, error, grid, metric)
    return _refit_jointly(units, error, grid, metric)


def _refit_rows(units: Tensor, error: Tensor, grid: Grid, metric: Tensor) -> Tensor:
    in_features, out_features = units.shape
    size = grid.block_size
    n_blocks = in_features // size
    gradient = units * (metric @ error)  # (in, out)
    gradient = gradient.view(n_blocks, size, out_features).sum(1).T  # (out, n_blocks)
    scales = grid.scales.view(out_features, n_blocks).clone()
    rows_at_once = max(1, _CHUNK_BYTES // (4 * n_blocks * n_blocks))
    for start in range(0, out_features, rows_at_once):
        rows = slice(start, min(start + rows_at_once, out_features))
        part = units[:, rows]
        normal = part.new_empty(part.shape[1], n_blocks, n_blocks)
        for block in range(n_blocks):
            columns = slice(block * size, (block + 1) * size)
            product = (metric[:, columns] @ part[columns]) * part  # (in, rows)
            normal[:, :, block] = product.view(n_blocks, size, -1).sum(1).T
        step = _solve(normal, gradient[rows])
        change = (torch.einsum("rb,rbc,rc->r", step, normal, step) - 2 * (step * gradient[rows]).sum(1))[
            :, None
        ]
        scales[rows] += torch.where(change < 0, step, torch.zeros_like(step))
    return scales.reshape(-1)


def _solve(normal: Tensor, gradient: Tensor) -> Tensor:
    """Solve normal @ step = gradient by row; a block that nothing depends on takes no step."""
    diagonal = normal.diagonal(dim1=1, dim2=2)
    # Scaled to a unit diagonal so that one small ridge is right for every row.
    weights = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).rsqrt() * (diagonal > 0)
    scaled = normal * weights[:, :, None] * weights[:, None, :]
    scaled = (scaled + scaled.transpose(1, 2)) / 2
    scaled.diagonal(dim1=1, dim2=2).add_(_RIDGE)
    # A dead block has a zero row: the ridge alone keeps it invertible, and its gradient is zero.
    factor, info = torch.linalg.cholesky_ex(scaled)
    step = torch.cholesky_solve((gradient * weights)[..., None], factor)[..., 0] * weights
    return torch.where((info == 0)[:, None] & torch.isfinite(step), step, torch.zeros_like(step))


def _refit_jointly(units: Tensor, error: Tensor, grid: Grid, metric: Tensor, *, steps: int = 32) -> Tensor:
    """Conjugate gradients on all scales with a diagonal preconditioner; each step lowers the objective."""
    in_features, _ = units.shape
    blocks = grid.blocks_of(torch.arange(in_features, device=units.device))  # (in, out)

    def gather(per_element: Tensor) -> Tensor:
        return torch.zeros_like(grid.scales).index_add_(0, blocks.reshape(-1), per_element.reshape(-1))

    diagonal = gather(units * units * metric.diagonal()[:, None])
    weights = torch.where(diagonal > 0, 1 / diagonal, torch.zeros_like(diagonal))
    step = torch.zeros_like(grid.scales)
    residual = gather(units * (metric @ error))
    preconditioned = weights * residual
    direction = preconditioned
    norm = residual @ preconditioned
    for _ in range(steps):
        curved = gather(units * (metric @ (units * direction[blocks]))) + _RIDGE * diagonal * direction
        curvature = direction @ curved
        length = torch.where(curvature > 0, norm / curvature, torch.zeros_like(norm))
        step = step + length * direction
        residual = residual - length * curved
        preconditioned = weights * residual
        new_norm = residual @ preconditioned
        direction = (
            preconditioned + torch.where(norm > 0, new_norm / norm, torch.zeros_like(norm)) * direction
        )
        norm = new_norm
    scales = grid.scales + step
    before = objective(error, metric).sum(dtype=torch.float64)
    after = objective(error - units * step[blocks], metric).sum(dtype=torch.float64)
    return torch.where(after < before, scales, grid.scales)
