"""Who computes: backends behind two custom ops, chosen by name or by device.

A backend is a module of this folder with three functions (see ``reference.py`` for their contract):
``unavailable(device, fmt, block_size)``, ``quantize(...)`` and ``dequantize(...)``. It is imported when first
asked for. ``torch.ops.quant.quantize`` and ``torch.ops.quant.dequantize`` are opaque to torch.compile.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from quant import formats
from quant.formats import Format
from quant.nested import double_dequantize
from quant.spec import NESTED_BLOCK_SIZE

AUTO = "auto"
_KNOWN = ("reference", "lookup", "triton_kernels", "bnb")
_PREFERENCE = {"cuda": ("triton_kernels", "lookup")}  # what `auto` tries, in order
_DEFAULT_PREFERENCE = ("lookup",)


def names() -> tuple[str, ...]:
    """The backends that this installation contains; whether one can run is ``select``'s to say."""
    return tuple(name for name in _KNOWN if importlib.util.find_spec(f"{__name__}.{name}") is not None)


@functools.cache
def get(name: str) -> ModuleType:
    """The backend module called ``name``.

    Raises:
        ValueError: unknown name. ImportError: what it needs is not installed.
    """
    if name not in names():
        raise ValueError(f"unknown quant backend {name!r}; known backends: {AUTO}, {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def _reason(name: str, device: torch.device, fmt: Format, block_size: int) -> str | None:
    """Why ``name`` can't run, or None."""
    try:
        backend = get(name)
    except ImportError as error:
        return f"not installed ({error})"
    return backend.unavailable(device, fmt, block_size)


@functools.lru_cache(maxsize=256)
def _select(device: str, fmt_name: str, block_size: int, backend: str) -> str:
    fmt, where = formats.get(fmt_name), torch.device(device)
    if backend != AUTO:
        if backend not in names():
            get(backend)  # raises, listing the known ones
        if reason := _reason(backend, where, fmt, block_size):
            raise RuntimeError(
                f"quant backend {backend!r} cannot run {fmt_name} on device '{device}': {reason}"
            )
        return backend
    reasons = []
    for name in _PREFERENCE.get(where.type, _DEFAULT_PREFERENCE):
        if name not in names():
            continue
        reason = _reason(name, where, fmt, block_size)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise RuntimeError(f"no quant backend for {fmt_name} on device '{device}' ({'; '.join(reasons)})")


def select(device: torch.device | str, fmt: str, block_size: int = 64, backend: str = AUTO) -> str:
    """The name of the backend that serves such tensors.

    Args:
        device: Where the tensors are.
        fmt: Name of the format.
        block_size: Elements a block.
        backend: ``auto`` takes the first that can run; a name is taken or refused, never replaced.

    Raises:
        RuntimeError: the named backend (or none, for ``auto``) can run; says why.
        ValueError: unknown backend or format.
    """
    return _select(torch.device(device).type, fmt, block_size, backend)


def extra(device: torch.device, fmt: str, block_size: int, function: str) -> Any:
    """``function`` of the backend that `auto` takes, or None where that backend has no such function."""
    return getattr(get(select(device, fmt, block_size)), function, None)


@torch.library.custom_op("quant::quantize", mutates_args=())
def quantize(weight: Tensor, format: str, block_size: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Absmax quantisation: packed codes uint8, scales float32 (n_blocks,), zeros uint8 (n_blocks,)/(0,)."""
    name = select(weight.device, format, block_size, backend)
    codes, scales, zeros = get(name).quantize(weight.contiguous(), formats.get(format), block_size)
    return codes, scales, scales.new_empty(0, dtype=torch.uint8) if zeros is None else zeros


@quantize.register_fake
def _(weight: Tensor, format: str, block_size: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    fmt, blocks = formats.get(format), -(-weight.numel() // block_size)
    codes = weight.new_empty((weight.numel() * fmt.bits + 7) // 8, dtype=torch.uint8)
    scales = weight.new_empty(blocks, dtype=torch.float32)
    return codes, scales, weight.new_empty(blocks if fmt.affine else 0, dtype=torch.uint8)


def decode(
    out: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    nested_scales: Tensor | None,
    nested_offset: Tensor | None,
    nested_map: Tensor | None,
    format: str,
    block_size: int,
    start: int,
    backend: str,
) -> None:
    """``dequantize_into`` without its custom op, whose call takes longer than the kernel.

    For code that torch.compile never sees. Triton's kernels also take an ``out`` of two dimensions whose rows
    are strided.
    """
    fmt = formats.get(format)
    module = get(select(codes.device, format, block_size, backend))
    codes = codes.reshape(-1)
    if nested_scales is not None:
        if nested_offset is None or nested_map is None:
            raise ValueError("double-quantised scales need nested_offset and nested_map")
        nested = getattr(module, "dequantize_nested", None)
        if nested is not None:
            nested(
                codes, scales, zeros, (nested_scales, nested_offset, nested_map), fmt, block_size, start, out
            )
            return
        # only the scales that this range needs, from the start of a group: a caller may go row by row
        first = start // block_size // NESTED_BLOCK_SIZE * NESTED_BLOCK_SIZE
        last = -(-(start + out.numel()) // block_size)
        scales = double_dequantize(
            scales[first:last], nested_scales[first // NESTED_BLOCK_SIZE :], nested_offset, nested_map
        )
        skipped = first * block_size
        codes, start = codes[skipped * fmt.bits // 8 :], start - skipped
        zeros = None if zeros is None else zeros[first:]
    module.dequantize(codes, scales, zeros, fmt, block_size, start, out)


@torch.library.custom_op("quant::dequantize_into", mutates_args=("out",))
def dequantize_into(
    out: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    nested_scales: Tensor | None,
    nested_offset: Tensor | None,
    nested_map: Tensor | None,
    format: str,
    block_size: int,
    start: int,
    backend: str,
) -> None:
    """Elements start ... start + out.numel() of a quantised tensor, written into ``out`` (contiguous)."""
    decode(
        out,
        codes,
        scales,
        zeros,
        nested_scales,
        nested_offset,
        nested_map,
        format,
        block_size,
        start,
        backend,
    )


@torch.library.custom_op("quant::dequantize", mutates_args=())
def dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    nested_scales: Tensor | None,
    nested_offset: Tensor | None,
    nested_map: Tensor | None,
    format: str,
    block_size: int,
    start: int,
    shape: list[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Elements start ... start + prod(shape) of a quantised tensor, in a new tensor of ``shape``, ``dtype``.

    ``codes`` uint8 packed, any shape. ``scales`` float32 (n_blocks,), or uint8 codes when ``nested_scales``,
    ``nested_offset`` and ``nested_map`` are given. ``zeros`` uint8 (n_blocks,) for affine formats.
    """
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    decode(
        out,
        codes,
        scales,
        zeros,
        nested_scales,
        nested_offset,
        nested_map,
        format,
        block_size,
        start,
        backend,
    )
    return out


@dequantize.register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    nested_scales: Tensor | None,
    nested_offset: Tensor | None,
    nested_map: Tensor | None,
    format: str,
    block_size: int,
    start: int,
    shape: list[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


__all__ = ["AUTO", "decode", "dequantize", "dequantize_into", "extra", "get", "names", "quantize", "select"]
