"""Layers that share one weight (an embedding and the output head), and adapters that must follow the tie."""

from __future__ import annotations

import re
import warnings
from typing import Any

from torch import nn

from .config import LoraConfig
from .targets import EMBEDDING_LAYER_NAMES, match_target_against_key


def name_of(model: nn.Module, module: nn.Module | None) -> str | None:
    """Path of ``module`` in ``model``."""
    return next((name for name, found in model.named_modules() if found is module), None)


def unwrapped(model: Any) -> Any:
    """The transformers model inside PeftModel and LoraModel."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if hasattr(model, "tuner_layer_cls"):
        model = model.model
    return model


def module_names_tied_with_embedding(model: Any) -> list[str]:
    """Sorted paths of the modules whose weight is the input embedding's, as the model class declares them.

    Raises:
        ValueError: the class declares ties as a mapping but has no ``get_input_embeddings``.
    """
    model = unwrapped(model)
    if getattr(getattr(model, "config", None), "tie_word_embeddings", None) is False:
        return []
    declared = getattr(model, "_tied_weights_keys", None)
    if not declared:
        return []
    if not isinstance(declared, dict):
        return sorted({key.rpartition(".")[0] for key in declared})
    if not hasattr(model, "get_input_embeddings"):
        raise ValueError(
            "The supplied model implements `_tied_weights_keys` as a dict but doesn't implement "
            "'get_input_embeddings' so we can't determine which weights are tied to embeddings."
        )
    pairs: dict[str, str] = {}
    for name, module in model.named_modules():
        own = getattr(module, "_tied_weights_keys", None) or {}
        prefix = f"{name}." if name else ""
        pairs.update({prefix + target: prefix + source for target, source in own.items()})
    shared = set(model.get_input_embeddings().parameters())
    present = [n for n, p in model.named_parameters(remove_duplicate=False) if p in shared]
    # Wrapped modules hold the weight deeper down: "head.base_layer.weight",
    # "head.token_adapter.base_layer.weight".
    current = {re.sub(r"[^.]+\.base_layer\.", "", name): name for name in present}
    current.update({name.replace("base_layer.", ""): name for name in present})
    tied = [current.get(t, t) for t, source in pairs.items() if current.get(source, source) in present]
    return sorted({name.rpartition(".")[0] for name in tied})


def _mentions_embedding(names: Any) -> bool:
    if isinstance(names, str):
        return any(match_target_against_key(names, name) for name in EMBEDDING_LAYER_NAMES)
    return any(name.split(".")[-1] in EMBEDDING_LAYER_NAMES for name in names or ())


def plan_ties(model: Any, config: LoraConfig) -> None:
    """Warn where a tied layer is adapted; with ``ensure_weight_tying`` write into ``config`` what is to be
    tied."""
    in_save = _mentions_embedding(config.modules_to_save)
    in_target = _mentions_embedding(config.target_modules)
    tied = module_names_tied_with_embedding(model)
    if not config.ensure_weight_tying:
        if (in_save or in_target) and tied:
            warnings.warn(
                "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but "
                "`ensure_weight_tying` is not set to True. This can lead to complications, for example when "
                "merging the adapter or converting your model to formats other than safetensors.",
                stacklevel=4,
            )
    elif not tied:
        warnings.warn(
            "You have requested `ensure_weight_tying`, but no tied modules were found in the model",
            stacklevel=4,
        )
    elif in_save:
        config.modules_to_tie = tied
        embedding = name_of(model, model.get_input_embeddings()) or ""
        names = [*(config.modules_to_save or [])]
        names += [] if embedding in names else [embedding]
        config.modules_to_save = _without(names, tied)
    elif in_target:
        config.target_modules_to_tie = tied
        embedding = name_of(model, model.get_input_embeddings()) or ""
        if isinstance(config.target_modules, str):
            config.target_modules = rf"(?:{config.target_modules}|^{re.escape(embedding)}$)"
        else:
            config.target_modules = set(_without([*sorted(config.target_modules or ()), embedding], tied))
    else:
        warnings.warn(
            "You have requested `ensure_weight_tying`, but no tied modules are added in either "
            "`modules_to_save` or `target_modules`",
            stacklevel=4,
        )


def _without(names: list[str], tied: list[str]) -> list[str]:
    """``names`` less those that mean a tied module; these follow the embedding and are not adapted
    themselves."""
    return [n for n in names if not any(re.match(rf"(^|.*\.){n}($|\..*)", key) for key in tied)]


def is_tied_target(config: LoraConfig, key: str) -> bool:
    """Whether the module ``key`` is to share the embedding's adapter."""
    names = getattr(config, "target_modules_to_tie", None) or []
    return key in names or any(key.endswith(f".{name}") for name in names)
