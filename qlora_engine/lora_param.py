"""LoRA on bare Parameters, such as the stacked weights of a mixture of experts (``target_parameters``).

A Parameter has no forward to add to, so the sum of weight and delta stands in its place while the module
that owns it runs. Several Parameters of one module are adapted by nested wrappers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from quant.experts import ExpertMatrix, ExpertStack, QuantExperts, map_matrices
from quant.grouped import grouped_mm

from .config import LoraConfig
from .expert_stack import parameter_names
from .lora_layer import LoraLayer
from .tuner_layer import BaseTunerLayer, check_adapters_to_merge

_COMPUTE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ParamWrapper(LoraLayer, nn.Module):
    """Wraps the module that owns one Parameter, (out, in) or a stack of experts.

    A stack is (experts, out, in), or (experts, in, out) where the module says ``is_transposed``. Its
    factors are stacked: A (rank * experts, in), B (out, rank * experts).

    Args:
        base_layer: The owner, or a ParamWrapper around it.
        adapter_name: The first adapter.
        parameter_name: The Parameter's attribute.
        config: The adapter's configuration.
        r: Its rank.
        lora_alpha: Its alpha.
        kwargs: See ``LoraLayer.update_layer``.

    Raises:
        ValueError: an option that has no meaning for a Parameter (dropout, DoRA, lora_bias,
            fan_in_fan_out, an initialisation from the weight), or one of other than two or three dimensions.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        parameter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        self.parameter_name = parameter_name
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        # What was there before merging: a tensor, or quantised experts; not a submodule of this one.
        self._original: Any = None
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[Any, Any]:
        shape = self.get_param().shape
        if len(shape) not in (2, 3):
            raise ValueError(
                f"lora.{type(self).__name__} was initialized with {len(shape)} dimensional Parameter, but "
                "only 2d and 3d are supported."
            )
        self.num_experts = shape[0] if len(shape) == 3 else 1
        # Whether the matrices of a stack are stored (in, out).
        self.stored_in_out = len(shape) == 3 and bool(getattr(self.get_base_layer(), "is_transposed", False))
        out_features, in_features = reversed(shape[-2:]) if self.stored_in_out else shape[-2:]
        return in_features, out_features

    def _check_config(self, r: int, config: LoraConfig) -> None:
        title = f"lora.{type(self).__name__} does not work with"
        if config.lora_dropout:
            raise ValueError(f"{title} lora_dropout != 0.")
        for name in ("fan_in_fan_out", "lora_bias", "use_dora"):
            if getattr(config, name):
                raise ValueError(f"{title} {name}{'' if name == 'fan_in_fan_out' else '=True'}.")
        init = config.init_lora_weights
        if isinstance(init, str) and init.lower() not in ("gaussian", "eva"):
            raise ValueError(f"{title} init_lora_weights={init!r}.")

    def _create_weights(self, adapter_name: str, r: int, config: LoraConfig, tied: Any) -> None:
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r * self.num_experts, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r * self.num_experts, self.out_features, bias=False)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None, *, keep_dtype: bool = False
    ) -> None:
        parameter = self.get_param()
        dtype = parameter.dtype if parameter.is_floating_point() and not keep_dtype else None
        for container in (self.lora_A, self.lora_B):
            if adapter_name in container and not any(p.is_meta for p in container.parameters()):
                container[adapter_name].to(device or parameter.device, dtype=dtype)

    def get_param(self) -> Any:
        """The adapted Parameter, or the quantised experts in its place."""
        return getattr(self.get_base_layer(), self.parameter_name)

    def get_base_weight(self) -> Tensor:
        """The adapted Parameter's data; of quantised experts the dense stack."""
        data: Tensor = self.get_param().data
        return data

    def get_delta_factors(
        self, adapter: str, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, float]:
        """(left, right, scaling) with the delta ``scaling * left @ right``, in the Parameter's layout and,
        where one can compute in it, in ``dtype`` (default: the Parameter's)."""
        A, B = self.get_factors(adapter)
        A = A.reshape(self.num_experts, -1, A.shape[-1])  # (experts, rank, in)
        B = B.reshape(B.shape[0], -1, self.num_experts).permute(2, 0, 1)  # (experts, out, rank)
        left, right = (A.mT, B.mT) if self.stored_in_out else (B, A)
        dtype = self.get_param().dtype if dtype is None else dtype
        dtype = dtype if dtype in _COMPUTE else torch.float32
        return left.to(dtype), right.to(dtype), self.scaling[adapter]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The delta in the Parameter's shape and, where it can be computed in, its dtype."""
        left, right, scaling = self.get_delta_factors(adapter)
        return (left @ right * scaling).reshape(self.get_param().shape)

    def adapted(self, weight: Tensor, adapters: list[str]) -> Tensor:
        """``weight`` plus the adapters' deltas; differentiable, in the weight's dtype.

        The Parameter itself is not asked for anything: where it is parametrised, this is a part of it.
        """
        with torch.autocast(weight.device.type, enabled=False):
            if weight.dtype not in _COMPUTE:  # float8: no addition, and no saturation when it is cast to
                info = torch.finfo(weight.dtype)
                total = weight.float()
                for adapter in adapters:
                    left, right, scaling = self.get_delta_factors(adapter, weight.dtype)
                    total = total + (left @ right * scaling).reshape(weight.shape)
                return total.clamp(info.min, info.max).to(weight.dtype)
            for adapter in adapters:
                left, right, scaling = self.get_delta_factors(adapter, weight.dtype)
                if weight.dim() == 3:  # one kernel, no delta of the whole stack
                    weight = torch.baddbmm(weight, left, right, alpha=scaling)
                else:
                    weight = weight + (left @ right * scaling).reshape(weight.shape)
            return weight

    def _adapted_stack(self, stack: ExpertStack, adapters: list[str]) -> ExpertStack:
        """Quantised experts whose products have the adapters' added; differentiable in the factors."""
        factors, stacked = [], []
        for adapter in adapters:
            left, right, scaling = self.get_delta_factors(adapter, torch.float32)
            stacked.append(((left, right) if stack.in_out else (right.mT, left.mT), scaling))
            # unbound once: each expert's slice would else have a gradient of the whole stack's size
            factors.append((left.unbind(0), right.unbind(0), scaling))

        def make(number: int, matrix: ExpertMatrix) -> ExpertMatrix:
            mine = [(left[number], right[number], scaling) for left, right, scaling in factors]
            return _AdaptedMatrix(matrix, mine)

        def added(x: Tensor, ends: Tensor) -> Tensor:
            total: Tensor | None = None
            for (first, second), scaling in stacked:
                h = grouped_mm(x, first.to(x.dtype), ends)  # (rows, rank)
                delta = grouped_mm(h, second.to(x.dtype), ends) * scaling
                total = delta if total is None else total + delta
            assert total is not None
            return total

        return map_matrices(stack, make, added)

    @contextmanager
    def _in_place(self, adapters: list[str]) -> Iterator[None]:
        """Within the block the owner's attribute is the adapted weight."""
        base, name = self.get_base_layer(), self.parameter_name
        if isinstance(getattr(base, name), ExpertStack):
            base.__dict__[name] = self._adapted_stack(getattr(base, name), adapters)
            try:
                yield
            finally:
                del base.__dict__[name]
            return
        if parametrize.is_parametrized(base, name):
            requires_grad = base.parametrizations[name].original.requires_grad
            parametrize.register_parametrization(base, name, _Adapted(self, adapters))
            base.parametrizations[name].original.requires_grad_(requires_grad)
            try:
                yield
            finally:
                steps = base.parametrizations[name]
                del steps[next(i for i in reversed(range(len(steps))) if isinstance(steps[i], _Adapted))]
            return
        # The instance's attribute hides the registered Parameter, which stays where it is.
        base.__dict__[name] = self.adapted(getattr(base, name), adapters)
        try:
            yield
        finally:
            del base.__dict__[name]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters (default: the active ones) to the Parameter; the original is kept beside.

        Raises:
            ValueError: ``safe_merge`` and the result is not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if self.has_adapter(n)]
        if not names:
            return
        parameter = self.get_param()
        merged = self.adapted(self.get_base_weight(), names)
        if safe_merge and not torch.isfinite(merged.float()).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken"
            )
        if isinstance(parameter, QuantExperts):
            base = self.get_base_layer()
            self.__dict__["_original"] = (
                parameter  # not a submodule: it is out of the model while it is merged
            )
            del base._modules[self.parameter_name]
            base.register_parameter(self.parameter_name, nn.Parameter(merged, requires_grad=False))
        else:
            if self._original is None:
                self._original = parameter.data
            parameter.data = merged
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the Parameter back as it was, bit for bit."""
        if not self.merged or self._original is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        parameter = self.get_param()
        if isinstance(self._original, QuantExperts):
            base = self.get_base_layer()
            del base._parameters[self.parameter_name]
            base.register_module(self.parameter_name, self._original.to(parameter.device))
        else:
            parameter.data = self._original.to(parameter.data)
        self._original = None
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The owner, with the adapters of this wrapper and of those inside it merged if ``merge``."""
        layer: Any = self
        while isinstance(layer, ParamWrapper):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
                layer._original = None
            layer = layer.base_layer
        return layer  # type: ignore[no-any-return]

    def _check_forward_args(self, x: Tensor, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(f"lora.{type(self).__name__} does not support mixed adapter batches yet.")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The owner's forward with the adapted Parameter."""
        self._check_forward_args(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if self.has_adapter(name)]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        with self._in_place(active):
            return self.base_layer(x, *args, **kwargs)

    def extra_repr(self) -> str:
        """Which Parameter."""
        return f"parameter_name='{self.parameter_name}'"


class _AdaptedMatrix(ExpertMatrix):
    """A quantised expert's matrix with low-rank matrices added: (left, right, scaling) as the Parameter has
    its matrices."""

    def __init__(self, matrix: ExpertMatrix, added: list[tuple[Tensor, Tensor, float]]) -> None:
        super().__init__(matrix.layer, matrix.in_out)
        self._inner, self._added = matrix, added

    @property
    def T(self) -> ExpertMatrix:
        """Transposed."""
        turned = [(right.mT, left.mT, scaling) for left, right, scaling in self._added]
        return _AdaptedMatrix(self._inner.T, turned)

    def product(self, x: Tensor) -> Tensor:
        y = self._inner.product(x)
        for left, right, scaling in self._added:
            first, second = (left, right) if self.in_out else (right.mT, left.mT)
            y = y + (x @ first.to(x.dtype) @ second.to(x.dtype) * scaling).to(y.dtype)
        return y

    def weight(self) -> Tensor:
        dense = self._inner.weight()
        for left, right, scaling in self._added:
            delta = left @ right * scaling
            dense = dense + (delta.mT if self.in_out else delta).to(dense.dtype)
        return dense


class _Adapted(nn.Module):
    """A parametrisation that adds adapters after those that are there already."""

    def __init__(self, wrapper: ParamWrapper, adapters: list[str]) -> None:
        super().__init__()
        self._wrapper = [wrapper]  # in a list, so that the wrapper is not a submodule of what it wraps
        self._adapters = adapters

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight."""
        return self._wrapper[0].adapted(weight, self._adapters)


def _plain(name: str) -> str:
    """The path without the ``base_layer`` that adapted layers put into it."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def inject_parameters(
    tuner: Any,
    config: LoraConfig,
    adapter_name: str,
    model: nn.Module,
    make: Callable[[], AbstractContextManager[Any]],
) -> list[str]:
    """Adapt the Parameters that ``config.target_parameters`` names (exact, or ``.suffix``); their paths.

    Raises:
        ValueError: a Parameter of the top-level module, or of a layer that is adapted as a module.
    """
    wanted = set(config.target_parameters or ())
    endings = tuple(f".{name}" for name in wanted)
    found: list[str] = []
    for owner_name, owner in list(model.named_modules()):
        path = _plain(owner_name)
        # In the order of registration, which decides how wrappers nest and so what their keys on disk are.
        names = parameter_names(owner)
        if hasattr(owner, "parametrizations"):
            names += sorted(owner.parametrizations)  # type: ignore[call-overload]
        for name in names:
            key = f"{path}.{name}"
            if key not in wanted and not key.endswith(endings):
                continue
            if not path:
                raise ValueError(
                    "Targeting an nn.Parameter on the top-level module is not supported "
                    f"(parameter '{name}'). "
                )
            target = model.get_submodule(path)
            if isinstance(target, BaseTunerLayer) and not isinstance(target, ParamWrapper):
                raise ValueError(
                    f"Trying to wrap an `nn.Parameter` of layer '{path}' of type {type(target).__name__}, "
                    "which is not a valid target. Make sure that this layer is not also targeted with "
                    "`target_modules`. For some models, PEFT will do this automatically, try setting "
                    "`target_modules=[]` to prevent it."
                )
            existing: Any = target
            while isinstance(existing, ParamWrapper) and existing.parameter_name != name:
                existing = existing.base_layer
            if isinstance(existing, ParamWrapper):
                target = existing
            parent, _, child = path.rpartition(".")
            with make():
                tuner._create_and_replace(
                    config, adapter_name, target, child, model.get_submodule(parent), key, parameter_name=name
                )
            found.append(key)
    return found
