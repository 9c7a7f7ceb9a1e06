"""How a solved layer and the model's config look on disk, in each of the three save formats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant import QuantizedTensor
from quant.bnb_format import to_bnb
from quant.linear import QuantEmbedding, QuantLinear

from .errors import InputError
from .layer_plan import LayerPlan
from .plan import Plan
from .safetensors_io import (
    COPY_BYTES,
    DTYPE_BITS,
    STORED_DTYPE,
    TORCH_DTYPES,
    DenseTensor,
    TensorEntry,
    Writable,
)

TABLE_BYTES = 512  # about what bitsandbytes' quant_map and quant_state take, to plan shards
NATIVE_METHOD = "qlora_engine"
NATIVE_VERSION = 1


def round_to(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``tensor`` in another floating dtype.

    Raises:
        InputError: a finite value becomes infinite.
    """
    rounded = tensor.to(dtype)
    if dtype == torch.float16 and bool((torch.isinf(rounded) & torch.isfinite(tensor)).any()):
        largest = float(tensor.abs().max())
        raise InputError(
            f"'{name}' has values up to {largest:.3g}, beyond float16's 65504; use --dtype bfloat16"
        )
    return rounded


@dataclass(frozen=True)
class ConvertedTensor:
    """A tensor on disk, to be written in another floating dtype, a few megabytes at a time."""

    entry: TensorEntry
    dtype: str

    @property
    def name(self) -> str:
        """Name in the file."""
        return self.entry.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        return self.entry.shape

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.entry.numel * DTYPE_BITS[self.dtype] // 8

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, converted piece by piece."""
        source, target = TORCH_DTYPES[self.entry.dtype], TORCH_DTYPES[self.dtype]
        assert COPY_BYTES % 8 == 0  # a piece never ends within an element
        for chunk in self.entry.chunks():
            piece = round_to(torch.frombuffer(chunk, dtype=source), target, self.name)
            yield piece.view(torch.uint8).numpy().data


def rest_tensor(plan: Plan, entry: TensorEntry) -> Writable:
    """What is written for a tensor that is not quantised."""
    dtype = plan.stored_dtype(entry)
    return entry if dtype == entry.dtype else ConvertedTensor(entry, dtype)


def dense_base(plan: Plan, layer: LayerPlan, q: QuantizedTensor) -> Tensor:
    """The dequantised weight (out, in) in the dtype in which it is saved."""
    return round_to(q.dequantize(torch.float32), TORCH_DTYPES[STORED_DTYPE[plan.dtype]], layer.entry.name)


def layer_tensors(plan: Plan, layer: LayerPlan, q: QuantizedTensor) -> list[DenseTensor]:
    """What is written for a quantised weight.

    bnb: bitsandbytes' tensors under the name the weight had (a Conv1D's (out, in), as transformers expects).
    native: a QuantLinear's state dict under the module's path. dense: one tensor like the original.
    """
    if plan.save_format == "bnb":
        return [DenseTensor(name, tensor) for name, tensor in to_bnb(layer.entry.name, q).items()]
    if plan.save_format == "native":
        build = QuantEmbedding if layer.module.kind == "embedding" else QuantLinear
        state = build.from_quantized(q).state_dict()
        return [DenseTensor(f"{layer.path}.{name}", tensor) for name, tensor in state.items()]
    weight = dense_base(plan, layer, q)
    return [DenseTensor(layer.entry.name, weight.T if layer.module.kind == "conv1d" else weight)]


def model_config(plan: Plan) -> dict[str, Any]:
    """The model's own config.json with its dtype, and with the quantization_config that its loader needs."""
    config = dict(plan.checkpoint.config)
    named = [key for key in ("dtype", "torch_dtype") if config.get(key) is not None] or ["dtype"]
    config |= dict.fromkeys(named, plan.dtype)
    if plan.save_format == "bnb":
        # The tensors carry their own type and block size; this is what new layers would get.
        spec = plan.layers[0].spec
        config["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": spec.fmt.bnb_type,
            "bnb_4bit_compute_dtype": plan.dtype,
            "bnb_4bit_use_double_quant": spec.double_quant,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(plan.skip_modules),
        }
    elif plan.save_format == "native":
        usual = plan.options.spec_for("")
        config["quantization_config"] = {
            "quant_method": NATIVE_METHOD,
            "version": NATIVE_VERSION,
            "spec": usual.to_dict(),
            "modules": {layer.path: layer.spec.to_dict() for layer in plan.layers if layer.spec != usual},
            "quantized_modules": [layer.path for layer in plan.layers],
        }
    return config
