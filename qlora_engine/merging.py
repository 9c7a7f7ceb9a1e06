"""Merge adapters into a whole model: in place and back, or for good into a dense or a newly quantised model.

Merging for good gives dense layers, because a small delta does not survive a coarse grid: the weights of a
quantised base sit on grid points, and a delta of less than half a step rounds back to them. Where a
quantised result is wanted, ``requantize`` makes one from the exact sum, measures what survived, and can
keep the rest in a small adapter.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from quant.spec import QuantSpec

from .auxiliary import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from .base_weight import is_quantized
from .densify import cast_floats, dequantize, replace_module, weights_dtype
from .layer_merge import (
    MergeOverflow,
    forget_original,
    merge_layer,
    merged_bias,
    merged_weight,
    unmerge_layer,
)
from .lora_layer import LoraLayer
from .requantize import MergeRecord, can_requantize, requantize_layer, resolve_spec
from .targets import EMBEDDING_LAYER_NAMES
from .tuner_layer import BaseTunerLayer, check_adapters_to_merge

__all__ = [
    "MergeOverflow",
    "MergeRecord",
    "check_merge_allowed",
    "merge_adapter",
    "merge_and_unload",
    "merge_layer",
    "unload",
    "unmerge_layer",
]

_UNTIE_HINT = """
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(NAME, tie_word_embeddings=False)
model.lm_head.weight.data = model.get_input_embeddings().weight.data.clone()
untied_model_dir = FOLDER
model.save_pretrained(untied_model_dir)
# Now use the original model but in untied format
model = AutoModelForCausalLM.from_pretrained(untied_model_dir)
```
"""


def check_merge_allowed(tuner: Any, adapter_names: list[str] | None = None) -> None:
    """Warn where tied layers are adapted.

    Raises:
        TypeError: ``adapter_names`` is a string.
        ValueError: an unknown name, which would merge nothing; a GPTQ base; or a base whose layers are
            replicated (they share weights, so that one merge would change all copies).
    """
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
    unknown = sorted(set(adapter_names or ()) - set(tuner.peft_config))
    if unknown:
        raise ValueError(f"Adapter(s) {unknown} not found; there are {sorted(tuner.peft_config)}.")
    if tuner.get_model_config(tuner.model).get("tie_word_embeddings"):
        names = getattr(tuner, "targeted_module_names", [])
        tied_target_modules = [name for name in names if name.split(".")[-1] in EMBEDDING_LAYER_NAMES]
        if tied_target_modules:
            warnings.warn(
                f"Model with `tie_word_embeddings=True` and the {tied_target_modules=} are part of the "
                "adapter. Merged, they have a weight each, unless the adapter was made with "
                "`ensure_weight_tying`. To have that before training, untie the embeddings by loading the "
                f"model with `tie_word_embeddings=False`. For example:{_UNTIE_HINT}",
                stacklevel=3,
            )
    if getattr(tuner.model, "quantization_method", None) == "gptq":
        raise ValueError("Cannot merge LORA layers when the model is gptq quantized")
    if any(getattr(config, "layer_replication", None) for config in tuner.peft_config.values()):
        raise ValueError("Cannot merge LORA layers when base model layers are replicated")


@torch.no_grad()
def merge_adapter(tuner: Any, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
    """Merge adapters (default: the active ones) into the base weights in place.

    The original weights (of a quantised layer: its codes) are kept, and ``unmerge_adapter`` restores their
    very bits. A quantised layer is dense while it is merged, in the dtype of the model's other weights. If
    a layer fails, those merged before it are unmerged again.

    Raises:
        ValueError: not allowed (see ``check_merge_allowed``), or ``safe_merge`` and a result is not finite.
    """
    check_merge_allowed(tuner, adapter_names)
    dtype = weights_dtype(tuner.model)
    done: list[tuple[BaseTunerLayer, list[str]]] = []
    for name, layer in list(tuner.model.named_modules()):
        if not isinstance(layer, BaseTunerLayer):
            continue
        before = list(layer.merged_adapters)
        try:
            if isinstance(layer, LoraLayer) and is_quantized(layer.get_base_layer()):
                _merge(layer, adapter_names, safe_merge, dtype)
            else:
                layer.merge(adapter_names=adapter_names, safe_merge=safe_merge)
        except Exception as error:
            _undo(done)
            raise _named(error, name) from error
        done.append((layer, before))


def _merge(
    layer: LoraLayer, adapter_names: list[str] | None, safe_merge: bool, dtype: torch.dtype | None
) -> None:
    names = [name for name in check_adapters_to_merge(layer, adapter_names) if layer.has_adapter(name)]
    if names:
        merge_layer(layer, names, safe_merge=safe_merge, dtype=dtype)


def _undo(done: list[tuple[BaseTunerLayer, list[str]]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some are merged already is known
        for layer, before in done:
            if layer.merged and layer.merged_adapters != before:
                layer.unmerge()
                if before:
                    layer.merge(adapter_names=before)


def _named(error: Exception, name: str) -> Exception:
    """The error with the layer's name before its message, where its class is only a message."""
    if type(error) in (ValueError, RuntimeError, NotImplementedError, MergeOverflow):
        return type(error)(f"{name}: {error}")
    return error


@torch.no_grad()
def merge_and_unload(
    tuner: Any,
    progressbar: bool = False,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    requantize: QuantSpec | str | bool | None = None,
    keep_residual: int | None = None,
) -> Any:
    """Merge adapters for good and return the model without adapter layers.

    Args:
        tuner: LoraModel.
        progressbar: Show progress.
        safe_merge: Compute every layer's result first; if one is not finite nothing has changed.
        adapter_names: Default: the active ones.
        dtype: Of the whole result. Default: dense layers keep theirs, quantised ones get that of most of the
            model's other weights.
        requantize: Quantise the adapted linear layers (and quantised embeddings) again instead of leaving
            them dense: a spec, the name of a format, or True for the spec that each has. The exact sum of the
            base and all adapters is quantised once. ``model.merge_report`` then has every layer's
            ``MergeRecord``.
        keep_residual: Rank of an adapter named "residual" beside the requantised weights that holds what the
            grid lost (LoftQ on the sum). The result is then a PeftModel.

    Returns:
        The model. Without ``requantize`` all of it is dense, quantised layers without an adapter too.

    Raises:
        ValueError: not allowed (see ``check_merge_allowed``); a result that is not finite (``safe_merge``) or
            beyond float16; ``requantize=True`` on a dense layer; ``keep_residual`` without ``requantize``.
            What was merged before a failing layer stays merged and the rest stays adapted, so that outputs
            remain those of the adapted model.
    """
    requantize = None if requantize is False else requantize
    if keep_residual is not None and requantize is None:
        raise ValueError(f"keep_residual={keep_residual} needs requantize: a dense merge loses nothing")
    if keep_residual is not None and keep_residual < 1:
        raise ValueError(f"keep_residual={keep_residual}; it is a rank, at least 1")
    check_merge_allowed(tuner, adapter_names)
    model = tuner.model
    keys = list(_adapted(model))
    dense_dtype = dtype or weights_dtype(model)
    specs = _specs(model, keys, requantize)
    if safe_merge:
        _rehearse(model, keys, adapter_names, dtype, dense_dtype)
    report: list[MergeRecord] = []
    residuals: dict[str, tuple[Any, Any]] = {}
    for key in tqdm(keys, disable=not progressbar, desc="Unloading and merging model"):
        module: Any = model.get_submodule(key)
        new: nn.Module
        try:
            if key in specs and (names := _names(module, adapter_names)):
                if module.merged:
                    unmerge_layer(module)
                new, record, factors = requantize_layer(module, names, specs[key], key, rank=keep_residual)
                report.append(record)
                if factors is not None:
                    residuals[key] = factors
            else:
                new = _merged(module, adapter_names, safe_merge, dtype, dense_dtype)
        except Exception as error:
            raise _named(error, key) from error
        replace_module(model, key, new)
    if requantize is None:
        dequantize(model, dense_dtype)
    if dtype is not None:
        cast_floats(model, dtype)
    _clean(tuner, model)
    if requantize is None:
        return model
    result = _with_residual(tuner, model, residuals, keep_residual) if residuals else model
    result.merge_report = tuple(report)
    return result


@torch.no_grad()
def unload(tuner: Any) -> Any:
    """The base model with every adapter layer taken off; a layer that is merged stays merged, as in PEFT."""
    for key in list(_adapted(tuner.model)):
        module: Any = tuner.model.get_submodule(key)
        if _merges_itself(module):
            new = module.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
        else:
            new = module.get_base_layer()
        replace_module(tuner.model, key, new)
    if hasattr(tuner.model, "peft_config"):
        del tuner.model.peft_config
    return tuner.model


def _adapted(model: nn.Module) -> Iterator[str]:
    """Names of the outermost adapted layers and wrappers."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not name.startswith(
            inside or "\0"
        ):
            inside += (f"{name}.",)
            yield name


def _merges_itself(module: nn.Module) -> bool:
    """Wrappers, and layers that adapt something else than one weight of one module."""
    return hasattr(module, "unload_and_optionally_merge_module")


def _names(layer: LoraLayer, adapter_names: list[str] | None) -> list[str]:
    """The adapters that a final merge of the layer includes: those merged already, then the new ones."""
    new = [name for name in check_adapters_to_merge(layer, adapter_names) if layer.has_adapter(name)]
    return [*layer.merged_adapters, *new]


def _specs(
    model: nn.Module, keys: Sequence[str], requantize: QuantSpec | str | bool | None
) -> dict[str, QuantSpec]:
    if requantize is None:
        return {}
    layers = {key: model.get_submodule(key) for key in keys}
    return {
        key: resolve_spec(requantize, layer, key)
        for key, layer in layers.items()
        if isinstance(layer, LoraLayer) and not _merges_itself(layer) and can_requantize(layer)
    }


def _dtype_for(
    layer: LoraLayer, dtype: torch.dtype | None, dense_dtype: torch.dtype | None
) -> torch.dtype | None:
    return dense_dtype if is_quantized(layer.get_base_layer()) else dtype


def _rehearse(
    model: nn.Module,
    keys: Sequence[str],
    adapter_names: list[str] | None,
    dtype: torch.dtype | None,
    dense_dtype: torch.dtype | None,
) -> None:
    """Compute and check every merged weight without keeping it."""
    for key in keys:
        layer = model.get_submodule(key)
        if not isinstance(layer, LoraLayer) or _merges_itself(layer):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the merge itself will say what is merged already
            names = [
                name for name in check_adapters_to_merge(layer, adapter_names) if layer.has_adapter(name)
            ]
        if not names or layer.merged:
            continue
        try:
            merged_bias(layer, names, safe_merge=True)
            merged_weight(layer, names, _dtype_for(layer, dtype, dense_dtype), safe_merge=True)
        except Exception as error:
            raise _named(error, key) from error


def _merged(
    module: Any,
    adapter_names: list[str] | None,
    safe_merge: bool,
    dtype: torch.dtype | None,
    dense_dtype: torch.dtype | None,
) -> nn.Module:
    """The layer that takes the place of an adapted one."""
    if isinstance(module, ModulesToSaveWrapper) and adapter_names is not None:
        chosen = [name for name in adapter_names if name in module.modules_to_save]
        return module.modules_to_save[chosen[0]] if chosen else module.original_module
    if _merges_itself(module):
        return module.unload_and_optionally_merge_module(  # type: ignore[no-any-return]
            merge=True, safe_merge=safe_merge, adapter_names=adapter_names
        )
    if isinstance(module, LoraLayer):
        _merge(module, adapter_names, safe_merge, _dtype_for(module, dtype, dense_dtype))
        forget_original(module)
    else:
        module.merge(safe_merge=safe_merge, adapter_names=adapter_names)
    return module.get_base_layer()  # type: ignore[no-any-return]


def _clean(tuner: Any, model: Any) -> None:
    if hasattr(model, "peft_config"):
        del model.peft_config
    if not tuner.get_model_config(model).get("tie_word_embeddings"):
        return
    try:
        embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    except (NotImplementedError, AttributeError):
        return
    weights: list[Any] = [getattr(embedding, "weight", None) for embedding in embeddings]
    if all(torch.is_tensor(w) for w in weights) and weights[0].data_ptr() != weights[1].data_ptr():
        # An adapter that follows the tie changed both alike, up to rounding: they can share again.
        if any(config.ensure_weight_tying for config in tuner.peft_config.values()) and torch.allclose(
            weights[0], weights[1], rtol=1e-3, atol=1e-5
        ):
            embeddings[1].weight = embeddings[0].weight
            return
        model.config.tie_word_embeddings = False
        warnings.warn(
            "Input and output embeddings are no longer tied after merging. "
            "Setting `tie_word_embeddings=False` in the model config.",
            stacklevel=3,
        )


def _with_residual(tuner: Any, model: Any, factors: dict[str, tuple[Any, Any]], rank: int | None) -> Any:
    """A PeftModel around ``model`` with the adapter "residual"."""
    from .config import LoraConfig
    from .peft_api import get_peft_model

    task_type = next((config.task_type for config in tuner.peft_config.values()), None)
    assert rank is not None
    ranks = {key: A.shape[0] for key, (A, _) in factors.items()}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(factors),
        rank_pattern={re.escape(key): r for key, r in ranks.items() if r != rank},
        alpha_pattern={re.escape(key): r for key, r in ranks.items() if r != rank},
        task_type=task_type,
    )
    result = get_peft_model(model, config, adapter_name="residual")
    for key, (A, B) in factors.items():
        layer = model.get_submodule(key)
        for own, value in zip(layer.get_factors("residual"), (A, B)):
            own.data.copy_(value)
    return result
