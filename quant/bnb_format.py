"""bitsandbytes' layouts, on disk and in memory, read and written without importing bitsandbytes.

A 4-bit weight NAME is stored as NAME (packed codes), NAME.absmax, NAME.quant_map, with nested scales also
NAME.nested_absmax and NAME.nested_quant_map, and NAME.quant_state.bitsandbytes__nf4 (or __fp4): a JSON text
as uint8. An LLM.int8 weight is NAME (int8) with SCB (float32, one a row) beside it; read, never written.

Source: bitsandbytes 0.50.2, ``functional.QuantState.as_dict`` and ``nn.modules``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quant import formats
from quant.spec import NESTED_BLOCK_SIZE, QuantSpec
from quant.tensor import QuantizedTensor

BNB_TYPES = {
    fmt.bnb_type: name for name in formats.names() if (fmt := formats.get(name)).bnb_type is not None
}
BNB_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STATE = ".quant_state.bitsandbytes__"
BNB_SUFFIXES = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    *(_STATE + bnb_type for bnb_type in BNB_TYPES),
)
_INT8_ROW_FORMAT = 0  # the only weight_format that bitsandbytes still writes
_INT8_LEVELS = 127.0  # LLM.int8: value = weight * SCB / 127


def why_not_bnb(spec: QuantSpec) -> str | None:
    """Why bitsandbytes can't load a weight of this spec, naming what it can; None: it can."""
    if spec.fmt.bnb_type is None:
        return f"bitsandbytes holds {' and '.join(sorted(BNB_TYPES.values()))}, not {spec.format}"
    if spec.block_size not in BNB_BLOCK_SIZES:
        return f"bitsandbytes has block sizes {', '.join(map(str, BNB_BLOCK_SIZES))}, not {spec.block_size}"
    return None


def misread_on_cpu(spec: QuantSpec, shape: torch.Size | tuple[int, ...]) -> bool:
    """Whether bitsandbytes 0.50.2 decodes such a weight wrongly on a CPU with AVX-512.

    Its kernel takes rows of 16 n elements, and every row to start a block: where the block size does not
    divide the row (the last dimension), all rows but the first get other blocks' scales. Other rows, other
    CPUs and GPUs have kernels that are right.
    """
    return len(shape) > 1 and shape[-1] % 16 == 0 and shape[-1] % spec.block_size != 0


def to_bnb(name: str, q: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors that bitsandbytes' serialised layout stores for ``q``, by their full names; not copied.

    Raises:
        ValueError: a format or block size that bitsandbytes doesn't have.
    """
    if reason := why_not_bnb(q.spec):
        raise ValueError(f"cannot store {name!r} for bitsandbytes: {reason}")
    bnb_type = q.spec.fmt.bnb_type
    state: dict[str, Any] = {
        "quant_type": bnb_type,
        "blocksize": q.spec.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    tensors = {name: q.codes.view(-1, 1), f"{name}.absmax": q.scales}
    if q.nested_scales is not None and q.nested_map is not None and q.nested_offset is not None:
        tensors[f"{name}.nested_absmax"] = q.nested_scales
        tensors[f"{name}.nested_quant_map"] = q.nested_map
        state |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": float(q.nested_offset),
        }
    tensors[f"{name}.quant_map"] = torch.tensor(q.spec.fmt.levels, dtype=torch.float32, device=q.device)
    text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    tensors[f"{name}{_STATE}{bnb_type}"] = text.to(q.device)
    return tensors


def is_bnb(name: str, tensors: Mapping[str, Any]) -> bool:
    """Whether ``tensors`` (any mapping by name) holds a 4-bit or LLM.int8 weight called ``name``."""
    return _state_key(name, tensors) is not None or _scb_key(name) in tensors


def from_bnb(
    name: str, tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float16
) -> QuantizedTensor:
    """The weight ``name`` of a checkpoint that bitsandbytes wrote, 4-bit or LLM.int8.

    Args:
        name: Full name of the weight.
        tensors: At least the weight and what belongs to it; not copied where that can be avoided.
        dtype: Of the original weight, for LLM.int8, which doesn't store it.

    Raises:
        ValueError: a missing tensor, a broken or unknown quant_state, sizes that don't fit.
    """
    key = _state_key(name, tensors)
    if key is None:
        scb = tensors.get(_scb_key(name))
        if name not in tensors or scb is None:
            raise ValueError(
                f"{name!r} is no bitsandbytes weight: neither {name}{_STATE}* nor {_scb_key(name)}"
            )
        layout = tensors.get(name.removesuffix("weight") + "weight_format")
        if layout is not None and int(layout) != _INT8_ROW_FORMAT:
            raise ValueError(
                f"{name!r}: LLM.int8 weight_format {int(layout)}; only row-major (0) can be read"
            )
        return from_int8(tensors[name], scb, dtype)
    try:
        state = json.loads(bytes(tensors[key].cpu().numpy()).decode())
        fmt = BNB_TYPES[state["quant_type"]]
        original = getattr(torch, state["dtype"])
        if not isinstance(original, torch.dtype) or not original.is_floating_point:
            raise ValueError(f"dtype {state['dtype']!r}")
        spec = QuantSpec(fmt, state["blocksize"], double_quant="nested_blocksize" in state)
        shape = torch.Size(state["shape"])
        found = {"codes": tensors[name], "scales": tensors[f"{name}.absmax"]}
        if spec.double_quant:
            if state["nested_blocksize"] != NESTED_BLOCK_SIZE:
                raise ValueError(f"nested_blocksize {state['nested_blocksize']}, not {NESTED_BLOCK_SIZE}")
            found["nested_scales"] = tensors[f"{name}.nested_absmax"]
            found["nested_map"] = tensors[f"{name}.nested_quant_map"]
            found["nested_offset"] = torch.tensor(
                float(state["nested_offset"]), dtype=torch.float32, device=tensors[name].device
            )
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name!r}: broken bitsandbytes quant_state: {error!r}") from error
    return _build(name, found, shape, original, spec)


def from_int8(weight: Tensor, scb: Tensor, dtype: torch.dtype) -> QuantizedTensor:
    """An LLM.int8 weight, value = weight * SCB / 127, as ``int8`` with the largest blocks that fit a row.

    Args:
        weight: int8 (rows, columns).
        scb: float32 (rows,), bitsandbytes' row statistics (the row's largest magnitude).
        dtype: Of the original weight.

    Raises:
        ValueError: columns not a multiple of 16 (use ``dequantize_int8``), or sizes that don't fit.
    """
    _check_int8(weight, scb)
    columns = weight.shape[1]
    block_size = min(columns & -columns, 4096)  # the largest power of two that divides a row
    if block_size < 16:
        raise ValueError(f"LLM.int8 weight {tuple(weight.shape)}: a row is no multiple of 16 elements")
    codes = (weight.to(torch.int16) + 128).to(torch.uint8)  # code = value + 128
    scales = (scb.float() / _INT8_LEVELS).repeat_interleave(columns // block_size)
    tensors = {"codes": codes, "scales": scales}
    return QuantizedTensor.from_state_dict(tensors, weight.shape, dtype, QuantSpec("int8", block_size))


def dequantize_int8(weight: Tensor, scb: Tensor, dtype: torch.dtype) -> Tensor:
    """The dense weight of an LLM.int8 one, (rows, columns), of any width; arguments as for ``from_int8``."""
    _check_int8(weight, scb)
    return (weight.float() * (scb.float() / _INT8_LEVELS)[:, None]).to(dtype)


def from_quant_state(weight: Tensor, state: Any, *, name: str = "weight") -> QuantizedTensor:
    """Adopt a loaded ``Params4bit`` or packed tensor and its ``QuantState``; codes and scales share storage.

    Args:
        weight: Packed codes, uint8 or, with ``quant_storage``, the same bytes as a float dtype.
        state: A ``bitsandbytes.functional.QuantState`` (read by attribute, so that nothing need be imported).
        name: For errors.

    Returns:
        The weight. After a CPU forward on AVX512-BF16 machines bitsandbytes has shuffled the codes and
        rounded the scales to bfloat16: the codes are put back in order (a copy), the scales taken so.

    Raises:
        ValueError: not quantised yet, unknown type, sizes that don't fit.
    """
    if state is None:
        raise ValueError(
            f"{name} is not quantised yet: bitsandbytes does it when the module moves to its device"
        )
    if state.quant_type not in BNB_TYPES:
        raise ValueError(f"{name}: unknown quant_type {state.quant_type!r}; known: {', '.join(BNB_TYPES)}")
    plain = weight.detach().as_subclass(Tensor)
    shape = torch.Size(state.shape)
    if getattr(state, "packing_format_for_cpu", False):
        tensors = {"codes": _unshuffle(plain, shape), "scales": state.absmax.t().float().reshape(-1)}
        spec = QuantSpec(BNB_TYPES[state.quant_type], state.blocksize)
        return _build(name, tensors, shape, state.original_dtype, spec)
    spec = QuantSpec(BNB_TYPES[state.quant_type], state.blocksize, double_quant=bool(state.nested))
    tensors = {"codes": plain, "scales": state.absmax}
    if state.nested:
        if state.state2.blocksize != NESTED_BLOCK_SIZE:
            raise ValueError(f"{name}: nested blocks of {state.state2.blocksize}, not {NESTED_BLOCK_SIZE}")
        tensors["nested_scales"] = state.state2.absmax
        tensors["nested_map"] = state.state2.code
        tensors["nested_offset"] = state.offset
    return _build(name, tensors, shape, state.dtype, spec)


def from_linear4bit(module: torch.nn.Module, *, name: str = "weight") -> QuantizedTensor:
    """Adopt the weight of a loaded ``bitsandbytes.nn.Linear4bit`` (or LinearNF4, LinearFP4); see above.

    Raises:
        ValueError: as ``from_quant_state``.
    """
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None)
    return from_quant_state(
        weight, state if state is not None else getattr(module, "quant_state", None), name=name
    )


def from_linear8bit(module: torch.nn.Module, dtype: torch.dtype = torch.float16) -> QuantizedTensor:
    """The weight of a loaded ``bitsandbytes.nn.Linear8bitLt``; in blocks along its rows.

    Raises:
        ValueError: not quantised yet, or as ``from_int8``.
    """
    weight, scb = int8_statistics(module)
    return from_int8(weight, scb, dtype)


def int8_statistics(module: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """int8 weight (rows, columns) and SCB float32 (rows,) of a ``Linear8bitLt``.

    Raises:
        ValueError: not quantised yet.
    """
    weight: Any = module.weight
    scb = getattr(weight, "SCB", None)
    if scb is None:
        scb = getattr(getattr(module, "state", None), "SCB", None)
    if scb is None or weight.dtype != torch.int8:
        raise ValueError(
            "LLM.int8 layer is not quantised yet: bitsandbytes does it when it moves to its device"
        )
    return weight.detach().as_subclass(Tensor), scb


def _build(
    name: str, tensors: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype, spec: QuantSpec
) -> QuantizedTensor:
    codes = tensors["codes"].contiguous()
    tensors["codes"] = codes.view(torch.uint8)  # quant_storage: the same bytes under another dtype
    for key in ("scales", "nested_scales", "nested_map", "nested_offset"):
        if key in tensors and not (key == "scales" and spec.double_quant):
            tensors[key] = tensors[key].float()
    try:
        return QuantizedTensor.from_state_dict(tensors, shape, dtype, spec)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name!r}: {error}") from error


def _unshuffle(codes: Tensor, shape: torch.Size) -> Tensor:
    """bitsandbytes' CPU layout (32 rows interleaved, 32 low then 32 high nibbles) back to row-major bytes."""
    rows, columns = shape
    groups = codes.reshape(-1, 32)
    nibbles = torch.cat([groups & 15, groups >> 4], dim=1)  # (rows * columns / 64, 64)
    pairs = nibbles.view(rows // 32, columns // 2, 32, 2).transpose(1, 2).reshape(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]


def _check_int8(weight: Tensor, scb: Tensor) -> None:
    if weight.dtype != torch.int8 or weight.ndim != 2 or scb.shape != weight.shape[:1]:
        raise ValueError(
            f"LLM.int8 needs an int8 matrix and a statistic a row; got {weight.dtype} {tuple(weight.shape)}, "
            f"SCB {tuple(scb.shape)}"
        )


def _state_key(name: str, tensors: Mapping[str, Any]) -> str | None:
    return next((key for bnb_type in BNB_TYPES if (key := f"{name}{_STATE}{bnb_type}") in tensors), None)


def _scb_key(name: str) -> str:
    return name.removesuffix("weight") + "SCB"
