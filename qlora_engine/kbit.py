"""Prepare a quantised model for adapter training: freeze, float32 norms, gradient checkpointing."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from quant.linear import QuantEmbedding, QuantLinear

_HALF = (torch.float16, torch.bfloat16)
# transformers' names of quantisers whose kernels need the dense parameters in the dtype they were loaded in
_KEEPS_DTYPE = {"gptq", "aqlm", "eetq", "torchao", "hqq"}


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
    *,
    upcast: Literal["norms", "all"] = "norms",
) -> Any:
    """Freeze every parameter, cast the norms to float32 and, on a quantised model, checkpoint activations.

    PEFT casts every float16 and bfloat16 parameter, which adds float32 copies of the embeddings and the head
    (2 x 0.26 GB for a 7B Llama with its 32000 tokens) and makes every activation float32. Here norms alone
    are cast. They compute in float32 and hand on the dtype that they had before, so that activations stay
    small and no dense layer meets a dtype that is not its own. A model that is not transformers' says nothing
    of its layers' roles: all its parameters but embeddings are cast, as in PEFT.

    Args:
        model: A transformers model, changed in place.
        use_gradient_checkpointing: Enable it (on quantised models only, as PEFT does).
        gradient_checkpointing_kwargs: For ``torch.utils.checkpoint.checkpoint``, e.g. ``use_reentrant``.
        auto_clear_cache: Empty the accelerator's cache after the casts.
        upcast: ``"norms"``, or ``"all"`` for PEFT's cast of everything that is not quantised.

    Returns:
        The same model.
    """
    if upcast not in ("norms", "all"):
        raise ValueError(f"upcast={upcast!r}; allowed: 'norms', 'all'")
    for parameter in model.parameters():
        parameter.requires_grad = False

    keeps_dtype = _quantization_method(model) in _KEEPS_DTYPE or getattr(model, "hqq_quantized", False)
    if not keeps_dtype:
        if upcast == "norms" and hasattr(model, "get_input_embeddings"):
            for norm in _norms(model):
                _upcast_norm(norm)
        else:
            _upcast_parameters(model, keep_embeddings=upcast == "norms")
        if auto_clear_cache:
            _clear_cache()

    if use_gradient_checkpointing and (keeps_dtype or is_quantized(model)):
        _enable_gradient_checkpointing(model, gradient_checkpointing_kwargs or {})
    return model


def is_quantized(model: nn.Module) -> bool:
    """Whether transformers' flags, our layers or bitsandbytes' parameters say that it is quantised."""
    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        return True
    return any(isinstance(m, (QuantLinear, QuantEmbedding)) for m in model.modules()) or any(
        type(p).__name__ in ("Params4bit", "Int8Params") for p in model.parameters()
    )


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast frozen floating-point parameters to ``dtype`` and trainable ones to float32, in place.

    Integers (packed codes, bytes of scales) and bitsandbytes' packed parameters are left alone.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and type(parameter).__name__ not in ("Params4bit", "Int8Params"):
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def _quantization_method(model: Any) -> str | None:
    method = getattr(model, "quantization_method", None)
    return getattr(method, "value", method)  # an enum of strings in transformers


def _norms(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False)):
            yield module


def _upcast_norm(norm: nn.Module) -> None:
    before = {p.dtype for p in norm.parameters(recurse=False) if p.dtype in _HALF}
    if not before:
        return
    for parameter in norm.parameters(recurse=False):
        parameter.data = parameter.data.to(torch.float32)
    # Without these a float32 norm refuses half inputs (LayerNorm on CUDA) or hands float32 to half layers.
    norm.register_forward_pre_hook(_input_to_float32)
    norm.register_forward_hook(_OutputCast(before.pop()))


def _input_to_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.to(torch.float32) if torch.is_tensor(a) and a.dtype in _HALF else a for a in args)


class _OutputCast:
    """A forward hook that returns the output in ``dtype``; a class, so that models with it pickle."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return output.to(self.dtype) if torch.is_tensor(output) and output.is_floating_point() else output


def _upcast_parameters(model: nn.Module, *, keep_embeddings: bool) -> None:
    kept: set[int] = set()
    if keep_embeddings:
        kept = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parameter in model.parameters():
        if (
            parameter.dtype in _HALF
            and type(parameter).__name__ != "Params4bit"
            and id(parameter) not in kept
        ):
            parameter.data = parameter.data.to(torch.float32)


def _clear_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        torch.xpu.empty_cache()


def _enable_gradient_checkpointing(model: Any, kwargs: dict[str, Any]) -> None:
    # The reentrant kind gives no gradient unless an input asks for one, and every base parameter is frozen.
    if kwargs.get("use_reentrant", True):
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        else:
            model.get_input_embeddings().register_forward_hook(_require_grad)
    accepted = inspect.signature(model.gradient_checkpointing_enable).parameters
    if "gradient_checkpointing_kwargs" in accepted:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        return
    if kwargs:
        warnings.warn(
            "gradient_checkpointing_kwargs is not supported in this version of transformers. The passed "
            "kwargs will be ignored. if you want to use that feature, please upgrade to the latest "
            "version of transformers.",
            FutureWarning,
            stacklevel=3,
        )
    model.gradient_checkpointing_enable()


def _require_grad(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    output.requires_grad_(True)
