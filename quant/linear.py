"""Frozen quantised layers: their codes and scales are uint8 Parameters, their product is one custom op.

The scales are kept as the *bytes* of their float32 values, so that ``.half()``, ``.to(bfloat16)`` and
mixed-precision policies never round them, and FSDP shards them by rows together with the codes.

A layer that stood for GPT-2's Conv1D, whose weight is stored (in, out), holds the transposed weight (out,
in) like any other and has ``conv1d`` set, so that it can be turned back.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from quant import packing
from quant.embedding_op import embedding_rows
from quant.linear_op import TENSOR_NAMES, as_quantized, quant_linear
from quant.spec import NESTED_BLOCK_SIZE, QuantSpec
from quant.tensor import QuantizedTensor


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _as_bytes(tensor: Tensor, rows: int | None) -> Tensor:
    """``tensor`` as uint8, (rows, bytes a row) where the rows are known, else (bytes, 1)."""
    flat = tensor.contiguous().reshape(-1)
    flat = flat.view(torch.uint8) if flat.dtype != torch.uint8 else flat
    return flat.reshape(rows, -1) if rows else flat.reshape(-1, 1)


class QuantizedModule(nn.Module):
    """Holds one QuantizedTensor of shape (rows, columns) as uint8 Parameters.

    Attributes:
        codes, scales, zeros, nested_scales, nested_offset, nested_map: uint8; a tensor that the spec does
            not need is None. Codes, scales and zeros are (rows, bytes a row) where a row is
            self-contained, that is where columns is a multiple of the block size, else (bytes, 1).
        spec: How the codes are to be read.
        weight_dtype: Dtype of the weight that was quantised.
        compute_dtype: Dtype to compute in; None means that of the input.
        compute: "same", or "fp8": the products with this weight in float8, see ``quant.fp8``.
    """

    codes: nn.Parameter
    scales: nn.Parameter
    compute = "same"

    def __init__(self, rows: int, columns: int, spec: QuantSpec, weight_dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = torch.Size((rows, columns))
        self.spec = spec
        self.weight_dtype = weight_dtype
        self.compute_dtype: torch.dtype | None = None
        for name in TENSOR_NAMES:
            self.register_parameter(name, None)

    @property
    def rows_are_self_contained(self) -> bool:
        """Whether every row begins on a block and on a byte."""
        columns = self.shape[1]
        return columns % self.spec.block_size == 0 and columns * self.spec.bits % 8 == 0

    def set_quantized(self, q: QuantizedTensor) -> None:
        """Take the tensors of ``q`` over, without a copy where their layout allows it.

        Raises:
            ValueError: ``q`` has another shape or spec.
        """
        if q.shape != self.shape or q.spec != self.spec:
            raise ValueError(f"expected {tuple(self.shape)} {self.spec}, got {tuple(q.shape)} {q.spec}")
        rows = self.shape[0] if self.rows_are_self_contained else None
        for name in TENSOR_NAMES:
            tensor = getattr(q, name)
            if tensor is None:
                setattr(self, name, None)
                continue
            by_rows = rows if name in ("codes", "scales", "zeros") else None
            setattr(self, name, _frozen(_as_bytes(tensor, by_rows)))

    def quantized(self) -> QuantizedTensor:
        """The weight as a QuantizedTensor that shares this module's storage."""
        tensors = [getattr(self, name) for name in TENSOR_NAMES]
        return as_quantized(tensors, self.spec, self.shape, self.weight_dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, (rows, columns), a fresh tensor of ``dtype`` (default: the original's)."""
        return self.quantized().dequantize(dtype or self.weight_dtype)

    @property
    def weight(self) -> Tensor:
        """The dense weight, dequantised at every access: right for any reader, slow for a frequent one."""
        return self.dequantize()

    def __getstate__(self) -> dict[str, Any]:
        # A copy has storage of its own, so it is no view of the layer that this one was adopted from.
        return {key: value for key, value in self.__dict__.items() if key != "_adopted_from"}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *rest: Any
    ) -> None:
        # Codes read against another model's scales are garbage, so half a layer is an error even if not
        # strict.
        needed = [name for name in TENSOR_NAMES if getattr(self, name) is not None]
        present = [name for name in needed if prefix + name in state_dict]
        if present and len(present) < len(needed):
            missing = ", ".join(prefix + name for name in needed if name not in present)
            rest[2].append(f"quantised layer '{prefix[:-1]}' is incomplete: missing {missing}")
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *rest)

    def _describe(self) -> str:
        text = f"{self.spec.format}, block_size={self.spec.block_size}"
        return text + (", double_quant" if self.spec.double_quant else "")


def empty_like_quantized(rows: int, columns: int, spec: QuantSpec, device: Any) -> dict[str, Tensor]:
    """Uninitialised uint8 tensors of the shapes that a QuantizedModule of this size holds."""
    numel = rows * columns
    n_blocks = spec.n_blocks(numel)
    n_groups = -(-n_blocks // NESTED_BLOCK_SIZE)
    self_contained = columns % spec.block_size == 0 and columns * spec.bits % 8 == 0
    sizes = {
        "codes": packing.packed_bytes(numel, spec.bits),
        "scales": n_blocks * (1 if spec.double_quant else 4),
        "zeros": n_blocks if spec.fmt.affine else 0,
        "nested_scales": 4 * n_groups if spec.double_quant else 0,
        "nested_offset": 4 if spec.double_quant else 0,
        "nested_map": 1024 if spec.double_quant else 0,
    }
    shapes = {
        name: (rows, size // rows) if self_contained and name in ("codes", "scales", "zeros") else (size, 1)
        for name, size in sizes.items()
        if size
    }
    return {name: torch.empty(shape, dtype=torch.uint8, device=device) for name, shape in shapes.items()}


class QuantLinear(QuantizedModule):
    """``y = x W^T + b`` with a frozen quantised W, (out_features, in_features).

    Args:
        in_features, out_features: Of the linear map.
        spec: How W is stored.
        bias: Whether there is a bias (an ordinary Parameter, of ``weight_dtype``).
        weight_dtype: Dtype of the weight before quantisation.
        conv1d: The layer stands for a Conv1D, which stores (in, out).
        device: Of the uninitialised tensors; use ``from_quantized`` to make a filled layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        *,
        bias: bool = True,
        weight_dtype: torch.dtype = torch.float32,
        conv1d: bool = False,
        device: Any = None,
    ) -> None:
        super().__init__(out_features, in_features, spec, weight_dtype)
        self.in_features = in_features
        self.out_features = out_features
        self.conv1d = conv1d
        for name, tensor in empty_like_quantized(out_features, in_features, spec, device).items():
            setattr(self, name, _frozen(tensor))
        self.bias = (
            nn.Parameter(torch.empty(out_features, dtype=weight_dtype, device=device)) if bias else None
        )

    @classmethod
    def from_quantized(
        cls,
        q: QuantizedTensor,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
        conv1d: bool = False,
    ) -> QuantLinear:
        """A layer around ``q``, (out, in), on its storage; a ``bias`` that is a Parameter stays that
        Parameter."""
        rows, columns = q.shape
        module = cls(columns, rows, q.spec, bias=False, weight_dtype=q.dtype, conv1d=conv1d, device="meta")
        module.set_quantized(q)
        module.compute_dtype = compute_dtype
        if bias is not None:
            module.bias = bias if isinstance(bias, nn.Parameter) else _frozen(bias)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the input's dtype (under autocast, in autocast's)."""
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            compute = out_dtype = torch.get_autocast_dtype(kind)
        else:
            compute, out_dtype = self.compute_dtype or x.dtype, x.dtype
        tensors = [getattr(self, name) for name in TENSOR_NAMES]
        spec = self.spec
        settings = (spec.format, spec.block_size, spec.double_quant, *self.shape, self.compute)
        y = quant_linear(x.to(compute), *tensors, self.bias, *settings)
        return cast(Tensor, y).to(out_dtype)

    def extra_repr(self) -> str:
        """Sizes and format, for printing."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, "
            + self._describe()
            + ("" if self.compute == "same" else f", compute={self.compute}")
        )


class QuantEmbedding(QuantizedModule):
    """A frozen quantised embedding table, (num_embeddings, embedding_dim); only the rows asked for are
    dequantised.

    Args:
        num_embeddings, embedding_dim: Of the table.
        spec: How it is stored.
        padding_idx: As nn.Embedding's; it has no effect on a frozen table and is kept for readers.
        weight_dtype: Dtype of the table before quantisation, and of the output.
        embed_scale: A number that multiplies the rows, or None.
        device: Of the uninitialised tensors.
    """

    # nn.Embedding's options; a frozen table has none of them, but readers look.
    max_norm: float | None = None
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False
    sparse: bool = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        spec: QuantSpec,
        *,
        padding_idx: int | None = None,
        weight_dtype: torch.dtype = torch.float32,
        embed_scale: float | None = None,
        device: Any = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, spec, weight_dtype)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        if embed_scale is not None:
            self.embed_scale = embed_scale
        for name, tensor in empty_like_quantized(num_embeddings, embedding_dim, spec, device).items():
            setattr(self, name, _frozen(tensor))

    @classmethod
    def from_quantized(
        cls, q: QuantizedTensor, padding_idx: int | None = None, embed_scale: float | None = None
    ) -> QuantEmbedding:
        """A layer around ``q``, (rows, row width), sharing its storage."""
        rows, columns = q.shape
        module = cls(
            rows,
            columns,
            q.spec,
            padding_idx=padding_idx,
            weight_dtype=q.dtype,
            embed_scale=embed_scale,
            device="meta",
        )
        module.set_quantized(q)
        return module

    def rows(self, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Dequantise the rows ``index`` (any shape, integer): (*index.shape, embedding_dim)."""
        tensors = [getattr(self, name) for name in TENSOR_NAMES]
        spec = self.spec
        rows = embedding_rows(
            index,
            *tensors,
            spec.format,
            spec.block_size,
            spec.double_quant,
            *self.shape,
            dtype or self.weight_dtype,
        )
        return cast(Tensor, rows)

    def forward(self, x: Tensor) -> Tensor:
        """Token ids (any shape, integer) -> rows of ``weight_dtype`` (*x.shape, embedding_dim)."""
        out = self.rows(x)
        scale = getattr(self, "embed_scale", None)
        return out if scale is None else out * scale

    def extra_repr(self) -> str:
        """Sizes and format, for printing."""
        return f"{self.num_embeddings}, {self.embedding_dim}, " + self._describe()
