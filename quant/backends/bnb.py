"""bitsandbytes' own kernels, for its own formats; the only importer of bitsandbytes."""

from __future__ import annotations

import torch
from bitsandbytes import functional
from torch import Tensor

from quant.formats import Format
from quant.tables import tables

_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DEVICES = ("cpu", "cuda")


def unavailable(device: torch.device, fmt: Format, block_size: int) -> str | None:
    """Why bitsandbytes can't serve such a tensor, or None."""
    if device.type not in _DEVICES:
        return f"bitsandbytes is used on {' and '.join(_DEVICES)}"
    if fmt.bnb_type is None:
        return f"bitsandbytes has no format {fmt.name}"
    if block_size not in _BLOCK_SIZES:
        return f"bitsandbytes has no block size {block_size}"
    return None


def quantize(weight: Tensor, fmt: Format, block_size: int) -> tuple[Tensor, Tensor, None]:
    """As ``reference.quantize``. FP4 on CUDA codes zeros and some ties otherwise than the CPU does."""
    codes, state = functional.quantize_4bit(
        weight.reshape(-1), blocksize=block_size, quant_type=fmt.bnb_type, compress_statistics=False
    )
    return codes.view(-1), state.absmax, None


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, fmt: Format, block_size: int, start: int, out: Tensor
) -> Tensor:
    """As ``reference.dequantize``."""
    skip, stop = start % block_size, start + out.numel()
    first, last = start // block_size, -(-stop // block_size)
    part = codes[first * block_size // 2 : -(-stop // 2)].view(-1, 1)
    args = (part, scales[first:last], block_size, fmt.bnb_type)
    if skip == 0 and out.device.type == "cuda":  # only there an out= kernel exists
        torch.ops.bitsandbytes.dequantize_4bit.out(*args, out.shape, out.dtype, out=out)
        return out
    shape = (1, stop - first * block_size)  # a 2-D shape: bitsandbytes turns (n,) into (1, n)
    whole = torch.ops.bitsandbytes.dequantize_4bit.default(*args, shape, out.dtype)
    return out.copy_(whole.view(-1)[skip:].view(out.shape))


def gemv(
    x: Tensor, codes: Tensor, scales: Tensor, shape: tuple[int, int], fmt: Format, block_size: int
) -> Tensor:
    """``x W^T`` of one token, (1, in) -> (1, out), for rows of whole blocks; float32 scales."""
    levels = tables(fmt, x.device).levels
    y: Tensor = torch.ops.bitsandbytes.gemv_4bit.default(
        x.contiguous(), codes.view(-1, 1), list(shape), scales, levels, block_size
    )
    return y
