"""Small helpers on adapted models; names and arguments are PEFT's."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .adapters import lora_layers, tuner_layers
from .base_weight import dense_weight, is_quantized
from .config import PeftConfig
from .dora import DoraCaching

__all__ = [
    "DoraCaching",
    "KappaTuneSelector",
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "find_kappa_target_modules",
    "rescale_adapter_scale",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]

# Stacks of experts' weights in the models of transformers.
MOE_PARAMETER_SUFFIXES = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a folder or hub repository holds an adapter (with a config that this engine reads)."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:  # whatever the hub, the file or its contents say against it, the answer is no
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within the block every adapter's scaling is multiplied; afterwards it is what it was, bit for bit.

    With a multiplier in [0, 1] this is WiSE-FT (Wortsman et al. 2021, arXiv:2109.01903) for LoRA.

    Args:
        model: With LoRA layers.
        multiplier: Any number.

    Raises:
        TypeError: ``multiplier`` is not a number.
        ValueError: the model has no LoRA layer.
    """
    if not isinstance(multiplier, (float, int)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    before = [(layer, layer.scaling) for layer in lora_layers(model)]
    if not before:
        raise ValueError("scaling is only supported for models with `LoraLayer`s")
    try:
        for layer, scaling in before:
            layer.scaling = {name: value * multiplier for name, value in scaling.items()}
        yield
    finally:
        for layer, scaling in before:
            layer.scaling = scaling


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Within the block no layer casts its input to its adapter's dtype; hooks do that in layerwise casting.

    Args:
        model: With adapted layers.
        active: False: do nothing.
    """
    before = [(layer, layer.cast_input_dtype_enabled) for layer in tuner_layers(model)] if active else []
    try:
        for layer, _ in before:
            layer.cast_input_dtype_enabled = False
        yield
    finally:
        for layer, enabled in before:
            layer.cast_input_dtype_enabled = enabled


def update_forward_signature(model: Any) -> None:
    """Give ``model.forward``, if it is ``(*args, **kwargs)``, the signature and docstring of the base's."""
    if _is_opaque(model.forward):
        _take_signature(model, "forward")


def update_generate_signature(model: Any) -> None:
    """As ``update_forward_signature``, for ``generate``, if there is one."""
    if hasattr(model, "generate") and _is_opaque(model.generate):
        _take_signature(model, "generate")


def update_signature(model: Any, method: str = "all") -> None:
    """Both, or one of them.

    Args:
        model: A PeftModel.
        method: "forward", "generate" or "all".

    Raises:
        ValueError: another ``method``.
    """
    if method not in ("forward", "generate", "all"):
        raise ValueError(
            f"method {method} is not supported please choose one of ['forward', 'generate', 'all']"
        )
    if method in ("forward", "all"):
        update_forward_signature(model)
    if method in ("generate", "all"):
        update_generate_signature(model)


def _is_opaque(function: Any) -> bool:
    return set(inspect.signature(function).parameters) in ({"args", "kwargs"}, {"kwargs"})


def _take_signature(model: Any, name: str) -> None:
    own = getattr(type(model), name)
    source = getattr(type(model.get_base_model()), name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    functools.update_wrapper(method, source, assigned=("__doc__", "__name__", "__annotations__"))
    setattr(model, name, MethodType(method, model))


class KappaTuneSelector:
    """Ranks linear layers and stacked experts by condition number: well-conditioned ones are the targets.

    Args:
        model: Dense, or quantised (layers are dequantised one at a time).
        max_dim_size_to_analyze: Larger matrices are left out.
        moe_param_suffixes: Endings of names of three-dimensional parameters; default: those of transformers.
        show_progress: Show progress.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.moe_param_suffixes = moe_param_suffixes or MOE_PARAMETER_SUFFIXES
        self.show_progress = show_progress

    @functools.cached_property
    def _modules(self) -> list[tuple[str, float]]:
        found = [(n, m) for n, m in self.model.named_modules() if isinstance(m, nn.Linear) or is_quantized(m)]
        found = [(n, m) for n, m in found if not hasattr(m, "num_embeddings")]
        return self._ranked(found, dense_weight, "Computing SVD (linear layers)")

    @functools.cached_property
    def _parameters(self) -> list[tuple[str, float]]:
        found = [
            (name, parameter)
            for name, parameter in self.model.named_parameters()
            if parameter.dim() == 3 and name.endswith(self.moe_param_suffixes)
        ]
        return self._ranked(found, lambda parameter: parameter.detach(), "Computing SVD (MoE parameters)")

    @torch.no_grad()
    def _ranked(self, found: list[Any], weight_of: Any, title: str) -> list[tuple[str, float]]:
        kappas = []
        for name, item in tqdm(found, disable=not self.show_progress, desc=title):
            weight: Tensor = weight_of(item).float()
            if max(weight.shape[-2:]) <= self.max_dim_size_to_analyze:
                S = torch.linalg.svdvals(weight)  # (..., min(out, in))
                kappas.append((name, (S[..., 0] / (S[..., -1] + 1e-8)).mean().item()))
        return sorted(kappas, key=lambda pair: pair[1])

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names of the linear layers with the lowest condition numbers, best first.

        Args:
            top_p: Share of them (at least one).
            num_modules: How many; wins over ``top_p``.
            threshold: Only those up to this condition number; used if neither of the others is given.
        """
        return _best(self._modules, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """As ``get_best_targets``, names of stacked experts (the mean over the experts counts)."""
        return _best(self._parameters, top_p, num_modules, threshold)


def _best(
    ranked: list[tuple[str, float]], top_p: float | None, count: int | None, threshold: float | None
) -> list[str]:
    names = [name for name, _ in ranked]
    if count is not None:
        return names[:count]
    if top_p is not None:
        return names[: max(1, int(len(names) * top_p))]
    return names if threshold is None else [name for name, kappa in ranked if kappa <= threshold]


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """``target_modules`` and ``target_parameters`` (None without experts) for a LoraConfig, by KappaTune."""
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p=top_p),
        "target_parameters": selector.get_best_target_parameters(top_p=top_p) or None,
    }
