"""LoRA on full-precision convolutions: A has the base's kernel, B is 1 x 1."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .config import LoraConfig
from .dora import DoraConvNdLayer
from .lora_layer import LoraLayer


class _ConvNd(LoraLayer, nn.Module):
    """LoRA on a convolution of any dimension; ``groups`` must divide the rank.

    Args:
        base_layer: nn.Conv1d, nn.Conv2d or nn.Conv3d.
        adapter_name: The first adapter.
        config: Its configuration.
        r: Its rank.
        lora_alpha: Its alpha.
        kwargs: See ``LoraLayer.update_layer``.

    Raises:
        ValueError: ``groups`` does not divide ``r``.
    """

    _magnitude_class = DoraConvNdLayer

    def __init__(
        self,
        base_layer: Any,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        if self.get_base_layer().groups > 1:
            warnings.warn(
                "LoRA adapter added to ConvNd layer with groups > 1. Merging is not supported.", stacklevel=3
            )
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _check_config(self, r: int, config: LoraConfig) -> None:
        super()._check_config(r, config)
        base = self.get_base_layer()
        if r % base.groups:
            raise ValueError(
                f"Targeting a {type(base).__name__} with groups={base.groups} and rank {r}. "
                "Currently, support is limited to conv layers where the rank is divisible by groups. "
                "Either choose a different rank or do not target this specific layer."
            )

    def _create_weights(
        self, adapter_name: str, r: int, config: LoraConfig, tied: dict[str, Tensor] | None
    ) -> None:
        base = self.get_base_layer()
        conv, ones = type(base), (1,) * (base.weight.dim() - 2)
        # The base's whole geometry: a delta of its weight must give the same output as this branch.
        geometry = {name: getattr(base, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        self.lora_A[adapter_name] = conv(self.in_features, r, base.kernel_size, bias=False, **geometry)
        self.lora_B[adapter_name] = conv(
            r, self.out_features, ones, ones, groups=base.groups, bias=config.lora_bias
        )

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        base = self.get_base_layer()
        if base.groups > 1:
            raise NotImplementedError("Merging is not supported for _ConvNd layers with groups > 1!")
        return (B @ A).reshape(base.weight.shape)

    def _adapter_output(self, x: Tensor, adapter: str) -> Tensor:
        A, B = self.lora_A[adapter], self.lora_B[adapter]
        x = self._cast_input_dtype(x, A.weight.dtype)
        return B(A(self.lora_dropout[adapter](x))) * self.scaling[adapter]

    def _shape_norm(self, norm: Tensor) -> Tensor:
        return norm.reshape(1, -1, *(1,) * (self.get_base_layer().weight.dim() - 2))

    @torch.no_grad()
    def _compute_norm(self, A: Tensor, B: Tensor, scaling: float, transposed: bool) -> Tensor:
        """As LoraLayer's; with groups, of the dense kernel: the branch sees all inputs, the base its
        group's."""
        base = self.get_base_layer()
        groups = base.groups
        if groups == 1:
            return super()._compute_norm(A, B, scaling, transposed)
        weight = base.weight.float().flatten(2)  # (out, in / groups, kernel)
        width, kernel = weight.shape[1:]
        norms = []
        parts = zip(weight.chunk(groups), A.float().chunk(groups), B.float().chunk(groups), strict=True)
        for i, (rows, factor_A, factor_B) in enumerate(parts):
            total = (scaling * factor_B @ factor_A).view(-1, width * groups, kernel)
            total[:, i * width : (i + 1) * width] += rows
            norms.append(total.flatten(1).norm(dim=1))
        return torch.cat(norms)

    def _dora_forward(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        A, B = self.lora_A[adapter], self.lora_B[adapter]
        x = self._cast_input_dtype(x, A.weight.dtype)
        base_layer = self.get_base_layer()
        dropout = self.lora_dropout[adapter]
        base = result
        if self.training and not isinstance(dropout, nn.Identity):
            x = dropout(x)
            base = base_layer(x.to(result.dtype))
        if base_layer.bias is not None:
            base = base - self._shape_norm(base_layer.bias)
        ratio = self.lora_magnitude_vector[adapter].weight / self._shape_norm(self.weight_norm(adapter))
        return result + (ratio - 1) * base + ratio * B(A(x)) * self.scaling[adapter]


class Conv1d(_ConvNd):
    """LoRA on nn.Conv1d."""


class Conv2d(_ConvNd):
    """LoRA on nn.Conv2d."""


class Conv3d(_ConvNd):
    """LoRA on nn.Conv3d."""


LoraConv1d, LoraConv2d, LoraConv3d = Conv1d, Conv2d, Conv3d
