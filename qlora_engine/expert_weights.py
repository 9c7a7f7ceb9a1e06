"""Adapters written for another layout of the model: experts one by one, or modules under former names.

transformers 5 stacks the experts of a layer and renamed modules of some models; an adapter that was trained
before has the factors of every expert apart, under the names of then. They are put together for the stack as
it is now: A below A, B block by block on the diagonal, so that the delta of each part is what it was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .expert_targets import StackedExperts, stacked_experts
from .lora_param import ParamWrapper

_EXPERT = re.compile(r"(?P<path>.+\.experts)\.(?P<number>\d+)\.(?P<old>\w+)\.lora_(?P<side>[AB])\.weight$")


def convert_for_architecture(
    base: nn.Module, state_dict: Mapping[str, Tensor], expected: set[str], prefix: str
) -> dict[str, Tensor]:
    """``state_dict`` with the keys that ``base`` has now.

    Args:
        base: The adapted model, without PeftModel around it.
        state_dict: An adapter's file.
        expected: Keys that this model's adapter has on disk, each beginning with ``prefix``.
        prefix: What comes before the paths in ``base``.

    Returns:
        A new dict. Keys that need nothing, or fit nothing, are as they were.
    """
    if all(key in expected or f"{prefix}{key}" in expected for key in state_dict if ".lora_" in key):
        return dict(state_dict)
    rename = _renamer(base, expected, prefix)
    renamed = {rename(key): tensor for key, tensor in state_dict.items()}
    for group in stacked_experts(base):
        _stack(base, group, renamed, prefix)
    return renamed


def _renamer(base: nn.Module, expected: set[str], prefix: str) -> Any:
    renamings = _renamings(base)

    def rename(key: str) -> str:
        if key in expected or f"{prefix}{key}" in expected or ".lora_" not in key:
            return key
        path = key.removeprefix(prefix)
        for renaming in renamings:
            path, _ = renaming.rename_source_key(path)
        # Only where it leads to something: the table is made for checkpoints, whose keys may look alike.
        return prefix + path if prefix + path in expected or _EXPERT.match(path) else key

    return rename


def _renamings(base: nn.Module) -> list[Any]:
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    if not isinstance(base, PreTrainedModel):
        return []
    return [entry for entry in get_model_conversion_mapping(base) if isinstance(entry, WeightRenaming)]


def _stack(base: nn.Module, group: StackedExperts, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Replace the factors of single experts of ``group`` by those of its stacks, in place."""
    layer: Any = base.get_submodule(group.path)
    path = group.path
    while isinstance(layer, ParamWrapper):
        olds = group.stacks.get(layer.parameter_name)
        keys = {
            side: [
                [f"{prefix}{group.former(old, number)}.lora_{side}.weight" for old in olds or ()]
                for number in range(layer.num_experts)
            ]
            for side in "AB"
        }
        if olds and all(key in state_dict for rows in keys.values() for row in rows for key in row):
            A, B = ([[state_dict.pop(key) for key in row] for row in keys[side]] for side in "AB")
            state_dict[f"{prefix}{path}.lora_A.weight"] = stack_a(A)
            state_dict[f"{prefix}{path}.lora_B.weight"] = stack_b(B)
        layer, path = layer.base_layer, f"{path}.base_layer"


def stack_a(factors: list[list[Tensor]]) -> Tensor:
    """(experts * total rank, in) of [expert][part] (rank, in)."""
    return torch.cat([torch.cat(parts) for parts in factors])


def stack_b(factors: list[list[Tensor]]) -> Tensor:
    """(out, total rank * experts), experts fastest, of [expert][part] (out of the part, rank)."""
    blocks = torch.stack([torch.block_diag(*parts) for parts in factors])  # (experts, out, rank)
    return blocks.permute(1, 2, 0).flatten(1).contiguous()
