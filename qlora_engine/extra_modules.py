"""Wrap what a config wants trained beside its adapters: ``modules_to_save`` and
``trainable_token_indices``."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, cast

from torch import nn

from .auxiliary import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from .config import LoraConfig
from .trainable_tokens import TrainableTokensWrapper
from .tuner_layer import BaseTunerLayer
from .tying import module_names_tied_with_embedding, name_of


def wrap_modules(
    model: nn.Module,
    adapter_name: str,
    module_names: Iterable[str] | None,
    *,
    wrapper_cls: type[AuxiliaryTrainingWrapper] = ModulesToSaveWrapper,
    inference_mode: bool = False,
    activate: bool = True,
    strict: bool = False,
    **kwargs: Any,
) -> None:
    """Wrap every module whose path ends with one of the names (no dot boundary, as PEFT), or update its
    wrapper.

    Args:
        model: To change in place.
        adapter_name: Whose version is added.
        module_names: Endings of paths.
        wrapper_cls: What to wrap with.
        inference_mode: The version does not train.
        activate: It is active at once.
        strict: A name that matches nothing is an error.
        kwargs: Of the wrapper.

    Raises:
        ValueError: ``strict`` and nothing matched; or a part of an adapted layer matched.
    """
    names = tuple(module_names or ())
    if not names:
        return
    found = False
    # Duplicates are kept, to reach tied modules under each of their names.
    for key in [key for key, _ in model.named_modules(remove_duplicate=False)]:
        if not key.endswith(names):
            continue
        path = key.split(".")
        target = model.get_submodule(key)
        parent = model.get_submodule(".".join(path[:-1]))
        grandparent = model.get_submodule(".".join(path[:-2])) if len(path) > 1 else None
        if isinstance(grandparent, BaseTunerLayer) and not isinstance(grandparent, wrapper_cls):
            raise ValueError(
                f"You are trying to target a module with {wrapper_cls} that is a child of "
                f"{type(grandparent)}. This is almost certainly not the intended behavior. Please ensure "
                f"that the adapter name, '{adapter_name}', does not conflict with any of the targeted "
                "modules."
            )
        wrapper = next((m for m in (grandparent, target) if isinstance(m, wrapper_cls)), None)
        if wrapper is not None:
            wrapper.update(adapter_name, **kwargs)
            wrapper.set_adapter(wrapper.active_adapter, inference_mode=inference_mode)
        else:
            wrapper = wrapper_cls(target, adapter_name, **kwargs)
            wrapper.set_adapter(adapter_name if activate else [], inference_mode=inference_mode)
            wrapper.train(target.training)
            setattr(parent, path[-1], wrapper)
        found = True
    if strict and not found:
        raise ValueError(
            f"Target modules {set(names)} not found in the base model. Please check the target modules and "
            "try again."
        )


def add_extra_trainable_modules(
    model: Any, config: LoraConfig, model_config: dict[str, Any], adapter_name: str, activate: bool = True
) -> None:
    """Do what ``modules_to_save``, ``trainable_token_indices`` and their ties ask for.

    Raises:
        ValueError: a layer is in both; tied layers get different tokens although they are to stay tied.
    """
    common: dict[str, Any] = {"inference_mode": config.inference_mode, "activate": activate}
    wrap_modules(model, adapter_name, config.modules_to_save, **common)
    to_tie = getattr(config, "modules_to_tie", None)
    if to_tie:
        source = model.get_input_embeddings().modules_to_save[adapter_name]
        wrap_modules(model, adapter_name, to_tie, tied_module=source, **common)
    if config.trainable_token_indices is not None:
        _add_trainable_tokens(model, config, model_config, adapter_name, common)


def _add_trainable_tokens(
    model: Any, config: LoraConfig, model_config: dict[str, Any], adapter_name: str, common: dict[str, Any]
) -> None:
    wanted = config.trainable_token_indices
    if not isinstance(wanted, dict):
        embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        name = (name_of(model, embedding) if embedding is not None else None) or "embed_tokens"
        wanted = {name: cast("list[int]", wanted)}
    for name in wanted:
        if name in (config.modules_to_save or ()):
            raise ValueError(
                "The embedding layer is already marked to be trained fully, either specify "
                f'`modules_to_save=[..., "{name}", ...]` or '
                f"`trainable_tokens={{'{name}': x}}` but not both."
            )
    is_tied = bool(model_config.get("tie_word_embeddings", False))
    agree = True
    skipped: set[str] = set()
    if is_tied and len(wanted) > 1:
        agree, skipped = _compare_tied(model, wanted, config.ensure_weight_tying)
    for name, indices in wanted.items():
        if name not in skipped:
            wrap_modules(
                model,
                adapter_name,
                [name],
                wrapper_cls=TrainableTokensWrapper,
                strict=True,
                token_indices=indices,
                **common,
            )
    if config.ensure_weight_tying and not is_tied:
        warnings.warn(
            "ensure_weight_tying=True but the model does not have tied weights "
            "(tie_word_embeddings=False). Weight tying will not be applied for trainable_token_indices.",
            stacklevel=5,
        )
    if is_tied and (config.ensure_weight_tying or agree):
        source = model.get_input_embeddings()
        if isinstance(source, TrainableTokensWrapper):
            wrap_modules(
                model,
                adapter_name,
                module_names_tied_with_embedding(model),
                wrapper_cls=TrainableTokensWrapper,
                strict=True,
                token_indices=source.token_adapter.token_indices[adapter_name],
                tied_adapter=source.token_adapter,
                inference_mode=config.inference_mode,
            )


def _compare_tied(model: Any, wanted: dict[str, list[int]], ensure: bool) -> tuple[bool, set[str]]:
    """Whether the tied layers among ``wanted`` get the same tokens, and which of them then follow the
    embedding."""
    embedding = name_of(model, model.get_input_embeddings()) or ""
    tied_names = set(module_names_tied_with_embedding(model))
    tied = [
        name
        for name in wanted
        if embedding.endswith(name) or any(t.endswith(name) or name in t.split(".") for t in tied_names)
    ]
    if len(tied) < 2:
        return True, set()
    agree = all(wanted[name] == wanted[tied[0]] for name in tied)
    if not agree and ensure:
        layers = ", ".join(f"{name}: {wanted[name]}" for name in tied)
        raise ValueError(
            "Cannot ensure weight tying when different token indices are specified for tied layers. "
            f"Conflicting layers: {layers}. Please use the same indices for all tied layers or set "
            "ensure_weight_tying=False."
        )
    return agree, {name for name in tied if not embedding.endswith(name)} if agree else set()
