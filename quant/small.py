"""Which product serves a few tokens on a GPU: decode and multiply, our packed product, or bitsandbytes' GEMV.

``MEASURED`` decides by device and width, and holds only what ``benchmarks.speed --suite small`` found to be
faster there. It is empty: nothing has been measured yet, so a weight is decoded and multiplied as at any
other number of tokens, unless ``set_small_product`` asks for another product by name.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from quant.tensor import QuantizedTensor

CHOICES = ("measured", "dense", "triton", "bitsandbytes")
MAX_TOKENS = 64
# (compute capability, bits): (largest number of tokens, product), ascending; the first that reaches is taken.
MEASURED: dict[tuple[tuple[int, int], int], tuple[tuple[int, str], ...]] = {}
_choice = {"product": "measured"}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def set_small_product(choice: str) -> str:
    """Choose the product for up to 64 tokens on a GPU, for this process; returns what was set before.

    Args:
        choice: ``"measured"`` (default): as the table of measurements says. ``"dense"``: always decode and
            multiply. ``"triton"``: our product with packed weights, forward and for the input's gradient.
            ``"bitsandbytes"``: its GEMV where it has one (forward, one token, nf4 and fp4), else as "dense".

    Raises:
        ValueError: another name.
        RuntimeError: what it needs is not installed.
    """
    if choice not in CHOICES:
        raise ValueError(f"unknown product {choice!r}; allowed: {', '.join(CHOICES)}")
    if choice in ("triton", "bitsandbytes") and importlib.util.find_spec(choice) is None:
        raise RuntimeError(f"the product {choice!r} needs {choice}, which is not installed")
    before, _choice["product"] = _choice["product"], choice
    return before


def chosen(tokens: int, device: torch.device, bits: int) -> str:
    """The product for so many tokens: "dense", "triton" or "bitsandbytes"."""
    choice = _choice["product"]
    if choice != "measured":
        return choice if 0 < tokens <= MAX_TOKENS else "dense"
    if not MEASURED or device.type != "cuda" or tokens > MAX_TOKENS:
        return "dense"
    for most, product in MEASURED.get((torch.cuda.get_device_capability(device), bits), ()):
        if tokens <= most and importlib.util.find_spec(product) is not None:
            return product
    return "dense"


def multiply(
    x: Tensor, q: QuantizedTensor, bias: Tensor | None, *, transposed: bool = False
) -> Tensor | None:
    """``x W^T + bias``, or ``x W``, by the chosen product; None: decode and multiply.

    Args:
        x: (tokens, in), transposed (tokens, out).
        q: W, (out, in).
        bias: (out,) or None; not with ``transposed``.
        transposed: Multiply with W instead of W^T.
    """
    product = chosen(x.shape[0], x.device, q.spec.bits)
    if product == "dense" or x.dtype not in _DTYPES:
        return None
    if product == "triton":
        from quant.backends import triton_kernels, triton_product

        if triton_kernels.unavailable(x.device, q.spec.fmt, q.spec.block_size) is not None:
            return None
        rows, columns = q.shape
        fields = (q.codes, q.scales, q.zeros, q.nested_scales, q.nested_offset, q.nested_map)
        return triton_product.product(
            x, fields, (rows, columns), q.spec.fmt, q.spec.block_size, bias=bias, transposed=transposed
        )
    if transposed or not _has_gemv(x, q):
        return None
    from quant.backends import bnb

    y = bnb.gemv(x, q.codes, q.dense_scales(), (q.shape[0], q.shape[1]), q.spec.fmt, q.spec.block_size)
    return y if bias is None else y.add_(bias)


def _has_gemv(x: Tensor, q: QuantizedTensor) -> bool:
    from quant.backends import bnb

    usual: Any = bnb.unavailable(x.device, q.spec.fmt, q.spec.block_size)
    # its CPU kernels misread some rows (tests/parity), and its GEMV is for whole blocks
    return (
        usual is None and x.device.type == "cuda" and x.shape[0] == 1 and q.shape[1] % q.spec.block_size == 0
    )
