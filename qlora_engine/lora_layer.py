"""LoraLayer: what LoRA layers of every kind share: adapters, scaling, mixed batches, the forward's
skeleton."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .base_weight import in_out_features, is_known
from .config import LoraConfig, PeftWarning
from .dora import DoraLinearLayer, adapted_norm, caching
from .lora_init import InitRecord, initialise_adapter
from .tuner_layer import BaseTunerLayer, check_adapters_to_merge

BASE_ONLY = "__base__"


class LoraLayer(BaseTunerLayer):
    """Mixin with the adapters of one layer, by name; the attribute names are PEFT's.

    Attributes:
        r, lora_alpha, scaling, use_rslora, use_dora, lora_bias: Plain dicts by adapter name.
        lora_A, lora_B: ModuleDicts; an embedding has the ParameterDicts lora_embedding_A and
            lora_embedding_B.
        lora_dropout: ModuleDict, nn.Identity where the rate is 0.
        lora_magnitude_vector: ModuleDict with the DoRA adapters.
        fan_in_fan_out: The base weight is stored (in, out).
    """

    adapter_layer_names: tuple[str, ...] = (
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
    )
    other_param_names: tuple[str, ...] = (
        "r",
        "lora_alpha",
        "scaling",
        "lora_dropout",
        "use_dora",
        "use_rslora",
        "lora_bias",
        "init_records",
    )
    fan_in_fan_out: bool = False
    training: bool

    def __init__(self, base_layer: nn.Module, ephemeral_gpu_offload: bool = False, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout: Any = nn.ModuleDict()
        self.lora_A: Any = nn.ModuleDict()
        self.lora_B: Any = nn.ModuleDict()
        self.lora_embedding_A: Any = nn.ParameterDict()
        self.lora_embedding_B: Any = nn.ParameterDict()
        self.lora_magnitude_vector: Any = nn.ModuleDict()
        self.use_dora: dict[str, bool] = {}
        self.use_rslora: dict[str, bool] = {}
        self.lora_bias: dict[str, bool] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.ephemeral_gpu_offload = ephemeral_gpu_offload
        # The tensors of a tied adapter are views, which deepcopy refuses, and are only needed once.
        self.kwargs = {name: value for name, value in kwargs.items() if name != "tied_adapter"}
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self.init_records: dict[str, InitRecord] = {}
        # What merging keeps to restore the base exactly; never part of a state dict.
        self._caches: dict[str, Any] = {}
        self.in_features, self.out_features = self._get_in_out_features(self.get_base_layer())

    def _get_in_out_features(self, module: nn.Module) -> tuple[Any, Any]:
        sizes = in_out_features(module)
        if not is_known(module):
            warnings.warn(
                f"Unsupported layer type '{type(module)}' encountered, proceed at your own risk.",
                stacklevel=2,
            )
        return sizes

    # ---- adding an adapter

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Add (or overwrite) an adapter and initialise it as ``config`` says.

        Args:
            adapter_name: Its name.
            r: Rank.
            lora_alpha: With ``r`` gives the scaling.
            config: Everything else.
            kwargs: ``target_name``, the module's path; ``tied_adapter``, factors to share.

        Raises:
            ValueError: ``r`` not positive, or an option that this kind of layer does not have.
        """
        if r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {r}")
        self._check_config(r, config)
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = config.use_dora
        self.lora_bias[adapter_name] = config.lora_bias
        dropout: nn.Module = nn.Dropout(p=config.lora_dropout) if config.lora_dropout > 0.0 else nn.Identity()
        self.lora_dropout[adapter_name] = dropout
        self._create_weights(adapter_name, r, config, kwargs.get("tied_adapter"))
        initialise_adapter(self, adapter_name, config, kwargs.get("target_name", ""))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if config.use_dora:
            self._create_magnitude(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _check_config(self, r: int, config: LoraConfig) -> None:
        """Refuse what this kind of layer cannot do, warn about what will not merge."""
        if config.lora_bias and getattr(self.get_base_layer(), "bias", None) is None:
            warnings.warn(
                f"`lora_bias=True` was passed but the targeted layer of type "
                f"{type(self.get_base_layer()).__name__} has no bias. This means that merging LoRA weights "
                "won't be possible.",
                PeftWarning,
                stacklevel=4,
            )

    def _create_weights(
        self, adapter_name: str, r: int, config: LoraConfig, tied: dict[str, Tensor] | None
    ) -> None:
        raise NotImplementedError

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Draw the factors anew: True (Kaiming A, zero B), "gaussian", or False (left as constructed).

        Raises:
            ValueError: another value.
        """
        if init_lora_weights is False:
            return
        if adapter_name in self.lora_A:
            A, B = self.lora_A[adapter_name], self.lora_B[adapter_name]
            if init_lora_weights is True:
                nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))
            elif isinstance(init_lora_weights, str) and init_lora_weights.lower() == "gaussian":
                nn.init.normal_(A.weight, std=1 / self.r[adapter_name])
            else:
                raise ValueError(f"Unknown initialization {init_lora_weights=}")
            nn.init.zeros_(B.weight)
            if self.lora_bias[adapter_name]:
                nn.init.zeros_(B.bias)
        if adapter_name in self.lora_embedding_A:
            nn.init.zeros_(self.lora_embedding_A[adapter_name])
            nn.init.normal_(self.lora_embedding_B[adapter_name])

    # ---- the factors as matrices

    def get_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of an adapter, kernels flattened; not scaled."""
        if adapter in self.lora_embedding_A:
            return self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return A.flatten(1), B.flatten(1)

    def has_adapter(self, adapter: str) -> bool:
        """Whether this layer has factors of that name."""
        return adapter in self.lora_A or adapter in self.lora_embedding_A

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``scaling * B @ A`` in the base weight's own orientation and the factors' dtype.

        Half-precision factors on a CPU are multiplied in float32.
        """
        A, B = self.get_factors(adapter)
        dtype = B.dtype
        if B.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            A, B = A.float(), B.float()
        return (self._delta(A, B) * self.scaling[adapter]).to(dtype)

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        return B @ A

    # ---- DoRA

    def weight_norm(self, adapter: str) -> Tensor:
        """Norms of the adapted weight by output row, float32 (out,), with no gradient; see ``dora``."""
        A, B = self.get_factors(adapter)
        known = adapter in self.lora_magnitude_vector
        holder = self.lora_magnitude_vector[adapter] if known else None
        scaling = self.scaling[adapter]
        transposed = self.fan_in_fan_out or adapter in self.lora_embedding_A
        if holder is None or self.training or not caching():
            return self._compute_norm(A.detach(), B.detach(), scaling, transposed)
        base = next(self.get_base_layer().parameters())
        key = (*((t.data_ptr(), t._version) for t in (A, B, base)), scaling)
        norm: Tensor | None = holder.cached_norm(key)
        if norm is None:
            norm = self._compute_norm(A.detach(), B.detach(), scaling, transposed)
            holder.keep_norm(key, norm)
        return norm

    def _compute_norm(self, A: Tensor, B: Tensor, scaling: float, transposed: bool) -> Tensor:
        return adapted_norm(self.get_base_layer(), A, B, scaling, transposed=transposed)

    _magnitude_class: type[DoraLinearLayer] = DoraLinearLayer

    def _create_magnitude(self, adapter_name: str) -> None:
        A, _ = self.get_factors(adapter_name)
        if A.is_meta:
            norm = torch.empty(int(self.out_features), device="meta")
        else:
            norm = self.weight_norm(adapter_name)
        self.lora_magnitude_vector[adapter_name] = self._magnitude_class(self._shape_norm(norm).to(A.dtype))

    def refresh_magnitude(self, adapter_name: str) -> None:
        """Set the magnitude to the norm of the adapted weight, in the magnitude's dtype: DoRA then changes
        nothing."""
        if adapter_name in self.lora_magnitude_vector and not self.get_factors(adapter_name)[0].is_meta:
            weight = self.lora_magnitude_vector[adapter_name].weight
            weight.data = self._shape_norm(self.weight_norm(adapter_name)).to(weight.dtype)

    def _shape_norm(self, norm: Tensor) -> Tensor:
        return norm

    # ---- scaling

    def set_scale(self, adapter: str, scale: float) -> None:
        """``scale`` times the scaling that rank and alpha give."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._configured_scaling(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        if scale != 1:
            for adapter in self.active_adapters:
                if adapter in self.lora_A:
                    self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters; None restores what rank and alpha give."""
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                self.scaling[adapter] = (
                    self._configured_scaling(adapter) if scale is None else self.scaling[adapter] / scale
                )

    def _configured_scaling(self, adapter: str) -> float:
        r = self.r[adapter]
        return self.lora_alpha[adapter] / (math.sqrt(r) if self.use_rslora.get(adapter, False) else r)

    # ---- merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters (default: the active ones) to the base weight; see ``merging.merge_layer``.

        Raises:
            ValueError: ``safe_merge`` and the result is not finite.
            TypeError: ``adapter_names`` is a string.
        """
        from .merging import merge_layer

        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if self.has_adapter(name)]
        if names:
            merge_layer(self, names, safe_merge=safe_merge)

    def unmerge(self) -> None:
        """Put the base weight back as it was before merging, bit for bit."""
        from .merging import unmerge_layer

        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        unmerge_layer(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: LoRA and DoRA are deltas of the weight."""
        return True

    # ---- forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus that of the active adapters.

        Args:
            x: The layer's input.
            args: Passed to the base layer.
            kwargs: Passed to the base layer, except ``adapter_names``: one name an input row,
                ``"__base__"`` for none.
        """
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        if not (args or kwargs or self.merged) and (fused := self._fused_forward(x)) is not None:
            return fused
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        dtype = result.dtype
        for adapter in self.active_adapters:
            if self.has_adapter(adapter):
                result = self._add_adapter_output(result, x, adapter)
        return result.to(dtype)

    def _fused_forward(self, x: Tensor) -> Tensor | None:
        """The whole forward in one function, or None where there is none that fits."""
        return None

    def _add_adapter_output(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        if self.use_dora.get(adapter, False):
            return self._dora_forward(result, x, adapter)
        return result + self._adapter_output(x, adapter)

    def _adapter_output(self, x: Tensor, adapter: str) -> Tensor:
        raise NotImplementedError

    def _dora_forward(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        raise NotImplementedError

    def _check_forward_args(self, x: Tensor, *args: Any, **kwargs: Any) -> None:
        names = kwargs.get("adapter_names")
        if names is None:
            return
        if len(x) != len(names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )
        if any(self.use_dora.get(name, False) for name in set(names)):
            raise ValueError("Cannot pass `adapter_names` when DoRA is enabled.")

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        for adapter in dict.fromkeys(adapter_names):
            if adapter == BASE_ONLY or not self.has_adapter(adapter):
                continue
            rows = torch.tensor(
                [i for i, name in enumerate(adapter_names) if name == adapter], device=x.device
            )
            part = self._adapter_output(x[rows], adapter)
            result = result.index_add(0, rows.to(result.device), part.to(result.dtype))
        return result

    def _get_name(self) -> str:
        return "lora." + type(self).__name__

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Within the block forward() is the base layer's; trainability is left alone."""
        before, self._disable_adapters = self._disable_adapters, True
        try:
            yield
        finally:
            self._disable_adapters = before
