"""One token on a GPU: bitsandbytes' GEMV, which reads the codes once, where it can; else decode and multiply.

On an H100 with nested NF4 it takes 22 microseconds for 4096 x 4096 where decoding and multiplying takes 27,
and 48 beside 102 for 14336 x 4096 (``benchmarks.speed --suite small``).
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from quant.tensor import QuantizedTensor

CHOICES = ("auto", "dense", "bitsandbytes")
_choice = {"product": "auto"}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def set_small_product(choice: str) -> str:
    """Choose the product for one token on a GPU, for this process; returns what was set before.

    Args:
        choice: ``"auto"`` (default): bitsandbytes' GEMV where it is installed and has one (nf4 and fp4, rows
            of whole blocks). ``"dense"``: always decode and multiply. ``"bitsandbytes"``: as auto, and refuse
            to go without.

    Raises:
        ValueError: another name.
        RuntimeError: bitsandbytes is asked for and not installed.
    """
    if choice not in CHOICES:
        raise ValueError(f"unknown product {choice!r}; allowed: {', '.join(CHOICES)}")
    if choice == "bitsandbytes" and importlib.util.find_spec(choice) is None:
        raise RuntimeError(f"the product {choice!r} needs {choice}, which is not installed")
    before, _choice["product"] = _choice["product"], choice
    return before


def worth_it(x: Tensor) -> bool:
    """Whether ``multiply`` is to be asked at all; cheap."""
    return x.shape[0] == 1 and x.device.type == "cuda" and _choice["product"] != "dense"


def multiply(x: Tensor, q: QuantizedTensor, bias: Tensor | None) -> Tensor | None:
    """``x W^T + bias`` by bitsandbytes' GEMV; None where it has none: decode and multiply.

    Args:
        x: (1, in).
        q: W, (out, in).
        bias: (out,) or None.
    """
    from quant.backends import bnb

    # its CPU kernels misread some rows (tests/parity), and its GEMV is for whole blocks
    if (
        x.shape[0] != 1
        or x.device.type != "cuda"
        or x.dtype not in _DTYPES
        or q.shape[1] % q.spec.block_size
        or bnb.unavailable(x.device, q.spec.fmt, q.spec.block_size) is not None
    ):
        return None
    y = bnb.gemv(x, q.codes, q.dense_scales(), (q.shape[0], q.shape[1]), q.spec.fmt, q.spec.block_size)
    return y if bias is None else y.add_(bias)
