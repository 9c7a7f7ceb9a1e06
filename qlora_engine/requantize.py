"""Quantise the exact sum of a base weight and its adapters, and measure what the grid let through."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant.linear import QuantEmbedding, QuantizedModule, QuantLinear
from quant.spec import QuantSpec
from quant.tensor import QuantizedTensor, quantize

from .base_weight import is_conv1d, is_quantized
from .inits import embedding_factors, initialise
from .layer_merge import add_adapters, is_transposed, merged_bias, original_weight
from .lora_init import quantized_module
from .lora_layer import LoraLayer

RESIDUAL_ITERATIONS = 5


@dataclass(frozen=True)
class MergeRecord:
    """What requantising one merged layer did; norms are Frobenius norms.

    With W the base weight before, D what the adapters add, W' the layer's effective weight after:

    Attributes:
        name: Path of the layer.
        spec: Of the new codes.
        rank: Of the residual adapter, 0 without one.
        delta: ``||D|| / ||W||``.
        error: ``||W' - (W + D)|| / ||W + D||``, the error that requantising added.
        error_of_delta: ``||W' - (W + D)|| / ||D||``; above 1 the base itself was nearer. None if D is nil.
        survived: ``<W' - W, D> / <D, D>``, the share of the delta that is in the result; 1 is all of it,
            more is possible. None if D is nil.
    """

    name: str
    spec: QuantSpec
    rank: int
    delta: float
    error: float
    error_of_delta: float | None
    survived: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def can_requantize(layer: LoraLayer) -> bool:
    """Whether ``requantize`` concerns the layer: linear layers of every kind, and quantised embeddings."""
    base = layer.get_base_layer()
    return isinstance(base, nn.Linear) or is_conv1d(base) or is_quantized(base)


def resolve_spec(requantize: QuantSpec | str | bool, layer: LoraLayer, name: str) -> QuantSpec:
    """The spec to quantise the layer with.

    Raises:
        ValueError: True for a layer that has no spec; an unknown format.
    """
    if isinstance(requantize, QuantSpec):
        return requantize
    if isinstance(requantize, str):
        return QuantSpec(requantize)
    base = layer.get_base_layer()
    if not isinstance(base, QuantizedModule):
        raise ValueError(
            f"{name}: requantize=True means the format that a layer has, but this one is a "
            f"{type(base).__name__}; give a QuantSpec or the name of a format"
        )
    return base.spec


@torch.no_grad()
def requantize_layer(
    layer: LoraLayer, names: Sequence[str], spec: QuantSpec, name: str, *, rank: int | None = None
) -> tuple[QuantizedModule, MergeRecord, tuple[Tensor, Tensor] | None]:
    """Quantise base plus adapters ``names`` once.

    Args:
        layer: Not merged.
        names: Adapters to include, at least one.
        spec: Of the result.
        name: Path, for the record.
        rank: Of a residual adapter, solved together with the codes (LoftQ on the sum); None: none.

    Returns:
        The new base layer, the record, and A (rank, in) and B (out, rank) of the residual at scaling 1,
        float32, for an embedding A (rank, rows) and B (width, rank).
    """
    base: Any = layer.get_base_layer()
    before = original_weight(layer).float()
    after = add_adapters(before.clone(), layer, names)
    bias = merged_bias(layer, names)
    embedding = isinstance(base, (nn.Embedding, QuantEmbedding))
    if is_transposed(layer) and not embedding:
        before, after = before.t().contiguous(), after.t().contiguous()  # (out, in)
    factors: tuple[Tensor, Tensor] | None = None
    if rank is None:
        q = quantize(after, spec, name=name)
        result = q.dequantize(torch.float32)
    else:
        solved = initialise(
            after,
            method="loftq",
            spec=spec,
            rank=min(rank, *after.shape),
            iters=RESIDUAL_ITERATIONS,
            kind="embedding" if embedding else "linear",
            name=name,
        )
        assert isinstance(solved.base, QuantizedTensor)
        q, A, B = solved.base, solved.A, solved.B
        result = q.dequantize(torch.float32) + B @ A
        factors = embedding_factors(A, B) if embedding else (A, B)
    record = measure(name, spec, 0 if rank is None else rank, before, after, result)
    q = dataclasses.replace(q, dtype=_dtype_of(base))
    return _new_module(base, q, bias), record, factors


def _dtype_of(base: Any) -> torch.dtype:
    dtype = getattr(base, "weight_dtype", None) or base.weight.dtype
    return dtype if dtype.is_floating_point else torch.float16  # type: ignore[no-any-return]


def _new_module(base: Any, q: QuantizedTensor, bias: Tensor | None) -> QuantizedModule:
    new: Any
    if isinstance(base, QuantEmbedding):
        new = QuantEmbedding.from_quantized(q, base.padding_idx, getattr(base, "embed_scale", None))
    elif is_quantized(base):
        conv1d = isinstance(base, QuantLinear) and base.conv1d
        new = QuantLinear.from_quantized(q, base.bias, getattr(base, "compute_dtype", None), conv1d=conv1d)
    else:
        new = quantized_module(base, q)
    if bias is not None:
        new.bias = nn.Parameter(bias.to(base.bias.dtype), requires_grad=False)
    return new.train(base.training)  # type: ignore[no-any-return]


def measure(
    name: str, spec: QuantSpec, rank: int, before: Tensor, after: Tensor, result: Tensor
) -> MergeRecord:
    """The record of a layer whose weight was ``before``, should be ``after`` and is ``result``."""
    delta = after - before
    error = _norm(result - after)
    size = _norm(delta)
    return MergeRecord(
        name=name,
        spec=spec,
        rank=rank,
        delta=_ratio(size, _norm(before)) or 0.0,
        error=_ratio(error, _norm(after)) or 0.0,
        error_of_delta=_ratio(error, size),
        survived=_ratio(((result - before) * delta).sum(dtype=torch.float64).item(), size**2),
    )


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()


def _ratio(value: float, by: float) -> float | None:
    return value / by if by > 0 else None
