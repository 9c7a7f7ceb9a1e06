"""Block scales: the absmax rule, the search for scales with less squared error, and double quantisation.

A negative scale is worth trying because most codebooks are not symmetric.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from quant import backends
from quant.backends import reference
from quant.formats import Format
from quant.nested import double_dequantize, double_quantize, dynamic_map
from quant.spec import QuantSpec
from quant.tables import tables

__all__ = ["absmax_scales", "double_dequantize", "double_quantize", "dynamic_map", "search_scales"]

_CHUNK = {"cpu": 1 << 17}  # elements in flight: temporaries that stay in a CPU's cache
_CHUNK_ELSEWHERE = 1 << 24
_CELLS = 4096  # resolution of the approximate codebook that ranks the grid


def absmax_scales(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """The absmax rule (affine: the range): float32 (n_blocks,) and zeros uint8 (n_blocks,) or None."""
    return reference.absmax_scales(weight.reshape(-1), spec.fmt, spec.block_size)


def search_scales(
    weight: Tensor, spec: QuantSpec, signed: bool = False, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Per block, the scale (and zero point) with the least squared error: a grid, then least squares.

    Args:
        weight: Dense, any shape and float dtype; computed in float32.
        spec: Format and block size; ``double_quant`` is not looked at.
        signed: Try negative scales too.
        importance: Weights of the squared error, not negative: (in_features,), one a column, or of the
            weight's shape.

    Returns:
        scales float32 (n_blocks,) and zeros uint8 (n_blocks,) or None. No block's error is above that of the
        absmax rule.

    Raises:
        ValueError: importance of another shape.
    """
    fmt, block_size = spec.fmt, spec.block_size
    flat = weight.reshape(-1)
    pick = _importance_of(weight, importance)
    one_launch = None if fmt.affine else backends.extra(flat.device, spec.format, block_size, "search_scales")
    if one_launch is not None and flat.numel():
        base, _ = reference.absmax_scales(flat, fmt, block_size)
        return one_launch(flat, fmt, block_size, base, _multipliers(fmt, signed), importance), None
    step = _CHUNK.get(flat.device.type, _CHUNK_ELSEWHERE)
    scales, zeros = [], []
    for start in range(0, flat.numel(), step):
        piece = flat[start : start + step].float()
        h = None if pick is None else pick(start, start + piece.numel())
        if short := piece.numel() % block_size:
            if h is None:
                h = torch.ones_like(piece)
            piece = F.pad(piece, (0, block_size - short))
            h = F.pad(h, (0, block_size - short))
        w = piece.view(-1, block_size)  # (n, block_size)
        h = None if h is None else h.view(-1, block_size)
        base, base_zeros = reference.absmax_scales(flat[start : start + step], fmt, block_size)
        if base_zeros is None:
            scales.append(_search_symmetric(w, h, base, fmt, signed))
        else:
            scale, zero = _search_affine(w, h, base, base_zeros, fmt)
            scales.append(scale)
            zeros.append(zero)
    if not scales:
        return absmax_scales(weight, spec)
    return torch.cat(scales), torch.cat(zeros) if zeros else None


def _importance_of(weight: Tensor, importance: Tensor | None) -> Callable[[int, int], Tensor] | None:
    if importance is None:
        return None
    if importance.shape == weight.shape:
        flat = importance.reshape(-1)
        return lambda start, stop: flat[start:stop].float()
    if weight.ndim < 1 or importance.shape != weight.shape[-1:]:
        raise ValueError(
            f"importance has shape {tuple(importance.shape)}; allowed: {tuple(weight.shape[-1:])} "
            f"or {tuple(weight.shape)}"
        )
    columns = importance.float().to(weight.device)
    return lambda start, stop: columns[torch.arange(start, stop, device=columns.device) % columns.numel()]


def _grid(fmt: Format) -> list[float]:
    lowest, highest, steps = {2: (0.25, 1.1, 24), 3: (0.45, 1.15, 22), 4: (0.6, 1.15, 18), 8: (0.9, 1.02, 5)}[
        fmt.bits
    ]
    return [lowest + (highest - lowest) * i / (steps - 1) for i in range(steps)]


def _multipliers(fmt: Format, signed: bool) -> list[float]:
    """What the search tries as multiples of the absmax rule's scale."""
    grid = _grid(fmt)
    return grid + [-m for m in grid] * signed


def _nearest(x: Tensor, fmt: Format) -> Tensor:
    """The exact nearest levels, float32, of ``x`` in units of the levels."""
    t = tables(fmt, x.device)
    return t.levels[t.order.int()][torch.bucketize(x, t.thresholds, out_int32=True)]


def _sum(h: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    product = a * b
    return (product if h is None else product.mul_(h)).sum(1)


def _search_symmetric(w: Tensor, h: Tensor | None, base: Tensor, fmt: Format, signed: bool) -> Tensor:
    best, best_gain = base, torch.zeros_like(base)
    for m in _multipliers(fmt, signed):
        c = _nearest(w * reference.away_from_zero(base * m).reciprocal()[:, None], fmt)
        num, den = _sum(h, w, c), _sum(h, c, c)
        gain = num * num / den.clamp(min=reference.TINY)
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best = torch.where(better, num / den.clamp(min=reference.TINY), best)
    chosen, chosen_error = base, _error(w, h, base, fmt)[0]
    for _ in range(3):
        error, c = _error(w, h, best, fmt)
        better = error < chosen_error
        chosen, chosen_error = torch.where(better, best, chosen), torch.where(better, error, chosen_error)
        den = _sum(h, c, c)
        best = torch.where(den > 0, _sum(h, w, c) / den.clamp(min=reference.TINY), best)
    return chosen


def _error(w: Tensor, h: Tensor | None, scale: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    c = _nearest(w * reference.away_from_zero(scale).reciprocal()[:, None], fmt)
    residual = w - c * scale[:, None]
    return _sum(h, residual, residual), c


def _search_affine(
    w: Tensor, h: Tensor | None, base: Tensor, base_zeros: Tensor, fmt: Format
) -> tuple[Tensor, Tensor]:
    top, steps = fmt.unit, [0.55, 0.65, 0.75, 0.85, 0.93, 1.0] if fmt.bits < 8 else [0.97, 1.0]
    z = reference.dense_zeros(base_zeros, fmt)
    low, high = -z * base, (top - z) * base
    n = torch.full_like(base, w.shape[1]) if h is None else h.sum(1)
    n = n.clamp(min=reference.TINY)
    w_sum = (w if h is None else w * h).sum(1)
    best, best_zero, best_gain = base, z, torch.zeros_like(base)
    for p in steps:
        for q in steps:
            scale = reference.away_from_zero((high * q - low * p) / top)
            c = _affine_codes(w, scale, -low * p / scale, top)
            s, b, gain = _fit_line(w, h, c, w_sum, n)
            better = (gain > best_gain) & (s > 0)
            best_gain = torch.where(better, gain, best_gain)
            best, best_zero = torch.where(better, s, best), torch.where(better, -b / s, best_zero)
    chosen, chosen_zeros = base, base_zeros
    chosen_error, _ = _affine_error(w, h, base, base_zeros, fmt)
    for _ in range(4):
        zeros = reference.quantize_zeros(best_zero, fmt)
        _, c = _affine_error(w, h, best, zeros, fmt)
        d = c - reference.dense_zeros(zeros, fmt)[:, None]
        den = _sum(h, d, d)
        best = torch.where(
            den > 0, _sum(h, w, d) / den.clamp(min=reference.TINY), best
        )  # fits the rounded zero
        error, c = _affine_error(w, h, best, zeros, fmt)
        better = error < chosen_error
        chosen, chosen_error = torch.where(better, best, chosen), torch.where(better, error, chosen_error)
        chosen_zeros = torch.where(better, zeros, chosen_zeros)
        s, b, _ = _fit_line(w, h, c, w_sum, n)
        best, best_zero = torch.where(s > 0, s, best), torch.where(s > 0, -b / s, best_zero)
    return chosen, chosen_zeros


def _affine_codes(w: Tensor, scale: Tensor, zero: Tensor, top: float) -> Tensor:
    x = w * scale.reciprocal()[:, None] + zero[:, None]
    return x.sub_(0.5).ceil_().clamp_(0, top)


def _affine_error(
    w: Tensor, h: Tensor | None, scale: Tensor, zeros: Tensor, fmt: Format
) -> tuple[Tensor, Tensor]:
    z = reference.dense_zeros(zeros, fmt)
    c = _affine_codes(w, reference.away_from_zero(scale), z, fmt.unit)
    residual = w - (c - z[:, None]) * scale[:, None]
    return _sum(h, residual, residual), c


def _fit_line(
    w: Tensor, h: Tensor | None, c: Tensor, w_sum: Tensor, n: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares w = s c + b: s, b and the error that s takes off, each (n_blocks,)."""
    c_sum = (c if h is None else c * h).sum(1)
    cc = _sum(h, c, c) - c_sum * c_sum / n
    cw = _sum(h, c, w) - c_sum * w_sum / n
    s = torch.where(cc > 0, cw / cc.clamp(min=reference.TINY), torch.zeros_like(cc))
    return s, (w_sum - s * c_sum) / n, s * cw
