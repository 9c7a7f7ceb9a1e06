"""Which stacked experts ``loftq-init`` quantises, in what format and with which adapters."""

from __future__ import annotations

import re
from collections.abc import Sequence

from quant import QuantSpec

from .architecture import Architecture, ModuleInfo
from .checkpoint import Checkpoint
from .errors import InputError, did_you_mean
from .expert_layout import is_stored_in_out
from .layer_plan import LayerPlan, plan_layer
from .options import InitOptions
from .stored_expert import ExpertEntry, expert_matrices
from .targets import get_pattern_key


def plan_experts(
    checkpoint: Checkpoint, architecture: Architecture, options: InitOptions, is_native: bool
) -> tuple[list[tuple[ModuleInfo, ExpertEntry]], list[str]]:
    """The experts to quantise, and notes. ``is_native``: the rest is saved in the native format.

    Raises:
        InputError: options that contradict each other, or an exclusion of some experts of a stack.
    """
    wanted = options.quantize_experts
    if options.target_parameters:
        if wanted is False:
            raise InputError("--target-parameters adapts quantised experts; leave out --no-quantize-experts")
        wanted = True
    asked = "--target-parameters" if options.target_parameters else "--quantize-experts"
    if wanted and options.save_format in ("bnb", "dense"):
        why = (
            "transformers with bitsandbytes quantises Linears alone"
            if options.save_format == "bnb"
            else "their layout on disk is not written"
        )
        raise InputError(
            f"{asked} with --save-format {options.save_format}: {why}; choose native, or leave the "
            "experts dense"
        )
    if wanted is False or (wanted is None and not is_native):
        return [], []
    found, left = expert_matrices(checkpoint, architecture)
    found = _without_excluded(found, options)
    notes = []
    if left:
        notes.append(
            f"{len(left)} stacks of experts stay dense, e.g. '{left[0]}': what they are made from on disk is "
            "incomplete, not floating point, or put together in a way that is not known here"
        )
    if wanted and not found:
        notes.append(f"{asked}: this model has no stacked experts that can be quantised")
    if found:
        stacks = {entry.stack for _, entry in found}
        notes.append(
            f"{len(found)} experts in {len(stacks)} stacks, {sum(e.numel for _, e in found):,} weights, are "
            f"quantised{'' if options.target_parameters else ' without adapters'}; qlora_engine loads them, "
            "transformers with bitsandbytes does not (--no-quantize-experts keeps them dense)"
        )
    return found, notes


def adapted_stacks(
    architecture: Architecture, options: InitOptions, experts: Sequence[tuple[ModuleInfo, ExpertEntry]]
) -> set[str]:
    """The stacks that ``target_parameters`` names.

    Raises:
        InputError: a name of none that is quantised, or of one whose matrices PEFT takes the other way round.
    """
    stacks = {entry.stack: module for module, entry in experts}
    found = set()
    for name in options.target_parameters:
        mine = [stack for stack in stacks if f".{stack}".endswith(f".{name}")]
        if not mine:
            names = list(dict.fromkeys(stack.rpartition(".")[2] for stack in stacks))
            raise InputError(
                f"--target-parameters '{name}' is no stack of experts that is quantised"
                f"{did_you_mean(name, names)}; there are: {', '.join(names) or 'none'}"
            )
        found.update(mine)
    for stack in found:
        if (stacks[stack].kind == "conv1d") != is_stored_in_out(architecture, stack.rpartition(".")[0]):
            raise InputError(
                f"--target-parameters: '{stack}' multiplies with (in, out) matrices, which PEFT takes for "
                "(out, in); leave it without an adapter"
            )
    return found


def expert_layers(
    start: int,
    experts: Sequence[tuple[ModuleInfo, ExpertEntry]],
    adapted: set[str],
    options: InitOptions,
) -> tuple[LayerPlan, ...]:
    """The plans of ``experts``, numbered from ``start``; those in the stacks ``adapted`` get an adapter.

    Raises:
        InputError: a rank too large.
    """
    return tuple(
        plan_layer(index, module, entry, _spec(options, entry), options, is_adapted=entry.stack in adapted)
        for index, (module, entry) in enumerate(experts, start)
    )


def _without_excluded(
    experts: Sequence[tuple[ModuleInfo, ExpertEntry]], options: InitOptions
) -> list[tuple[ModuleInfo, ExpertEntry]]:
    """The experts of stacks that ``exclude_modules`` does not name: a stack is packed whole or not at all."""
    excluded = {entry.name: entry.stack for _, entry in experts if _is_excluded(options, entry)}
    left = [(module, entry) for module, entry in experts if entry.name not in excluded]
    kept = {entry.stack for _, entry in left}
    for name, stack in excluded.items():
        if stack in kept:
            raise InputError(
                f"--exclude-modules: '{name}' is one expert of '{stack}', whose experts are quantised all or "
                "none; exclude the stack"
            )
    return left


def _is_excluded(options: InitOptions, entry: ExpertEntry) -> bool:
    """Whether ``exclude_modules`` names the expert, its stack or the module that has it."""
    paths = (entry.name, entry.stack, entry.stack.rpartition(".")[0])
    if isinstance(options.exclude_modules, str):
        return any(re.fullmatch(options.exclude_modules, path) for path in paths)
    return any(f".{path}".endswith(f".{name}") for name in options.exclude_modules for path in paths)


def _spec(options: InitOptions, entry: ExpertEntry) -> QuantSpec:
    """``bits_pattern`` may name the stack as it would a Linear, or the one expert."""
    patterns = list(options.bits_pattern)
    key = get_pattern_key(patterns, entry.stack)
    return options.spec_for(key if key in options.bits_pattern else get_pattern_key(patterns, entry.name))
