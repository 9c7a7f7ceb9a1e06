"""Train some rows of an embedding, and the same rows of a head that is tied to it.

What is stored for a token is its new row, not a difference, so that it means the same on any base.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from quant.linear import QuantEmbedding, QuantLinear

from .auxiliary import AuxiliaryTrainingWrapper
from .base_weight import in_out_features, is_quantized
from .tuner_layer import BaseTunerLayer, as_names, check_adapters_to_merge


class TrainableTokensLayer(BaseTunerLayer, nn.Module):
    """An embedding (or a tied Linear head) of which some rows are replaced by trained ones.

    Args:
        base_layer: nn.Embedding, nn.Linear, or a quantised one.
        adapter_name: The first adapter; the caller adds it with ``update_layer``.
        tied_adapter: The layer whose rows this one uses.

    Attributes:
        trainable_tokens_delta: ParameterDict, the rows (n, dim) by adapter.
        token_indices: Their token ids by adapter.
        trainable_tokens_original: The base's rows by adapter, as they were when it was added.
    """

    adapter_layer_names = ("trainable_tokens_delta",)
    other_param_names = ("token_indices", "trainable_tokens_original")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, tied_adapter: TrainableTokensLayer | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self._active_adapter = adapter_name
        # In a list, so that the tied layer is not a submodule and is not saved twice.
        self._tied_adapter = [tied_adapter] if tied_adapter is not None else []
        if tied_adapter is None:
            self.trainable_tokens_delta: Any = nn.ParameterDict()
            self.token_indices: dict[str, list[int]] = {}
            self.trainable_tokens_original: dict[str, Tensor] = {}
        else:
            self.trainable_tokens_delta = tied_adapter.trainable_tokens_delta
            self.token_indices = tied_adapter.token_indices
            self.trainable_tokens_original = tied_adapter.trainable_tokens_original
        self.merged_adapters: list[str] = []
        # Rows of the base that merging replaced, by adapter.
        self._replaced: dict[str, Tensor] = {}
        self.in_features, self.out_features = in_out_features(base_layer)

    @property
    def tied_adapter(self) -> TrainableTokensLayer | None:
        """The layer whose rows this one uses, if any."""
        return self._tied_adapter[0] if self._tied_adapter else None

    def _shares_weight(self) -> bool:
        """Whether the tied layer's weight is the very one of this layer, so that it is written there
        alone."""
        tied = self.tied_adapter
        return tied is not None and tied.base_layer.weight is self.base_layer.weight

    def _base_rows(self, indices: list[int]) -> Tensor:
        index = torch.tensor(indices)
        if isinstance(self.base_layer, QuantEmbedding):
            return self.base_layer.rows(index.to(self.base_layer.codes.device))
        weight: Any = self.base_layer.weight
        return weight.detach()[index.to(weight.device)].clone()

    def update_layer(
        self,
        adapter_name: str,
        token_indices: list[int] | None = None,
        tied_adapter: Any = None,
        **kwargs: Any,
    ) -> None:
        """Let ``adapter_name`` train rows ``token_indices``, starting from the base's; a tied layer
        follows."""
        if tied_adapter is not None or self.tied_adapter is not None:
            return
        assert token_indices is not None
        self.token_indices[adapter_name] = token_indices
        rows = self._base_rows(token_indices)
        self.trainable_tokens_original[adapter_name] = rows
        self.trainable_tokens_delta[adapter_name] = nn.Parameter(rows.clone())

    def _check_overlapping_tokens(self, adapter_names: list[str]) -> None:
        seen: set[int] = set()
        for name in dict.fromkeys(self.merged_adapters + adapter_names):
            indices = set(self.token_indices[name])
            if seen & indices:
                raise ValueError(
                    f"Token indices of adapter {name} are already defined and would result in "
                    "undefined merging behavior. Only disjunct token indices are currently supported."
                )
            seen |= indices

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the trained rows into the base weight.

        Raises:
            ValueError: rows of two adapters overlap; ``safe_merge`` and a row is not finite; a quantised
                base.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.trainable_tokens_delta]
        if not names:
            return
        if is_quantized(self.base_layer):
            raise ValueError("trained rows cannot be merged into a quantised embedding; keep it dense")
        self._check_overlapping_tokens(names)
        if self._shares_weight():
            missing = [name for name in names if name not in self._tied_adapter[0].merged_adapters]
            if missing:
                self._tied_adapter[0].merge(safe_merge, missing)
            self.merged_adapters += names
            return
        for name in names:
            if safe_merge and not torch.isfinite(self.trainable_tokens_delta[name]).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )
        weight: Any = self.base_layer.weight
        merged = weight.data
        for name in names:
            index = torch.tensor(self.token_indices[name], device=merged.device)
            self._replaced[name] = merged[index].clone()
            merged = merged.index_copy(0, index, self.trainable_tokens_delta[name].to(merged))
            self.merged_adapters.append(name)
        weight.data = merged

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the replaced rows back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._shares_weight():
            self.merged_adapters.clear()
            if self._tied_adapter[0].merged:
                self._tied_adapter[0].unmerge()
            return
        weight: Any = self.base_layer.weight
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            index = torch.tensor(self.token_indices[name], device=weight.device)
            weight.data.index_copy_(0, index, self._replaced.pop(name).to(weight.data))

    def get_merged_weights(self, active_adapters: list[str]) -> Tensor:
        """The weight with the trained rows in it, differentiable in them; not a Parameter."""
        weight = self.weight
        for name in active_adapters:
            index = torch.tensor(self.token_indices[name], device=weight.device)
            weight = weight.index_copy(0, index, self.trainable_tokens_delta[name].to(weight))
        return weight

    def forward_adapters(self, x: Tensor, active_adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with the rows (or logits) of these adapters' tokens replaced."""
        names = [name for name in active_adapters if name in self.trainable_tokens_delta]
        if self.disable_adapters or not names:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        self._check_overlapping_tokens(names)
        for name in names:
            index = torch.tensor(self.token_indices[name], device=x.device)
            rows = self.trainable_tokens_delta[name]
            if isinstance(self.base_layer, (nn.Embedding, QuantEmbedding)):
                scale = self._get_embed_scale()
                if scale is not None:
                    rows = rows * scale.to(rows.dtype)
                # Position of each token in the list of trained ones, where it is in it.
                hit = x.unsqueeze(-1) == index  # (..., n)
                picked = rows.to(result.dtype)[hit.int().argmax(-1)]
                result = torch.where(hit.any(-1, keepdim=True), picked, result)
            elif isinstance(self.base_layer, (nn.Linear, QuantLinear)):
                logits = nn.functional.linear(x, rows.to(x.dtype))
                if self.base_layer.bias is not None:
                    logits = logits + self.base_layer.bias[index]
                result = result.index_copy(-1, index, logits.to(result.dtype))
            else:
                raise ValueError(
                    "TrainableTokensLayer wraps an unknown layer type, maybe you are targeting the wrong "
                    "layer?"
                )
        return result

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As ``forward_adapters`` with the active ones."""
        return self.forward_adapters(x, self.active_adapters, *args, **kwargs)


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """Puts a TrainableTokensLayer in the place of an embedding.

    Args:
        module_to_save: The embedding, or a head tied to one.
        adapter_name: The first adapter.
        token_indices: The rows it trains.
        tied_adapter: The embedding's layer, for a head.
    """

    adapter_layer_names: tuple[str, ...] = ("token_adapter.trainable_tokens_delta",)
    other_param_names: tuple[str, ...] = (
        "token_adapter.token_indices",
        "token_adapter.trainable_tokens_original",
    )
    _title = "trainable_token_indices"

    def __init__(
        self,
        module_to_save: nn.Module,
        adapter_name: str,
        token_indices: list[int],
        tied_adapter: TrainableTokensLayer | None = None,
    ) -> None:
        super().__init__(module_to_save, adapter_name, token_indices=token_indices, tied_adapter=tied_adapter)

    def _wrap(self, module: nn.Module, adapter_name: str, tied_adapter: Any = None, **kwargs: Any) -> None:
        self.token_adapter = TrainableTokensLayer(module, adapter_name, tied_adapter)

    @property
    def original_module(self) -> nn.Module:
        """The wrapped module; not a submodule here, so that it is saved once."""
        return self.token_adapter.base_layer

    def _versions(self) -> Any:
        return self.token_adapter.trainable_tokens_delta

    def _attribute_in_use(self, name: str) -> Any:
        if name == "weight":
            active = [a for a in self.token_adapter.active_adapters if a in self._versions()]
            return self.token_adapter.get_merged_weights(active)
        return getattr(self.original_module, name)

    def _forward_original(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.token_adapter(x, *args, **kwargs)  # knows what to do when nothing is active

    def _forward_version(self, adapter: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.token_adapter.forward_adapters(x, [adapter])

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        """Add an adapter's rows."""
        if adapter_name not in self._adapters:
            self.token_adapter.update_layer(adapter_name, **kwargs)
        self._adapters.add(adapter_name)

    def enable_adapters(self, enabled: bool) -> None:
        """Use the trained rows, or the base's."""
        super().enable_adapters(enabled)
        self.token_adapter.enable_adapters(enabled)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter's rows, trainable unless ``inference_mode``; none with an empty list.

        Raises:
            ValueError: an unknown name.
        """
        for name in [] if isinstance(adapter_names, str) else adapter_names:
            if name not in self._adapters:
                raise ValueError(f"Adapter {name} not found in {self._adapters}")
        self._active_adapter = adapter_names if isinstance(adapter_names, str) else as_names(adapter_names)
        self.token_adapter.set_adapter(adapter_names, inference_mode=inference_mode)

    def _forget(self, adapter_name: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # the new active adapter is the caller's choice and is set already
            self.token_adapter.delete_adapter(adapter_name)
        if not self.active_adapters:
            self.token_adapter.set_adapter([])

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Key in a file -> key in this module's state dict; a tied head saves nothing."""
        if self.token_adapter.tied_adapter is not None or adapter_name not in self._adapters:
            return {}
        key = "token_adapter.trainable_tokens_delta"
        return {key: f"{key}.{adapter_name}"}

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a file holds of this module, picked from its state dict."""
        return {key: state_dict[own] for key, own in self.adapter_state_dict_load_map(adapter_name).items()}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The wrapped module, with the trained rows written into it if ``merge``."""
        if merge:
            self.token_adapter.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.token_adapter.get_base_layer()  # type: ignore[no-any-return]
