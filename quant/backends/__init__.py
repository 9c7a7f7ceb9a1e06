"""Who computes: backends behind two custom ops, chosen by name or by device.

A backend is a module of this folder with three functions (see ``reference.py`` for their contract):
``unavailable(device, fmt, block_size)``, ``quantize(...)`` and ``dequantize(...)``. It is imported when first
asked for. The operators are opaque to torch.compile:

- ``torch.ops.quant.quantize(weight, format, block_size, backend)``: absmax rule; packed codes uint8, scales
  float32 (n_blocks,), zeros uint8 (n_blocks,), empty where the format isn't affine.
- ``torch.ops.quant.dequantize(codes, scales, zeros, nested_scales, nested_offset, nested_map, format,
  block_size, start, shape, dtype, backend)``: elements start ... start + prod(shape) as a new tensor.
  ``scales`` is float32 (n_blocks,), or uint8 codes where the three nested tensors are given.
- ``torch.ops.quant.dequantize_into(out, ...)``: the same into ``out``, which gives shape and dtype.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from quant import formats
from quant.formats import Format
from quant.nested import double_dequantize
from quant.spec import NESTED_BLOCK_SIZE

AUTO = "auto"
_KNOWN = ("reference", "lookup", "compiled", "triton_kernels", "bnb")
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
    """Elements start ... start + out.numel() of a quantised tensor, written into ``out`` (contiguous).

    What ``torch.ops.quant.dequantize_into`` runs, for code that torch.compile never sees. Triton's kernels
    also take an ``out`` of two dimensions whose rows are strided.
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


# The operators. Schemas by hand and no autograd key: the wrapper of torch.library.custom_op takes three times
# as long as decoding a small tile does.


def _quantize(weight: Tensor, format: str, block_size: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    name = select(weight.device, format, block_size, backend)
    with torch.no_grad():
        codes, scales, zeros = get(name).quantize(weight.contiguous(), formats.get(format), block_size)
    return codes, scales, scales.new_empty(0, dtype=torch.uint8) if zeros is None else zeros


def _quantize_fake(
    weight: Tensor, format: str, block_size: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    fmt, blocks = formats.get(format), -(-weight.numel() // block_size)
    codes = weight.new_empty((weight.numel() * fmt.bits + 7) // 8, dtype=torch.uint8)
    scales = weight.new_empty(blocks, dtype=torch.float32)
    return codes, scales, weight.new_empty(blocks if fmt.affine else 0, dtype=torch.uint8)


def _dequantize_into(out: Tensor, *args: Any) -> None:
    with torch.no_grad():
        decode(out, *args)


def _dequantize(codes: Tensor, *args: Any) -> Tensor:
    shape, dtype, backend = args[-3:]
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    _dequantize_into(out, codes, *args[:-3], backend)
    return out


def _dequantize_fake(codes: Tensor, *args: Any) -> Tensor:
    return codes.new_empty(args[-3], dtype=args[-2])


_PARTS = (
    "Tensor codes, Tensor scales, Tensor? zeros, Tensor? nested_scales, Tensor? nested_offset, "
    "Tensor? nested_map, str format, int block_size, SymInt start"
)
_SCHEMAS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "quantize": (
        "(Tensor weight, str format, int block_size, str backend) -> (Tensor, Tensor, Tensor)",
        _quantize,
        _quantize_fake,
    ),
    "dequantize": (
        f"({_PARTS}, SymInt[] shape, ScalarType dtype, str backend) -> Tensor",
        _dequantize,
        _dequantize_fake,
    ),
    "dequantize_into": (
        f"(Tensor(a!) out, {_PARTS}, str backend) -> ()",
        _dequantize_into,
        lambda *args: None,
    ),
}
for _name, (_schema, _run, _fake) in _SCHEMAS.items():
    torch.library.define(f"quant::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"quant::{_name}", "default", _run)
    torch.library.register_fake(f"quant::{_name}", _fake)

__all__ = ["AUTO", "decode", "extra", "get", "names", "select"]
