"""What quantised weights and adapters mean, written out in float64 from the stored bytes alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quant import QuantizedTensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Largest error norm of a product, over that of the product itself, by the dtype that is computed in: its unit
# times a small number (rounding of inputs, weight and output; sums are in float32).
BOUNDS = {torch.float32: 2e-6, torch.float16: 4 * 2**-10, torch.bfloat16: 4 * 2**-7}
TRUNCATED = 2 if DEVICE == "cpu" else 1  # Triton's interpreter truncates to bfloat16 where a GPU rounds


def codes(q: QuantizedTensor) -> Tensor:
    """The codes of a weight, int64 (numel,): a big-endian stream of bits."""
    bits = np.unpackbits(q.codes.cpu().numpy().reshape(-1))
    numel, width = int(np.prod(q.shape)), q.spec.bits
    stream = bits[: numel * width].reshape(numel, width).astype(np.int64)
    return torch.from_numpy(stream @ (1 << np.arange(width)[::-1]))


def weight(q: QuantizedTensor) -> Tensor:
    """The dense weight, float64, in the shape of ``q``."""
    found = codes(q)
    block = torch.arange(found.numel()) // q.spec.block_size
    if q.nested_scales is None:
        scales = q.scales.cpu().double()
    else:
        assert q.nested_map is not None
        assert q.nested_offset is not None
        group = torch.arange(q.scales.numel()) // 256
        scales = q.nested_map.cpu().double()[q.scales.cpu().long()] * q.nested_scales.cpu().double()[group]
        scales = scales + q.nested_offset.cpu().double()
    levels = torch.tensor(q.spec.fmt.levels, dtype=torch.float32).double()[found]
    if q.zeros is not None:
        levels = levels - q.zeros.cpu().double()[block] / 2 ** (8 - q.spec.bits)
    return (levels * scales[block]).reshape(tuple(q.shape))


def error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; NaN shows."""
    return float((got.detach().cpu().double() - want).norm() / want.norm())
