"""LoRA on nn.MultiheadAttention: on its stacked q, k, v projection and on its output projection.

The module multiplies by bare Parameters and by ``out_proj.weight``, never calling a layer, so the adapted
weights stand in their place while it runs.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config import LoraConfig
from .lora_layer import LoraLayer
from .tuner_layer import check_adapters_to_merge

# What callers (nn.TransformerEncoderLayer for one) read off an attention module.
_EXPOSED = frozenset(
    (
        *("embed_dim", "kdim", "vdim", "num_heads", "dropout", "batch_first", "head_dim", "in_proj_weight"),
        *("in_proj_bias", "bias_k", "bias_v", "add_zero_attn", "merge_masks", "_qkv_same_embed_dim"),
        *("q_proj_weight", "k_proj_weight", "v_proj_weight"),
    )
)


class MultiheadAttention(LoraLayer, nn.Module):
    """Wraps nn.MultiheadAttention; its ``out_proj`` becomes a LoRA Linear with the same adapters.

    Args:
        base_layer: The attention module; query, key and value must have one width.
        adapter_name: The first adapter.
        config: Its configuration.
        r: Its rank.
        lora_alpha: Its alpha.
        kwargs: See ``LoraLayer.update_layer``.

    Raises:
        ValueError: different widths, or DoRA, or an initialisation from the weight.
        TypeError: ``out_proj`` is no nn.Linear.
    """

    def __init__(
        self,
        base_layer: Any,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        from .lora import Linear

        nn.Module.__init__(self)
        if not getattr(base_layer, "_qkv_same_embed_dim", True):
            raise ValueError(
                f"Only same embed for query/key/value is supported as of now for {type(self).__name__}."
            )
        self._refuse(config)
        if not isinstance(base_layer.out_proj, nn.Linear):
            raise TypeError(f"out_proj must be an instance of nn.Linear for {type(self).__name__}.")
        LoraLayer.__init__(self, base_layer)
        base_layer.out_proj = Linear(
            base_layer.out_proj, adapter_name, config, r=r, lora_alpha=lora_alpha, **kwargs
        )
        self._active_adapter = adapter_name
        self._original: Tensor | None = None
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        # A hook, if only an empty one, keeps nn.TransformerEncoderLayer from its fast path, which would
        # read the base # weights and leave the adapters out.
        self.register_forward_hook(_nothing)

    def _refuse(self, config: LoraConfig) -> None:
        name = type(self).__name__
        if config.use_dora:
            raise ValueError(f"{name} does not support DoRA (yet), please set use_dora to False")
        init = config.init_lora_weights
        if isinstance(init, str) and init.lower() not in ("gaussian", "eva", "orthogonal"):
            raise ValueError(f"{name} does not support init_lora_weights={init!r}")

    def __getattr__(self, name: str) -> Any:
        if name in _EXPOSED:
            return getattr(self.get_base_layer(), name)
        return super().__getattr__(name)

    @property
    def out_proj(self) -> nn.Module:
        """The output projection without its adapters."""
        projection: nn.Module = self.get_base_layer().out_proj.get_base_layer()
        return projection

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Add an adapter to both projections; see ``LoraLayer.update_layer``."""
        self._refuse(config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        self.base_layer.out_proj.update_layer(  # type: ignore[operator,union-attr]
            adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs
        )

    def _check_config(self, r: int, config: LoraConfig) -> None:
        """Nothing beside what ``_refuse`` refuses."""

    def _create_weights(self, adapter_name: str, r: int, config: LoraConfig, tied: Any) -> None:
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r, self.out_features, bias=config.lora_bias)

    def get_base_weight(self) -> Tensor:
        """The stacked projection, (3 * width, width)."""
        weight: Tensor = self.get_base_layer().in_proj_weight.data
        return weight

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters (default: the active ones) to both projections; the originals are kept beside.

        Raises:
            ValueError: ``safe_merge`` and a result is not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if self.has_adapter(n)]
        if not names:
            return
        base = self.get_base_layer()
        weight = base.in_proj_weight
        merged = self._adapted(weight.data, names)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken"
            )
        projection = base.out_proj
        new = [name for name in names if name not in projection.merged_adapters]
        if new:
            projection.merge(safe_merge=safe_merge, adapter_names=new)
        if self._original is None:
            self._original = weight.data
        weight.data = merged
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put both projections back as they were, bit for bit."""
        if not self.merged or self._original is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        base.in_proj_weight.data = self._original.to(base.in_proj_weight.data)
        self._original = None
        self.merged_adapters.clear()
        if base.out_proj.merged:
            base.out_proj.unmerge()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The attention module as it was, with the adapters merged if ``merge``."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base = self.get_base_layer()
        base.out_proj = base.out_proj.get_base_layer()
        return base  # type: ignore[no-any-return]

    def _adapted(self, weight: Tensor, adapters: list[str]) -> Tensor:
        for adapter in adapters:
            weight = weight + self.get_delta_weight(adapter).to(weight.dtype)
        return weight

    @contextmanager
    def _in_place(self, adapters: list[str]) -> Iterator[None]:
        """Within the block the base reads adapted weights; its instance attributes hide the registered
        ones."""
        base = self.get_base_layer()
        projection = base.out_proj
        layer = projection.get_base_layer()
        weight = layer.weight
        for adapter in adapters:
            if projection.has_adapter(adapter):
                weight = weight + projection.get_delta_weight(adapter).to(weight.dtype)
        attributes = base.__dict__
        attributes["in_proj_weight"] = self._adapted(base.in_proj_weight, adapters)
        attributes["out_proj"] = types.SimpleNamespace(weight=weight, bias=layer.bias)
        try:
            yield
        finally:
            del attributes["in_proj_weight"], attributes["out_proj"]

    def _check_forward_args(self, x: Tensor, *args: Any, **kwargs: Any) -> None:
        if "adapter_names" in kwargs:
            raise TypeError(f"lora.{type(self).__name__} does not support mixed adapter batches.")

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As nn.MultiheadAttention, with the active adapters in both projections."""
        dtype = query.dtype
        self._check_forward_args(query, *args, **kwargs)
        base = self.get_base_layer()
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            out, weights = base(query, *args, **kwargs)
        else:
            if base.out_proj.active_adapters != self.active_adapters or base.out_proj.merged:
                name = type(base).__name__
                raise ValueError(
                    f"The out_proj layer of {name} has merged layers but {name} itself doesn't; please "
                    "ensure that either both or none have merged layers"
                )
            with self._in_place([name for name in self.active_adapters if self.has_adapter(name)]):
                out, weights = base(query, *args, **kwargs)
        return out.to(dtype), None if weights is None else weights.to(dtype)


def _nothing(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook that does nothing."""
