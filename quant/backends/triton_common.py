"""What Triton's kernels share: the device that they run on, and how codes become values and values codes."""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
import triton
import triton.language as tl

TINY = tl.constexpr(1e-38)  # smaller scales count as nothing: their inverse would overflow


def interpreted() -> bool:
    """Whether Triton was asked to interpret kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_device(device: torch.device) -> Any:
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@triton.jit
def scale_of(
    block, known, scales_ptr, nested_scales_ptr, nested_offset_ptr, nested_map_ptr, NESTED: tl.constexpr
):
    """The scales of some blocks, where ``known``; nested ones are codes of 256 to an outer scale."""
    if NESTED:
        code = tl.load(scales_ptr + block, mask=known, other=0).to(tl.int32)
        outer = tl.load(nested_scales_ptr + block // 256, mask=known, other=0.0)
        return tl.load(nested_map_ptr + code) * outer + tl.load(nested_offset_ptr)
    else:
        return tl.load(scales_ptr + block, mask=known, other=0.0)


@triton.jit
def value_of(code, zero, scale, levels_ptr, AFFINE: tl.constexpr):
    """What a code stands for, float32: the format's level, less the zero point, times the scale."""
    level = tl.load(levels_ptr + code)
    if AFFINE:
        level = level - zero
    return level * scale


@triton.jit
def nearest_rank(x, thresholds_ptr, BITS: tl.constexpr):
    """Thresholds below x: a binary search, BITS gathers instead of 2**BITS comparisons."""
    rank = tl.zeros_like(x).to(tl.int32)
    for i in tl.static_range(BITS):
        half = 1 << (BITS - 1 - i)
        rank += tl.where(x > tl.load(thresholds_ptr + rank + (half - 1)), half, 0)
    return rank
