"""Where quantised experts go in a model whose experts are stacked: one QuantLinear each, under their number.

The path of an expert is that of the stacked Parameter and its number, ``...mlp.experts.gate_up_proj.3``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quant.experts import QuantExperts

from .errors import InputError

_ORDER = "_stack_order"  # of an owner: names of its Parameters as they were, which nested adapters follow


@dataclass(frozen=True)
class ExpertPlace:
    """One matrix of a stacked Parameter.

    Attributes:
        owner: The module that has the Parameter.
        leaf: The Parameter's name in it.
        number: Of the expert.
        experts: How many there are.
        shape: (out, in).
        in_out: The Parameter has its matrices as (in, out).
    """

    owner: nn.Module
    leaf: str
    number: int
    experts: int
    shape: torch.Size
    in_out: bool


def multiplies_in_out(owner: nn.Module) -> bool:
    """Whether the experts module ``owner`` multiplies with (in, out) matrices, as gpt-oss and Llama 4 do."""
    if hasattr(owner, "is_transposed"):
        return bool(owner.is_transposed)
    for other in owner._modules.values():
        if isinstance(other, QuantExperts):
            return other.in_out
    up, down = owner._parameters.get("gate_up_proj"), owner._parameters.get("down_proj")
    return (
        up is not None
        and down is not None
        and up.dim() == down.dim() == 3
        and (up.shape[1], up.shape[2]) == (down.shape[2], 2 * down.shape[1])
    )


def is_stack(owner: nn.Module, leaf: str) -> bool:
    """Whether ``leaf`` is a Parameter (experts, a, b) of a module of experts."""
    value = owner._parameters.get(leaf)
    if value is None or value.dim() != 3:
        return False
    # what transformers' use_experts_implementation leaves on a module, in 5.0 already; Llama 4 has it not
    return hasattr(owner, "is_transposed") or type(owner).__name__.endswith("Experts")


def place_of(modules: Mapping[str, nn.Module], path: str) -> ExpertPlace | None:
    """The place that ``path`` means among ``modules`` (by path); None if it is no expert's."""
    stack, _, number = path.rpartition(".")
    holder, _, leaf = stack.rpartition(".")
    owner = modules.get(holder)
    if owner is None or not number.isdecimal():
        return None
    there = owner._modules.get(leaf)
    if isinstance(there, QuantExperts):  # some of them are in their places
        layer: Any = next(layer for layer in there._modules.values() if layer is not None)
        count, shape, in_out = len(there), torch.Size(layer.shape), there.in_out
    elif is_stack(owner, leaf):
        value: Any = owner._parameters[leaf]
        in_out = multiplies_in_out(owner)
        count, rows, columns = value.shape
        shape = torch.Size((columns, rows) if in_out else (rows, columns))
    else:
        return None
    return ExpertPlace(owner, leaf, int(number), count, shape, in_out) if int(number) < count else None


def put_expert(place: ExpertPlace, layer: nn.Module) -> None:
    """Put a QuantLinear in the place of one matrix; the Parameter goes with the first."""
    owner, leaf = place.owner, place.leaf
    if leaf in owner._parameters:
        owner.__dict__.setdefault(_ORDER, list(owner._parameters))
        del owner._parameters[leaf]
        owner.register_module(leaf, QuantExperts(place.experts, place.in_out))
    owner._modules[leaf]._modules[str(place.number)] = layer  # type: ignore[union-attr]


def put_layer(model: nn.Module, path: str, layer: nn.Module, place: ExpertPlace | None) -> None:
    """Put a quantised layer where ``path`` is: a module's, or an expert's ``place``."""
    if place is not None:
        put_expert(place, layer)
        return
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def settle_experts(model: Any) -> None:
    """Make a model with quantised experts run them one by one, and save them under their own names.

    Raises:
        InputError: only some experts of a stack are there.
    """
    stacks = {name: m for name, m in model.named_modules() if isinstance(m, QuantExperts)}
    if not stacks:
        return
    for name, stack in stacks.items():
        if lacking := [number for number, layer in stack._modules.items() if layer is None]:
            raise InputError(f"'{name}' has {len(stack)} experts, and {', '.join(lacking[:5])} are missing")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    # transformers would take the stack's conversions for those of what is in it.
    model._weight_conversions = []


def parameter_names(owner: nn.Module) -> list[str]:
    """Names of a module's Parameters and quantised stacks, in the order in which it has the Parameters."""
    names = [name for name, value in owner._parameters.items() if value is not None]
    stacks = [name for name, module in owner._modules.items() if isinstance(module, QuantExperts)]
    order = owner.__dict__.get(_ORDER)
    if order is None:
        return names + stacks
    found: Iterable[str] = {*names, *stacks}
    return [*(name for name in order if name in found), *(name for name in names if name not in order)]


def is_in_stack(model: nn.Module, path: str) -> bool:
    """Whether the module ``path`` is one expert of a quantised stack."""
    parent, _, number = path.rpartition(".")
    return number.isdecimal() and isinstance(model.get_submodule(parent), QuantExperts)
