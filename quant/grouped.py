"""Products of groups of rows with a matrix each, all in one launch: how experts multiply their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quant.linear_op import TENSOR_NAMES, Weight, using_workspace, workspace

if TYPE_CHECKING:
    from quant.linear import QuantLinear

_ALIGNED = 16  # bytes; of the rows of operands, which torch's kernel loads so many at a time
_CAPABILITY = (8, 0)  # of a GPU


def grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Group by group ``x[begin:end] @ weights[group]``; differentiable in both.

    Args:
        x: (rows, k), the rows of a group together.
        weights: (groups, k, n), in x's dtype.
        ends: int32 (groups,), where each group ends, ascending, the last at ``rows``.

    Returns:
        (rows, n), in x's dtype.
    """
    if _in_one_launch(x, weights):
        if not (weights.is_contiguous() or weights.mT.is_contiguous()):
            weights = weights.contiguous()
        y: Tensor = torch.nn.functional.grouped_mm(x.contiguous(), weights, offs=ends)
        return y
    stops = ends.tolist()
    begins = [0, *stops[:-1]]
    # unbound once: each matrix's part would else have a gradient of the whole stack's size
    parts = [x[a:b] @ w for a, b, w in zip(begins, stops, weights.unbind(0), strict=True) if b > a]
    return torch.cat([*parts, x.new_zeros(x.shape[0] - stops[-1], weights.shape[2])])


def _in_one_launch(x: Tensor, weights: Tensor) -> bool:
    """Whether torch's own grouped product takes these."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return (
            False  # before torch 2.10 its forerunner wants Hopper (2.8), or not every tensor on a CPU (2.9)
        )
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < _CAPABILITY:
        return False
    return all(size * x.element_size() % _ALIGNED == 0 for size in weights.shape[1:])


def multiply_groups(x: Tensor, layers: list[QuantLinear], ends: Tensor) -> Tensor:
    """``grouped_mm`` with frozen quantised matrices, decoded for the product and again in backward.

    Args:
        x: (rows, in), the rows of a group together.
        layers: (out, in) each, one for every group, of one shape.
        ends: As ``grouped_mm``'s.

    Returns:
        (rows, out), in x's dtype; differentiable in x. All matrices are dense for the time of the product.
    """
    y: Tensor = _Groups.apply(x, ends, layers)
    return y


def _decoded(layers: list[QuantLinear], like: Tensor) -> Tensor:
    """All matrices in the shared buffer, (groups, out, in)."""
    rows, columns = layers[0].shape
    out = workspace(len(layers) * rows * columns, like.dtype, like.device).view(len(layers), rows, columns)
    for part, layer in zip(out, layers, strict=True):
        tensors = tuple(getattr(layer, name) for name in TENSOR_NAMES)
        Weight(tensors, layer.spec, layer.shape).decode(part)
    return out


class _Groups(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, layers: list[QuantLinear]) -> Tensor:
        ctx.save_for_backward(ends)
        ctx.layers = layers
        with using_workspace:
            return grouped_mm(x, _decoded(layers, x).mT, ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (ends,) = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None
        grad = grads[0].contiguous()
        with using_workspace:
            return grouped_mm(grad, _decoded(ctx.layers, grad), ends), None, None
