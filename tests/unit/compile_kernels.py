"""Compile every Triton kernel for a GPU that need not be there, by calling what launches them.

    python tests/unit/compile_kernels.py 90        # compute capability 9.0; prints a kernel a line

The interpreter, which the other tests use without a GPU, runs much that the compiler refuses. Here the
compiler does all of its work, to machine code, and nothing is launched: results hold nothing.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from quant import QuantSpec, quantize
from quant.backends import (
    triton_blocks,
    triton_fp8,
    triton_kernels,
    triton_loss,
    triton_norms,
    triton_rounding,
)


class Driver:
    """What the compiler asks a driver."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_only(capability: int) -> list[str]:
    """From now on kernels are compiled and not launched; the list gets their names."""
    driver.set_active(Driver(capability))
    run, names = JITFunction.run, []

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        assert "cubin" in kernel.asm
        names.append(self.fn.__name__)
        return kernel

    JITFunction.run = compiled
    return names


def codecs(dtype: torch.dtype) -> None:
    for name in ("nf4", "nf3", "int8", "uint2"):
        weight, fmt = torch.randn(64, 192).to(dtype), QuantSpec(name).fmt
        codes, scales, zeros = triton_kernels.quantize(weight, fmt, 64)
        triton_kernels.dequantize(codes, scales, zeros, fmt, 64, 0, torch.empty_like(weight))
        triton_kernels.dequantize(codes, scales, zeros, fmt, 64, 5, torch.empty(333, dtype=dtype))
        q = quantize(torch.randn(64, 192), QuantSpec(name, 64, True), backend="reference")
        nested: Any = (q.nested_scales, q.nested_offset, q.nested_map)
        triton_kernels.dequantize_nested(
            q.codes, q.scales, q.zeros, nested, fmt, 64, 0, torch.empty_like(weight)
        )
        if not fmt.affine:
            for importance in (None, torch.rand(192)):
                triton_kernels.search_scales(weight, fmt, 64, scales, [0.8, 1.0], importance)


def blocks(dtype: torch.dtype) -> None:
    wide, narrow = torch.randn(4, 96).to(dtype), torch.empty(4, 32, dtype=dtype)
    triton_blocks.swiglu(wide, narrow)
    triton_blocks.swiglu_backward(wide, narrow)
    for accumulate in (False, True):
        triton_blocks.dropout(wide, 0.1, 7, torch.empty_like(wide), accumulate=accumulate)


def norms(dtype: torch.dtype) -> None:
    x, weight, rstd = torch.randn(4, 96).to(dtype), torch.randn(96).to(dtype), torch.empty(4)
    for one_plus in (False, True):
        for early in (False, True):
            triton_norms.rms_norm(
                x, weight, 1e-6, one_plus=one_plus, early=early, out=torch.empty_like(x), rstd=rstd
            )
            triton_norms.rms_norm_backward(
                x, x, weight, rstd, one_plus=one_plus, early=early, out=torch.empty_like(x)
            )
    q, k = torch.randn(2, 4, 5, 32).to(dtype), torch.randn(2, 2, 5, 32).to(dtype)
    cos, sin = torch.randn(1, 5, 32).to(dtype), torch.randn(1, 5, 32).to(dtype)
    for backward in (False, True):
        triton_norms.rotary(q, k, cos, sin, torch.empty_like(q), torch.empty_like(k), backward=backward)


def losses(dtype: torch.dtype) -> None:
    for columns in (100, 20000):
        for softcap in (None, 30.0):
            for gradient in (False, True):
                logits, targets = torch.randn(3, columns).to(dtype), torch.tensor([1, 2, 3])
                triton_loss.cross_entropy(logits, targets, torch.empty(3), softcap=softcap, gradient=gradient)


def rounding() -> None:
    square = torch.randn(128, 128)
    for bits in (2, 3, 4, 8):
        levels = torch.arange(2.0**bits)
        for zeros in (None, square):
            triton_rounding.sweep_columns(
                square, square, square, square, square, zeros, levels, levels[1:] - 0.5
            )


def float8(dtype: torch.dtype) -> None:
    fmt = QuantSpec("nf4").fmt
    for double_quant in (False, True):
        q = quantize(torch.randn(64, 192), QuantSpec("nf4", 64, double_quant), backend="reference")
        fields = (q.codes, q.scales, q.zeros, q.nested_scales, q.nested_offset, q.nested_map)
        scales = triton_fp8.row_scales(fields, (64, 192), fmt, 64, 448.0, 1e-12)
        for transposed in (False, True):
            out = torch.empty((192, 64) if transposed else (64, 192), dtype=torch.float8_e4m3fn)
            triton_fp8.decode(fields, (64, 192), fmt, 64, scales, out, transposed=transposed)
    x = torch.randn(5, 192).to(dtype)
    for factor in (None, torch.rand(192)):
        triton_fp8.quantize_rows(x, factor, 448.0, 1e-12)


def main(capability: int) -> None:
    names = compile_only(capability)
    dtype = torch.bfloat16 if capability >= 80 else torch.float16
    codecs(dtype)
    blocks(dtype)
    norms(dtype)
    losses(dtype)
    rounding()
    if capability >= 89:
        float8(dtype)
    print(*sorted(set(names)), sep="\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
