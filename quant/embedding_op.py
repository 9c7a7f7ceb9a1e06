"""Rows of a quantised table as a custom op: only those that are asked for are decoded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quant import packing
from quant.backends.reference import dense_zeros
from quant.linear_op import as_quantized
from quant.spec import NESTED_BLOCK_SIZE, QuantSpec
from quant.tables import tables
from quant.tensor import QuantizedTensor


def decode_rows(q: QuantizedTensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows ``index`` (n,) of a two-dimensional weight, (n, columns)."""
    rows, columns = q.shape
    bits = q.spec.bits
    if columns * bits % 8:  # a row does not begin on a byte: no way around the whole table
        return q.dequantize(dtype)[index]
    row_bytes = q.codes.reshape(rows, -1)[index]  # (n, bytes a row)
    codes = packing.unpack(row_bytes.reshape(-1), bits, index.numel() * columns).reshape(-1, columns)
    first = index.unsqueeze(1) * columns
    block = (first + torch.arange(columns, device=index.device)) // q.spec.block_size  # (n, columns)
    if q.nested_scales is None or q.nested_map is None or q.nested_offset is None:
        scale = q.scales[block]
    else:
        scale = q.nested_map[q.scales[block].int()] * q.nested_scales[block // NESTED_BLOCK_SIZE]
        scale = scale + q.nested_offset
    values = tables(q.spec.fmt, index.device).levels[codes.int()]
    if q.zeros is not None:
        values = values - dense_zeros(q.zeros[block], q.spec.fmt)
    return (values * scale).to(dtype)


@torch.library.custom_op("quant::embedding_rows", mutates_args=())
def embedding_rows(
    index: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    nested_scales: Tensor | None,
    nested_offset: Tensor | None,
    nested_map: Tensor | None,
    format: str,
    block_size: int,
    double_quant: bool,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows ``index`` (any shape, integer) of the quantised table (rows, columns): (*index.shape, columns)."""
    spec = QuantSpec(format, block_size, double_quant)
    tensors = (codes, scales, zeros, nested_scales, nested_offset, nested_map)
    q = as_quantized(tensors, spec, torch.Size((rows, columns)), dtype)
    return decode_rows(q, index.reshape(-1), dtype).reshape(*index.shape, columns)


@embedding_rows.register_fake
def _(index: Tensor, *rest: Any) -> Tensor:
    return index.new_empty(*index.shape, rest[-2], dtype=rest[-1])
