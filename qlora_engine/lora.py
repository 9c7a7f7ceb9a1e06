"""The LoRA layers: Linear (every stored format, Conv1D included), Embedding; convolutions are in
``lora_conv``."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quant.linear import QuantEmbedding, QuantLinear

from . import fused
from .base_weight import adopt, is_bnb_linear, is_conv1d
from .config import LoraConfig
from .dora import DoraEmbeddingLayer
from .lora_conv import Conv1d, Conv2d, Conv3d
from .lora_layer import LoraLayer
from .tuner_layer import BaseTunerLayer


class Linear(LoraLayer, nn.Module):
    """``base(x) + scaling * B(A(dropout(x)))`` on any linear layer: dense, Conv1D, quantised here or by
    bitsandbytes.

    A bitsandbytes 4-bit layer is adopted: ``base_layer`` becomes a QuantLinear on the same storage.

    Args:
        base_layer: The layer to wrap.
        adapter_name: The first adapter.
        config: Its configuration.
        r: Its rank, ``config.rank_pattern`` applied.
        lora_alpha: Its alpha, ``config.alpha_pattern`` applied.
        is_target_conv_1d_layer: The base is a Conv1D.
        kwargs: See ``LoraLayer.update_layer``.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, adopt(base_layer), **kwargs)
        # A quantised Conv1D is stored (out, in) like every QuantLinear.
        self.fan_in_fan_out = config.fan_in_fan_out and not isinstance(self.get_base_layer(), QuantLinear)
        self.is_target_conv_1d_layer = is_target_conv_1d_layer
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _create_weights(
        self, adapter_name: str, r: int, config: LoraConfig, tied: dict[str, Tensor] | None
    ) -> None:
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r, self.out_features, bias=config.lora_bias)
        if tied:
            self.lora_A[adapter_name].weight = nn.Parameter(tied["lora_A"])
            self.lora_B[adapter_name].weight = nn.Parameter(tied["lora_B"])

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        delta = B @ A
        return delta.t() if self.fan_in_fan_out else delta

    def _adapter_output(self, x: Tensor, adapter: str) -> Tensor:
        A, B = self.lora_A[adapter], self.lora_B[adapter]
        x = self._cast_input_dtype(x, A.weight.dtype)
        return B(A(self.lora_dropout[adapter](x))) * self.scaling[adapter]

    def _fused_forward(self, x: Tensor) -> Tensor | None:
        adapters = [name for name in self.active_adapters if self.has_adapter(name)]
        if not fused.applies(self, adapters, x):
            return None
        name, dropout = adapters[0], self.lora_dropout[adapters[0]]
        rate = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        return fused.lora_linear(x, cast(QuantLinear, self.base_layer), A, B, self.scaling[name], rate)

    def _dora_forward(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        A, B = self.lora_A[adapter], self.lora_B[adapter]
        x = self._cast_input_dtype(x, A.weight.dtype)
        bias = self.get_base_layer().bias
        dropout = self.lora_dropout[adapter]
        base = result
        if self.training and not isinstance(dropout, nn.Identity):
            x = dropout(x)
            base = self.get_base_layer()(x.to(result.dtype))
        if bias is not None:
            base = base - bias
        ratio = self.lora_magnitude_vector[adapter].weight / self.weight_norm(adapter).to(x.dtype)  # (out,)
        return result + (ratio - 1) * base + ratio * B(A(x)) * self.scaling[adapter]


class Embedding(LoraLayer, nn.Module):
    """LoRA on an embedding table (rows, width): A is (r, rows), B (width, r); the dropout is kept but not
    applied.

    Args:
        base_layer: nn.Embedding or QuantEmbedding.
        adapter_name: The first adapter.
        config: Its configuration.
        r: Its rank.
        lora_alpha: Its alpha.
        kwargs: See ``LoraLayer.update_layer``.
    """

    _magnitude_class = DoraEmbeddingLayer

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = config.fan_in_fan_out
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _check_config(self, r: int, config: LoraConfig) -> None:
        if config.lora_bias:
            raise ValueError(f"lora_bias={config.lora_bias} is not supported for {type(self).__name__}.")

    def _create_weights(
        self, adapter_name: str, r: int, config: LoraConfig, tied: dict[str, Tensor] | None
    ) -> None:
        self.lora_embedding_A[adapter_name] = nn.Parameter(torch.randn((r, self.in_features)))
        self.lora_embedding_B[adapter_name] = nn.Parameter(torch.randn((self.out_features, r)))

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        return (B @ A).t()

    def _embed(self, x: Tensor, weight: Tensor) -> Tensor:
        base = self.get_base_layer()
        return F.embedding(
            x,
            weight,
            padding_idx=base.padding_idx,
            max_norm=base.max_norm,
            norm_type=base.norm_type,
            scale_grad_by_freq=base.scale_grad_by_freq,
            sparse=base.sparse,
        )

    def _adapter_output(self, x: Tensor, adapter: str) -> Tensor:
        A, B = self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]
        out = self._embed(x, A.t()) @ B.t() * self.scaling[adapter]
        embed_scale = self._get_embed_scale()
        return out if embed_scale is None else out * embed_scale.to(out.dtype)

    def _dora_forward(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        magnitude = self.lora_magnitude_vector[adapter].weight
        ratio = magnitude / self.weight_norm(adapter).to(magnitude.dtype)  # (width,)
        return ratio * (result + self._adapter_output(x, adapter))


LoraLinear = Linear
LoraEmbedding = Embedding


def create_lora_layer(
    target: nn.Module,
    adapter_name: str,
    config: LoraConfig,
    *,
    parameter_name: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The LoRA layer around ``target``, by its type; ``config._custom_modules`` is asked first.

    Sets ``config.fan_in_fan_out`` right, with a warning, where it does not fit the layer.

    Raises:
        ValueError: no LoRA layer for this type.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    for layer_type, lora_type in (config._custom_modules or {}).items():
        if isinstance(base, layer_type):
            return lora_type(target, adapter_name, config=config, **kwargs)
    if parameter_name is not None:
        from .lora_param import ParamWrapper

        return ParamWrapper(target, adapter_name, parameter_name=parameter_name, config=config, **kwargs)
    if isinstance(base, (nn.Embedding, QuantEmbedding)):
        return Embedding(target, adapter_name, config=config, **kwargs)
    for conv_type, lora_conv in ((nn.Conv2d, Conv2d), (nn.Conv3d, Conv3d), (nn.Conv1d, Conv1d)):
        if isinstance(base, conv_type):
            return lora_conv(target, adapter_name, config=config, **kwargs)
    if isinstance(base, nn.MultiheadAttention):
        from .lora_attention import MultiheadAttention

        return MultiheadAttention(target, adapter_name, config=config, **kwargs)
    if is_conv1d(base) or (isinstance(base, QuantLinear) and base.conv1d):
        if not config.fan_in_fan_out:
            warnings.warn(
                "fan_in_fan_out is set to False but the target module is `Conv1D`. "
                "Setting fan_in_fan_out to True.",
                stacklevel=2,
            )
            config.fan_in_fan_out = True
        return Linear(target, adapter_name, is_target_conv_1d_layer=True, config=config, **kwargs)
    if isinstance(base, (nn.Linear, QuantLinear)) or is_bnb_linear(base):
        if config.fan_in_fan_out:
            warnings.warn(
                "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`. "
                "Setting fan_in_fan_out to False.",
                stacklevel=2,
            )
            config.fan_in_fan_out = False
        return Linear(target, adapter_name, config=config, **kwargs)
    raise ValueError(
        f"Target module {target} is not supported. Currently, only the following modules are supported: "
        "`torch.nn.Linear`, `torch.nn.Embedding`, `torch.nn.Conv1d`, `torch.nn.Conv2d`, `torch.nn.Conv3d`, "
        "`transformers.pytorch_utils.Conv1D`, `torch.nn.MultiheadAttention.`."
    )
