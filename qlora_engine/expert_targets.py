"""Experts that transformers 5 stacks into one Parameter, when a config names them as the Linears they were.

Up to transformers 4 every expert of a Mixtral or a Qwen3-MoE was a module of its own, and so
``target_modules`` names its ``gate_proj`` or ``w1``. Now ``experts.gate_up_proj`` is one Parameter of shape
(experts, 2 * width, in) and the router, once a Linear, is a module that owns a ``weight``. The names are
carried over to ``target_parameters``, as PEFT does; a stack of two former weights gets both their ranks and
keeps their scaling. Which names became which stack is read from transformers' own table of conversions.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .config import LoraConfig, PeftWarning
from .expert_stack import parameter_names
from .targets import (
    anchored,
    check_target_module_exists,
    find_minimal_target_modules,
    is_all_linear,
    pattern_value,
)

_SOURCE = re.compile(r"experts\.\*\.(\w+)\.weight$")
_STACK = re.compile(r"(?:^|\.)experts\.(\w+)$")


@dataclass(frozen=True)
class StackedExperts:
    """One module that holds stacked experts.

    Attributes:
        path: Of the module, ``model.layers.0.mlp.experts``.
        stacks: Parameter -> the former Linears in it, in the order in which they are concatenated:
            ``{"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}``.
        router: Path of the module whose ``weight`` chooses the experts, where it is no Linear.
    """

    path: str
    stacks: dict[str, tuple[str, ...]]
    router: str | None

    def former(self, old: str, expert: int | str = 0) -> str:
        """Path that one expert's Linear had."""
        return f"{self.path}.{expert}.{old}"


def _stacks_of(model_type: str) -> dict[str, tuple[str, ...]]:
    """Stacked Parameter -> former names, of one type of model; empty where nothing was stacked."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    found: dict[str, tuple[str, ...]] = {}
    for conversion in get_checkpoint_conversion_mapping(model_type) or ():
        sources = [_SOURCE.search(pattern) for pattern in conversion.source_patterns]
        targets = [_STACK.search(pattern) for pattern in conversion.target_patterns]
        if len(targets) == 1 and targets[0] and all(sources):
            found[targets[0][1]] = tuple(source[1] for source in sources if source)
    return found


def stacked_experts(model: nn.Module) -> list[StackedExperts]:
    """The stacked experts of a transformers model, in the order of its modules; adapted ones included."""
    types = {getattr(getattr(module, "config", None), "model_type", None) for module in model.modules()}
    stacks: dict[str, tuple[str, ...]] = {}
    for model_type in sorted(t for t in types if isinstance(t, str)):
        stacks.update(_stacks_of(model_type))
    if not stacks:
        return []
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        if name.rpartition(".")[2] != "experts":
            continue
        base = _innermost(module)
        own = {
            parameter: stacks[parameter]
            for parameter in parameter_names(base)
            if parameter in stacks and getattr(base, parameter).dim() == 3
        }
        if own:
            router = f"{name.rpartition('.')[0]}.gate"
            found.append(StackedExperts(name, own, router if _is_router(modules.get(router)) else None))
    return found


def _innermost(module: nn.Module) -> nn.Module:
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def _is_router(module: nn.Module | None) -> bool:
    if module is None:
        return False
    base = _innermost(module)
    weight = base._parameters.get("weight")
    return not isinstance(base, nn.Linear) and weight is not None and weight.dim() == 2


def carry_over_experts(config: LoraConfig, model: nn.Module) -> None:
    """Move what ``config.target_modules`` names of stacked experts to ``target_parameters``, in place.

    Nothing happens to a config that names none of them, nor to one that was carried over before. Names that
    are also those of Linears in the model (a shared expert's) stay in ``target_modules`` as well.

    Raises:
        ValueError: only some of the weights in one stack are targeted, or their scalings differ.
    """
    if config.target_modules is None or config.target_modules == []:
        return
    experts = stacked_experts(model)
    if not experts:
        return
    everything = is_all_linear(config.target_modules)
    if everything and (reason := _why_not(config)):
        _warn_left_alone(model, experts, reason)
        return
    chosen: dict[str, list[str]] = {}  # new name -> paths
    for group in experts:
        for new, olds in group.stacks.items():
            hit = [old for old in olds if everything or _targeted(config, group, old)]
            if not hit or (everything and _excluded(config, group, new)):
                continue
            if len(hit) < len(olds) and not _is_named(config, f"{group.path}.{new}"):
                missing = ", ".join(sorted(set(olds) - set(hit)))
                raise ValueError(
                    f"Cannot convert PEFT target(s) {', '.join(sorted(hit))} without also targeting "
                    f"{missing} because they are fused into {new}."
                )
            chosen.setdefault(new, []).append(f"{group.path}.{new}")
        if group.router and (
            not _excluded_key(config, group.router)
            if everything
            else check_target_module_exists(config, group.router)
        ):
            chosen.setdefault("gate.weight", []).append(f"{group.router}.weight")
    if not everything:
        config.target_modules = _without_experts(config, model, experts)
    if not chosen:
        return
    names = [name for name, _ in model.named_modules()]
    _set_patterns(config, experts, {path for paths in chosen.values() for path in paths}, names)
    new_names = set(config.target_parameters or ())
    for new, paths in chosen.items():
        holders = [g for g in experts if (g.router if new == "gate.weight" else new in g.stacks)]
        new_names.update([new] if len(paths) == len(holders) else paths)
    config.target_parameters = sorted(new_names)


def _why_not(config: LoraConfig) -> str | None:
    """Why no Parameter can be adapted under this config; None where it can."""
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower() not in ("gaussian", "eva"):
        return f"init_lora_weights={init!r}"
    for name in ("lora_dropout", "use_dora", "lora_bias", "fan_in_fan_out"):
        if getattr(config, name):
            return f"{name}={getattr(config, name)}"
    return None


def _warn_left_alone(model: nn.Module, experts: list[StackedExperts], reason: str) -> None:
    stacks = [
        model.get_parameter(f"{_inner_path(model, group.path)}.{name}")
        for group in experts
        for name in group.stacks
    ]
    size = sum(stack.numel() * stack.element_size() for stack in stacks)
    warnings.warn(
        f"target_modules='all-linear': {len(stacks)} stacked expert weights ({size / 1e6:,.1f} MB) stay as "
        f"they are, neither quantised nor adapted, because {reason} does not work on stacked Parameters. "
        "`target_parameters` adapts them under a config without it.",
        PeftWarning,
        stacklevel=8,
    )


def _inner_path(model: nn.Module, path: str) -> str:
    while isinstance(getattr(model.get_submodule(path), "base_layer", None), nn.Module):
        path += ".base_layer"
    return path


def _is_named(config: LoraConfig, path: str) -> bool:
    """Whether ``target_parameters`` has this Parameter already."""
    return any(path == name or path.endswith(f".{name}") for name in config.target_parameters or ())


def _targeted(config: LoraConfig, group: StackedExperts, old: str) -> bool:
    # With the expert's number, as it was, and without, as a regex written for the stack would say it.
    keys = (group.former(old), f"{group.path}.{old}")
    return any(check_target_module_exists(config, key) for key in keys)


def _excluded_key(config: LoraConfig, key: str) -> bool:
    """Whether ``exclude_modules`` or ``modules_to_save`` takes ``key`` out."""
    probe = type(
        "Probe", (), {"target_modules": {key}, "layers_to_transform": None, "layers_pattern": None}
    )()
    probe.exclude_modules, probe.modules_to_save = config.exclude_modules, config.modules_to_save
    return not check_target_module_exists(probe, key)


def _excluded(config: LoraConfig, group: StackedExperts, new: str) -> bool:
    keys = (group.path, f"{group.path}.{new}", *(group.former(old) for old in group.stacks[new]))
    return any(_excluded_key(config, key) for key in keys)


def _without_experts(config: LoraConfig, model: nn.Module, experts: list[StackedExperts]) -> Any:
    """``target_modules`` less what names stacked experts or their router and nothing else.

    A regex becomes the fewest suffixes that mean the same modules; one that matches nothing is left alone.
    """
    taken = {group.router for group in experts} | {group.path for group in experts}
    names = [name for name, _ in model.named_modules() if name and name not in taken]
    if isinstance(config.target_modules, str):
        matched = {name for name in names if check_target_module_exists(config, name)}
        if not matched:
            return config.target_modules if not _names_experts(config, experts) else set()
        return find_minimal_target_modules(matched, set(names) - matched)
    former = {old for group in experts for olds in group.stacks.values() for old in olds}
    former |= {"gate"} if any(group.router for group in experts) else set()
    return {
        target
        for target in config.target_modules or ()
        if target.rpartition(".")[2] not in former or _matches(target, names)
    }


def _names_experts(config: LoraConfig, experts: list[StackedExperts]) -> bool:
    return any(
        _targeted(config, g, old) for g in experts for olds in g.stacks.values() for old in olds
    ) or any(g.router and check_target_module_exists(config, g.router) for g in experts)


def _matches(target: str, names: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)


def _set_patterns(
    config: LoraConfig, experts: list[StackedExperts], chosen: set[str], modules: Sequence[str]
) -> None:
    """Give a stack of several weights the sum of their ranks at their scaling.

    Patterns that were for single experts have done their work then, and go.
    """
    wanted: dict[str, dict[str, tuple[int, float]]] = {}  # new name -> path -> (rank, alpha)
    for group in experts:
        for new, olds in group.stacks.items():
            path = f"{group.path}.{new}"
            if path in chosen and not _is_named(config, path):
                wanted.setdefault(new, {})[path] = _rank_and_alpha(config, group, new, olds)
    ranks: dict[str, Any] = {}
    alphas: dict[str, Any] = {}
    for new, by_path in wanted.items():
        for path, (rank, alpha) in by_path.items():
            key = rf".*\.{re.escape(new)}" if len(set(by_path.values())) == 1 else re.escape(path)
            if rank != pattern_value(config.rank_pattern, path, config.r, field_name="rank_pattern"):
                ranks[key] = rank
            if alpha != pattern_value(
                config.alpha_pattern, path, config.lora_alpha, field_name="alpha_pattern"
            ):
                alphas[key] = alpha
    former = [group.former(old) for group in experts for new in group.stacks for old in group.stacks[new]]
    now = [*modules, *chosen]

    def done(key: str) -> bool:
        pattern = anchored(key)
        return any(pattern.match(path) for path in former) and not any(pattern.match(path) for path in now)

    def less_done(patterns: dict[str, Any] | None) -> dict[str, Any]:
        return {key: value for key, value in (patterns or {}).items() if not done(key)}

    # The first match wins, so what is new comes first.
    config.rank_pattern = {**ranks, **less_done(config.rank_pattern)}
    config.alpha_pattern = {**alphas, **less_done(config.alpha_pattern)}


def _rank_and_alpha(
    config: LoraConfig, group: StackedExperts, new: str, olds: tuple[str, ...]
) -> tuple[int, float]:
    ranks, scalings = [], []
    for old in olds:
        key = group.former(old)
        rank = pattern_value(config.rank_pattern, key, config.r, field_name="rank_pattern")
        alpha = pattern_value(config.alpha_pattern, key, config.lora_alpha, field_name="alpha_pattern")
        ranks.append(rank)
        scalings.append(alpha / (math.sqrt(rank) if config.use_rslora else rank))
    if any(not math.isclose(scaling, scalings[0]) for scaling in scalings):
        raise ValueError(
            f"{', '.join(olds)} of '{group.path}' are one Parameter, {new}, and have one scaling, but "
            f"rank_pattern and alpha_pattern give them {', '.join(f'{s:g}' for s in scalings)}."
        )
    rank = sum(ranks)
    alpha = scalings[0] * (math.sqrt(rank) if config.use_rslora else rank)
    return rank, round(alpha) if math.isclose(alpha, round(alpha)) else alpha
