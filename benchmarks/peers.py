"""What others make of a weight, run as they are, for the rows beside ours."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor


def bitsandbytes_nf4(weight: Tensor, block_size: int = 64) -> Tensor:
    """QLoRA's base: bitsandbytes' own NF4 round trip of a float32 weight, same shape."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
    dense: Tensor = dequantize_4bit(codes, state)
    return dense.reshape(weight.shape)


def peft_loftq(weight: Tensor, rank: int, iters: int) -> tuple[Tensor, Tensor, Tensor]:
    """PEFT's ``loftq_init`` at 4 bits: dequantised base (out, in), A (rank, in), B (out, rank), all float32.

    PEFT's function moves its work to "cuda" whatever the weight's device is, and so cannot run without a
    GPU. Here its unmodified code runs with that one string replaced by the weight's own device.
    """
    from peft.utils import loftq_utils

    original: Any = loftq_utils.loftq_init
    original = getattr(original, "__wrapped__", original)  # under torch.no_grad()
    device = str(weight.device)
    constants = tuple(device if value == "cuda" else value for value in original.__code__.co_consts)
    moved = types.FunctionType(original.__code__.replace(co_consts=constants), original.__globals__)
    with torch.no_grad():
        base, A, B = moved(weight, 4, rank, iters)
    return base, A, B
