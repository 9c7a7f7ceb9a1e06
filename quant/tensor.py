"""QuantizedTensor: packed codes with their scales; quantise, encode and decode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quant import backends, packing
from quant.backends import AUTO, lookup
from quant.formats import Format
from quant.nested import Nested, double_dequantize, double_quantize
from quant.scales import search_nested_scales, search_scales
from quant.spec import NESTED_BLOCK_SIZE, QuantSpec

SCALE_RULES = ("absmax", "mse", "signed-mse")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT16_MAX = torch.finfo(torch.float16).max
_TENSORS = ("codes", "scales", "zeros", "nested_scales", "nested_offset", "nested_map")


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A quantised weight: ``(levels[code] - zero) * scale`` over blocks of the flattened row-major weight.

    Attributes:
        codes: uint8 (ceil(numel * bits / 8),), packed as ``quant.packing`` says.
        scales: float32 (n_blocks,); double-quantised: uint8 codes (n_blocks,).
        zeros: uint8 (n_blocks,), fixed-point zero points of affine formats: zero = z / 2**(8 - bits).
        nested_scales: float32 (ceil(n_blocks / 256),), double-quantised only.
        nested_offset: float32 (), double-quantised only.
        nested_map: float32 (256,), double-quantised only.
        shape: Of the dense weight.
        dtype: Of the dense weight that was quantised, and of ``dequantize()``.
        spec: Format, block size, double quantisation.

    Raises:
        ValueError: a tensor of the wrong size, or missing, or not in the spec. TypeError: of the wrong dtype.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    nested_scales: Tensor | None
    nested_offset: Tensor | None
    nested_map: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    spec: QuantSpec

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():
            return
        spec, blocks = self.spec, self.spec.n_blocks(self.numel)
        nested = spec.double_quant
        expected = {
            "codes": (torch.uint8, packing.packed_bytes(self.numel, spec.bits)),
            "scales": (torch.uint8 if nested else torch.float32, blocks),
            "zeros": (torch.uint8, blocks) if spec.fmt.affine else None,
            "nested_scales": (torch.float32, -(-blocks // NESTED_BLOCK_SIZE)) if nested else None,
            "nested_offset": (torch.float32, 1) if nested else None,
            "nested_map": (torch.float32, 256) if nested else None,
        }
        for name, want in expected.items():
            tensor = getattr(self, name)
            if (tensor is None) != (want is None):
                raise ValueError(f"{spec} {'needs' if tensor is None else 'has no'} {name}")
            if tensor is None or want is None:
                continue
            if tensor.dtype != want[0]:
                raise TypeError(f"{name} must be {want[0]}, got {tensor.dtype}")
            if tensor.numel() != want[1]:
                raise ValueError(
                    f"{name} has {tensor.numel()} elements; {tuple(self.shape)} as {spec} takes {want[1]}"
                )

    @property
    def numel(self) -> int:
        """Elements of the dense weight."""
        return self.shape.numel()

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: codes, scales, zeros, nested scales and map."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    @property
    def bits_per_weight(self) -> float:
        """8 * nbytes / numel."""
        return 8 * self.nbytes / self.numel if self.numel else 0.0

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """A copy on ``device`` (the same tensors where they are there already)."""
        moved = {name: tensor.to(device) for name, tensor in self.state_dict().items()}
        return QuantizedTensor.from_state_dict(moved, self.shape, self.dtype, self.spec)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by field name, without those that the spec doesn't have; not copied."""
        return {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}

    @classmethod
    def from_state_dict(
        cls,
        tensors: Mapping[str, Tensor],
        shape: torch.Size | tuple[int, ...],
        dtype: torch.dtype,
        spec: QuantSpec,
    ) -> QuantizedTensor:
        """The inverse of ``state_dict``; tensors may have any shape of the right size and are not copied.

        Raises:
            ValueError: unknown names, or what the constructor raises.
        """
        if unknown := sorted(set(tensors) - set(_TENSORS)):
            raise ValueError(f"unknown tensors {unknown}; known: {', '.join(_TENSORS)}")
        if missing := sorted({"codes", "scales"} - set(tensors)):
            raise ValueError(f"missing tensors {missing}")
        flat = {name: tensor.reshape(-1) for name, tensor in tensors.items()}
        if "nested_offset" in flat and flat["nested_offset"].numel() == 1:
            flat["nested_offset"] = flat["nested_offset"].reshape(())
        return cls(
            flat["codes"],
            flat["scales"],
            flat.get("zeros"),
            flat.get("nested_scales"),
            flat.get("nested_offset"),
            flat.get("nested_map"),
            torch.Size(shape),
            dtype,
            spec,
        )

    def dense_scales(self) -> Tensor:
        """The scales as stored, float32 (n_blocks,)."""
        if self.nested_scales is None or self.nested_offset is None or self.nested_map is None:
            return self.scales
        return double_dequantize(self.scales, self.nested_scales, self.nested_offset, self.nested_map)

    def unpacked_codes(self) -> Tensor:
        """One code a byte, uint8 (numel,)."""
        return packing.unpack(self.codes, self.spec.bits, self.numel)

    def dequantize(
        self, dtype: torch.dtype | None = None, out: Tensor | None = None, *, backend: str = AUTO
    ) -> Tensor:
        """The dense weight.

        Args:
            dtype: Of the result; None: ``out``'s, or the original's. Computed in float32, rounded once.
            out: Contiguous, of ``shape``; written and returned. Saves the page faults of a fresh tensor.
            backend: ``auto`` or one of ``quant.backends.names()``.

        Raises:
            ValueError: ``out`` of another shape or dtype, or not contiguous.
            RuntimeError: the backend can't run.
        """
        return self._decode(0, self.shape, dtype, out, backend)

    def dequantize_rows(
        self,
        start: int,
        stop: int,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
        *,
        backend: str = AUTO,
    ) -> Tensor:
        """Rows start ... stop of a weight of two or more dimensions, (stop - start, *shape[1:]).

        Args:
            start: First row.
            stop: One past the last row.
            dtype: As for ``dequantize``.
            out: As for ``dequantize``, of the rows' shape.
            backend: As for ``dequantize``.

        Raises:
            ValueError: rows out of range, or as ``dequantize``.
        """
        if not (len(self.shape) >= 2 and 0 <= start <= stop <= self.shape[0]):
            raise ValueError(f"rows {start} ... {stop} of a weight of shape {tuple(self.shape)}")
        row = self.shape[1:].numel()
        return self._decode(start * row, torch.Size((stop - start, *self.shape[1:])), dtype, out, backend)

    def _decode(
        self, start: int, shape: torch.Size, dtype: torch.dtype | None, out: Tensor | None, backend: str
    ) -> Tensor:
        spec = self.spec
        tensors = (
            self.codes,
            self.scales,
            self.zeros,
            self.nested_scales,
            self.nested_offset,
            self.nested_map,
        )
        if out is None:
            dtype = self.dtype if dtype is None else dtype
            result: Tensor = torch.ops.quant.dequantize(
                *tensors, spec.format, spec.block_size, start, list(shape), dtype, backend
            )
            return result
        if out.shape != shape or dtype not in (None, out.dtype) or not out.is_contiguous():
            raise ValueError(
                f"out must be contiguous, {tuple(shape)} and {dtype or 'any float dtype'}; "
                f"got {tuple(out.shape)}, {out.dtype}, strides {out.stride()}"
            )
        torch.ops.quant.dequantize_into(out, *tensors, spec.format, spec.block_size, start, backend)
        return out


def quantize(
    weight: Tensor,
    spec: QuantSpec,
    *,
    scales: str = "absmax",
    importance: Tensor | None = None,
    backend: str = AUTO,
    name: str | None = None,
    check: bool = True,
) -> QuantizedTensor:
    """Quantise a weight.

    Args:
        weight: float32, bfloat16 or float16, any shape; computed in float32.
        spec: Format, block size, double quantisation.
        scales: "absmax": bitsandbytes' rule, and for nf4 and fp4 its bytes. "mse": per block the scale with
            the least squared error. "signed-mse": of either sign. With a search the codes are chosen against
            the scales as stored (after double quantisation); with absmax before it, as bitsandbytes does.
        importance: Weights of the squared error in a search, not negative: (in_features,) or as the weight.
        backend: ``auto`` or one of ``quant.backends.names()``, for the absmax rule.
        name: Named in the error if the weight isn't finite.
        check: Whether to look for NaN and inf, which waits for a GPU. Without it they make their blocks NaN.

    Raises:
        ValueError: NaN, inf or values near float32's largest in the weight, values beyond float16's in what
            is kept of a float16 weight, unknown rule, importance of another shape or with absmax.
        TypeError: another dtype. RuntimeError: the backend can't run.
    """
    if scales not in SCALE_RULES:
        raise ValueError(f"unknown scale rule {scales!r}; known rules: {', '.join(SCALE_RULES)}")
    if importance is not None and scales == "absmax":
        raise ValueError("importance has no effect on absmax scales; use 'mse' or 'signed-mse'")
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{_title(name)} is {weight.dtype}; allowed: {', '.join(map(str, FLOAT_DTYPES))}")
    weight = weight.detach()
    fmt, block_size = spec.fmt, spec.block_size
    if scales == "absmax":
        codes, dense, zeros = torch.ops.quant.quantize(weight, spec.format, block_size, backend)
        zeros = zeros if fmt.affine else None
        if check:
            _refuse_non_finite(dense, weight, fmt, name)
        nested = double_quantize(dense, signed=fmt.signed) if spec.double_quant else None
    else:
        signed = scales == "signed-mse" and not fmt.affine
        dense, zeros = search_scales(weight, spec, signed, importance)
        if check:
            _refuse_non_finite(dense, weight, fmt, name)
        nested = double_quantize(dense, signed=signed or fmt.signed) if spec.double_quant else None
        if nested is not None:
            nested = search_nested_scales(weight, spec, nested, zeros, importance)
            dense = double_dequantize(*nested)
        codes = _encode(weight, spec, dense, zeros)
    q = _assemble(codes, dense, nested, zeros, weight.shape, weight.dtype, spec)
    if check:
        refuse_overflow(q, name)
    return q


def refuse_overflow(q: QuantizedTensor, name: str | None = None) -> None:
    """Look whether every value of a float16 weight is one.

    Levels beyond a block's largest element are in use where scales were searched, and in affine formats.

    Raises:
        ValueError: a value beyond float16's largest.
    """
    if q.dtype != torch.float16 or not q.numel:
        return
    if q.dense_scales().abs().max().item() * _reach(q.spec.fmt) < _FLOAT16_MAX:
        return
    largest = q.dequantize(torch.float32).abs().max().item()
    if largest > _FLOAT16_MAX:
        raise ValueError(
            f"{_title(name)} {tuple(q.shape)} would have values up to {largest:.6g}, beyond float16's 65504; "
            "quantise it as bfloat16 or float32"
        )


def encode(weight: Tensor, spec: QuantSpec, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """The nearest codes under given scales, one a byte; a tie goes to the lower level.

    Args:
        weight: float32, bfloat16 or float16, any shape; computed in float32.
        spec: Format and block size.
        scales: Dense float32 scales of either sign, (n_blocks,).
        zeros: uint8 (n_blocks,), for affine formats.

    Returns:
        uint8 (numel,).

    Raises:
        ValueError: scales or zeros of the wrong size, missing or not wanted.
    """
    _check_scales(weight.numel(), spec, scales, zeros)
    packed = _encode(weight.detach(), spec, scales, zeros)
    return packing.unpack(packed, spec.bits, weight.numel())


def _encode(weight: Tensor, spec: QuantSpec, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Packed nearest codes, by the device's own backend if it has an encoder, else by look-up."""
    run = backends.extra(weight.device, spec.format, spec.block_size, "encode") or lookup.encode
    packed: Tensor = run(weight, spec.fmt, spec.block_size, scales, zeros)
    return packed


def from_codes(
    codes: Tensor,
    scales: Tensor,
    spec: QuantSpec,
    shape: torch.Size | tuple[int, ...],
    dtype: torch.dtype,
    zeros: Tensor | None = None,
) -> QuantizedTensor:
    """A QuantizedTensor from chosen codes and dense scales.

    Args:
        codes: uint8 (numel,), one a byte; kept as they are, also when double quantisation moves the scales.
        scales: Dense float32 (n_blocks,); double-quantised here if the spec says so, in the signed layout if
            one is negative.
        spec: Format, block size, double quantisation.
        shape: Of the dense weight.
        dtype: Of the original weight.
        zeros: uint8 (n_blocks,), for affine formats.

    Raises:
        ValueError: codes, scales or zeros of the wrong size.
    """
    shape = torch.Size(shape)
    if codes.numel() != shape.numel():
        raise ValueError(f"{codes.numel()} codes for a weight of shape {tuple(shape)}")
    _check_scales(shape.numel(), spec, scales, zeros)
    nested = double_quantize(scales, signed=bool((scales < 0).any())) if spec.double_quant else None
    packed = packing.pack(codes, spec.bits, fill=spec.fmt.zero_code)
    return _assemble(packed, scales, nested, zeros, shape, dtype, spec)


def _assemble(
    packed: Tensor,
    scales: Tensor,
    nested: Nested | None,
    zeros: Tensor | None,
    shape: torch.Size,
    dtype: torch.dtype,
    spec: QuantSpec,
) -> QuantizedTensor:
    if nested is None:
        return QuantizedTensor(packed, scales, zeros, None, None, None, shape, dtype, spec)
    return QuantizedTensor(
        packed, nested.codes, zeros, nested.scales, nested.offset, nested.map, shape, dtype, spec
    )


def _check_scales(numel: int, spec: QuantSpec, scales: Tensor, zeros: Tensor | None) -> None:
    blocks = spec.n_blocks(numel)
    if scales.dtype != torch.float32 or scales.numel() != blocks:
        raise ValueError(f"scales must be float32 ({blocks},), got {scales.dtype} {tuple(scales.shape)}")
    if (zeros is not None) != spec.fmt.affine:
        raise ValueError(f"{spec.format} {'needs' if spec.fmt.affine else 'has no'} zeros")
    if zeros is not None and (zeros.dtype != torch.uint8 or zeros.numel() != blocks):
        raise ValueError(f"zeros must be uint8 ({blocks},), got {zeros.dtype} {tuple(zeros.shape)}")


def _reach(fmt: Format) -> float:
    """The largest value of a block whose scale is 1."""
    return max(fmt.levels) - min(fmt.levels) if fmt.affine else max(map(abs, fmt.levels))


def _refuse_non_finite(scales: Tensor, weight: Tensor, fmt: Format, name: str | None) -> None:
    """A NaN or inf shows in its block's scale, which is 1/block_size of the data to look at."""
    # half of the range is left for a search, which tries larger scales than it takes
    if not (scales.abs() < torch.finfo(torch.float32).max / (2 * _reach(fmt))).all():
        bad = int((~torch.isfinite(weight)).sum())
        if bad:
            raise ValueError(
                f"{_title(name)} {tuple(weight.shape)} has {bad} elements that are NaN or inf; "
                "only finite weights can be quantised"
            )
        largest = weight.abs().max().item()
        raise ValueError(
            f"{_title(name)} {tuple(weight.shape)} has values up to {largest:.3g}: too near to float32's "
            "largest for scales and errors to be finite"
        )


def _title(name: str | None) -> str:
    return "weight" if name is None else f"weight {name!r}"
