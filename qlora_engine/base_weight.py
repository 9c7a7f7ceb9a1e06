"""Read and replace the weight of a base layer, whatever it is stored as."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quant.linear import QuantEmbedding, QuantLinear

_ADOPTED = "_adopted_from"


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is GPT-2's Conv1D, a linear layer whose weight is stored (in, out)."""
    # By name: importing transformers only to compare classes would make a light import heavy.
    return any(
        c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils"
        for c in type(module).__mro__[:-1]
    )


def is_bnb_linear(module: nn.Module) -> str | None:
    """``"4bit"`` or ``"8bit"`` for bitsandbytes' linear layers, else None; bitsandbytes is not imported."""
    for cls in type(module).__mro__[:-1]:  # but for object, whose module torch 2.6 cannot trace
        if cls.__module__.startswith("bitsandbytes"):
            if cls.__name__ == "Linear4bit":
                return "4bit"
            if cls.__name__ == "Linear8bitLt":
                return "8bit"
    return None


def is_quantized(module: nn.Module) -> bool:
    """Whether the module's weight is stored as codes."""
    return isinstance(module, (QuantLinear, QuantEmbedding)) or is_bnb_linear(module) is not None


def device_and_dtype(module: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Where the weight is and what dtype it stands for (not what its codes are stored as)."""
    if isinstance(module, (QuantLinear, QuantEmbedding)):
        return module.codes.device, module.compute_dtype or module.weight_dtype
    if isinstance(module, nn.MultiheadAttention):
        module = module.out_proj
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None, None
    dtype = (
        getattr(module, "compute_dtype", None) or weight.dtype
    )  # bitsandbytes' layers have a compute_dtype
    return weight.device, dtype


def dense_weight(module: nn.Module) -> Tensor:
    """The weight, dense and float, in the module's own orientation; a fresh tensor only if quantised."""
    if isinstance(module, (QuantLinear, QuantEmbedding)):
        return module.dequantize()
    kind = is_bnb_linear(module)
    if kind == "4bit":
        from quant.bnb_format import from_linear4bit

        return from_linear4bit(module).dequantize()
    if kind == "8bit":
        from quant.bnb_format import dequantize_int8, int8_statistics

        return dequantize_int8(*int8_statistics(module), torch.float16)
    return module.weight.data  # type: ignore[union-attr,return-value]


def adopt(module: nn.Module) -> nn.Module:
    """A bitsandbytes 4-bit layer as a QuantLinear on the same storage; any other module as it is."""
    if is_bnb_linear(module) != "4bit":
        return module
    from quant.bnb_format import from_linear4bit

    layer: Any = module
    if getattr(layer.weight, "quant_state", None) is None and getattr(layer, "quant_state", None) is None:
        return module  # not quantised yet: bitsandbytes does that when it moves to its device
    new = QuantLinear.from_quantized(from_linear4bit(module), layer.bias, layer.compute_dtype)
    # Out of nn.Module's sight: on the same storage, and put back when the adapters are taken off.
    new.__dict__[_ADOPTED] = module
    return new.train(module.training)


def restore_adopted(model: nn.Module) -> None:
    """Put the bitsandbytes layers that were adopted back in their places."""
    for name, module in list(model.named_modules()):
        original = module.__dict__.get(_ADOPTED)
        if original is not None:
            parent, _, child = name.rpartition(".")
            original.to(module.codes.device)
            original.bias = module.bias
            setattr(model.get_submodule(parent), child, original.train(module.training))


def dense_module(
    module: nn.Module, weight: Tensor | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """The full-precision layer that a quantised one stands for: nn.Linear, Conv1D or nn.Embedding.

    Args:
        module: QuantLinear, QuantEmbedding or bitsandbytes' linear layers.
        weight: To take instead of the dequantised one, in the quantised module's orientation.
        dtype: Of the weight, and of the bias; default: the weight's.

    Raises:
        TypeError: ``module`` is not quantised.
    """
    if not is_quantized(module):
        raise TypeError(f"{type(module).__name__} is not quantised")
    if weight is None:
        weight = dense_weight(module)
    weight = weight.to(dtype or weight.dtype)
    new: Any
    if isinstance(module, QuantEmbedding):
        rows, width = module.shape
        with torch.device("meta"):
            new = _scaled_embedding(module)(rows, width, module.padding_idx)
        new.weight = nn.Parameter(weight)
        return new.train(module.training)  # type: ignore[no-any-return]
    out_features, in_features = weight.shape
    if isinstance(module, QuantLinear) and module.conv1d:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            new = Conv1D(out_features, in_features)
        weight = weight.t().contiguous()
    else:
        with torch.device("meta"):
            new = nn.Linear(in_features, out_features, bias=module.bias is not None)
    new.weight = nn.Parameter(weight)
    if module.bias is not None:
        bias: Any = module.bias
        new.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=bias.requires_grad)
    return new.train(module.training)  # type: ignore[no-any-return]


class ScaledEmbedding(nn.Embedding):
    """nn.Embedding whose rows are multiplied by ``embed_scale`` when they are looked up."""

    embed_scale: float = 1.0

    def forward(self, input: Tensor) -> Tensor:
        """Token ids -> scaled rows."""
        return super().forward(input) * self.embed_scale


def _scaled_embedding(module: QuantEmbedding) -> Any:
    scale = getattr(module, "embed_scale", None)
    if scale is None:
        return nn.Embedding

    def make(*args: Any) -> ScaledEmbedding:
        new = ScaledEmbedding(*args)
        new.embed_scale = scale
        return new

    return make


@torch.no_grad()
def store_weight(module: nn.Module, weight: Tensor) -> None:
    """Make ``weight`` (the module's own orientation) its weight; a quantised module quantises it with its
    spec.

    Raises:
        TypeError: a bitsandbytes layer, which is adopted before it is written to.
    """
    if isinstance(module, (QuantLinear, QuantEmbedding)):
        from quant.tensor import quantize

        module.set_quantized(quantize(weight, module.spec))
    elif is_bnb_linear(module):
        raise TypeError(f"the weight of a {type(module).__name__} cannot be replaced in place")
    else:
        module.weight.data = weight  # type: ignore[union-attr]


def is_known(module: nn.Module) -> bool:
    """Whether the layer is of a kind that LoRA is meant for here."""
    known = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    return (
        isinstance(module, (*known, QuantLinear, QuantEmbedding))
        or is_conv1d(module)
        or bool(is_bnb_linear(module))
    )


def in_out_features(module: nn.Module) -> tuple[int | None, int | None]:
    """(in, out) of the layer's linear map; an embedding's (rows, row width), a convolution's channels."""
    if isinstance(module, (nn.Embedding, QuantEmbedding)):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.in_channels, module.out_channels
    if is_conv1d(module):
        rows, columns = module.weight.shape  # type: ignore[union-attr,misc]
        return rows, columns  # type: ignore[return-value]
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, 3 * module.embed_dim
    return getattr(module, "in_features", None), getattr(module, "out_features", None)
