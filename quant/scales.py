"""Block scales: the absmax rule, the search for scales with less squared error, and double quantisation."""

from __future__ import annotations

import torch
from torch import Tensor

from quant import backends, search
from quant.backends import reference
from quant.nested import Nested, double_dequantize, double_quantize, dynamic_map
from quant.spec import QuantSpec

__all__ = [
    "Nested",
    "absmax_scales",
    "double_dequantize",
    "double_quantize",
    "dynamic_map",
    "search_nested_scales",
    "search_scales",
]


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
        signed: Try negative scales too: worth it because most codebooks are not symmetric. Affine formats
            gain nothing and ignore it.
        importance: Weights of the squared error, not negative: (in_features,), one a column, or of the
            weight's shape.

    Returns:
        scales float32 (n_blocks,) and zeros uint8 (n_blocks,) or None. No block's error is above that of the
        absmax rule.

    Raises:
        ValueError: importance of another shape, negative or not finite.
    """
    fmt, block_size = spec.fmt, spec.block_size
    pick = _importance_of(weight, importance)
    one_launch = (
        None if fmt.affine else backends.extra(weight.device, spec.format, block_size, "search_scales")
    )
    if one_launch is not None and weight.numel():
        flat = weight.reshape(-1)
        base, _ = reference.absmax_scales(flat, fmt, block_size)
        return one_launch(flat, fmt, block_size, base, search.multipliers(fmt, signed), importance), None
    return search.search(weight, fmt, block_size, signed, pick)


def search_nested_scales(
    weight: Tensor,
    spec: QuantSpec,
    nested: Nested,
    zeros: Tensor | None = None,
    importance: Tensor | None = None,
) -> Nested:
    """Double-quantised scales, each 8-bit code moved by up to two steps to where the weight's error is least.

    Args:
        weight: As for ``search_scales``.
        spec: Format and block size.
        nested: What ``double_quantize`` returned.
        zeros: uint8 (n_blocks,), affine formats only.
        importance: As for ``search_scales``.

    Returns:
        ``nested`` with other codes; no block's error is above what it was.
    """
    pick = _importance_of(weight, importance)
    return nested._replace(codes=search.search_nested(weight, spec.fmt, spec.block_size, zeros, nested, pick))


def _importance_of(weight: Tensor, importance: Tensor | None) -> search.Pick | None:
    if importance is None:
        return None
    if importance.shape not in (weight.shape, weight.shape[-1:]) or weight.ndim == 0:
        raise ValueError(
            f"importance has shape {tuple(importance.shape)}; allowed: {tuple(weight.shape[-1:])} "
            f"or {tuple(weight.shape)}"
        )
    if not ((importance >= 0) & importance.isfinite()).all():
        raise ValueError("importance has elements that are negative, NaN or inf")
    values = importance.detach().to(weight.device).reshape(-1)
    if importance.shape == weight.shape:
        return lambda start, stop: values[start:stop].float()
    columns = values.float()
    return lambda start, stop: columns[torch.arange(start, stop, device=columns.device) % columns.numel()]
