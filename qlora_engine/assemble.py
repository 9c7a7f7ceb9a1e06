"""What stands beside the weights that ``loftq-init`` wrote: configs, tokenizer, adapter and report."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .adapter_io import write_adapter
from .checkpoint import CONFIG_FILE, index_weights
from .config import LoraConfig
from .expert_adapter import stack_paths, stacked_factors
from .files import copy_file, write_json
from .fingerprint import Fingerprint
from .peak_memory import peak_memory
from .pieces import Pieces
from .plan import Plan
from .report import RunReport
from .report_html import write_html
from .safetensors_io import TensorEntry, Writable
from .serialise import model_config
from .targets import get_pattern_key
from .workspace import Workspace

ADAPTER_FOLDER = "loftq_init"


def assemble(
    plan: Plan, workspace: Workspace, report: RunReport, out: Path, seconds: Callable[[], float]
) -> None:
    """Write everything of the output but the shards.

    Args:
        plan: The run's.
        workspace: With every layer and every shard finished.
        report: What is known of the run; layers, sizes, time and memory are added.
        out: Where the output will be, which the adapter's config names.
        seconds: What the run has taken.
    """
    result, pieces = workspace.result, Pieces(workspace.pieces)
    total = index_weights(result)
    write_json(result / CONFIG_FILE, model_config(plan))
    for relative in plan.checkpoint.side_files(code=plan.options.trust_remote_code):
        (result / relative).parent.mkdir(parents=True, exist_ok=True)
        copy_file(plan.checkpoint.folder / relative, result / relative)
    facts = {layer: pieces.facts(layer) for layer in plan.layers}
    fingerprint = Fingerprint(
        specs={layer.path: layer.spec for layer in plan.layers},
        digests={layer.path: digest for layer, (_, digest) in facts.items()},
        compute_dtype=plan.dtype,
        dense=plan.save_format == "dense",
    )
    fingerprint.write(result)
    factors = _factors(plan, pieces)
    write_adapter(result / ADAPTER_FOLDER, factors, adapter_config(plan, out), fingerprint)
    report = replace(
        report,
        layers=tuple(layer_report for layer_report, _ in facts.values()),
        bytes_out=total,
        adapter_bytes=sum(entry.nbytes for entry in factors),
        seconds=seconds(),
        peak_rss=peak_memory(),
    )
    report.write(result)
    write_html(report, result)


def _factors(plan: Plan, pieces: Pieces) -> list[Writable]:
    """The adapter's tensors; those of a stack's experts put together."""
    found: list[Writable] = []
    stacks: dict[str, list[list[TensorEntry]]] = {}
    for layer in plan.layers:
        mine = pieces.factors(layer)
        if layer.stack is None:
            found += mine
        elif layer.rank:
            stacks.setdefault(layer.stack, []).append(mine)
    for stack, path in stack_paths(stacks).items():
        found += stacked_factors(stack, path, stacks[stack])
    return found


def adapter_config(plan: Plan, out: Path) -> LoraConfig:
    """The adapter's LoraConfig: PEFT computes the same scaling from it as the plan has."""
    options, architecture = plan.options, plan.architecture
    adapted = [layer for layer in plan.layers if layer.rank]
    mapping = {"base_model_class": architecture.class_name, "parent_library": architecture.library}
    return LoraConfig(
        r=options.rank,
        lora_alpha=options.lora_alpha,  # type: ignore[arg-type]  # PEFT's annotation; any number works
        use_rslora=options.rslora,
        rank_pattern=_pattern(
            options.rank_pattern, options.rank, {ly.stack or ly.path: ly.rank for ly in adapted}
        ),
        alpha_pattern=_pattern(
            options.alpha_pattern, options.lora_alpha, {ly.stack or ly.path: ly.alpha for ly in adapted}
        ),
        target_modules=plan.target_modules,
        target_parameters=list(dict.fromkeys(ly.stack for ly in adapted if ly.stack)) or None,
        fan_in_fan_out=all(layer.module.kind == "conv1d" for layer in adapted if not layer.stack),
        init_lora_weights=True,
        inference_mode=True,
        task_type=architecture.task,
        auto_mapping=None if architecture.task else mapping,
        base_model_name_or_path=str(out),
    )


def _pattern(given: Mapping[str, Any], default: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """``given`` where sorting its keys, as the file does, leaves its meaning; else full names.

    The first key that matches wins, so sorting can change what overlapping patterns mean.
    """
    patterns = dict(sorted(given.items()))
    if all(patterns.get(get_pattern_key(patterns, path), default) == value for path, value in wanted.items()):
        return patterns
    return {f"^{re.escape(path)}$": value for path, value in wanted.items() if value != default}
