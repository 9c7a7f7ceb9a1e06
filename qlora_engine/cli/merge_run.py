"""The body of ``qlora-merge``: from parsed options to a finished folder."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from rich.text import Text

from qlora_engine.cli import common
from qlora_engine.cli.progress import progress
from qlora_engine.merge_options import MergeOptions
from qlora_engine.merge_plan import MergePlan
from qlora_engine.report import dumps
from qlora_engine.report_table import human_bytes, human_seconds

_state: dict[str, Path] = {}


def how_to_go_on() -> str:
    """What to add to an error once work has been kept."""
    return common.kept_work(_state.get("out"), "files")


def execute(base: str, adapter: str, out: Path, given: dict[str, Any]) -> int:
    """Plan, run and print; the exit status."""
    chosen = ("dtype", "requantize", "block_size", "double_quant", "safe", "max_shard_size")
    options = MergeOptions(**{name: given[name] for name in chosen})
    # torch and transformers take seconds to import
    from qlora_engine.architecture import read_architecture
    from qlora_engine.base_on_disk import DiskBase
    from qlora_engine.checkpoint import Checkpoint
    from qlora_engine.disk_adapter import DiskAdapter
    from qlora_engine.hub import find_adapter, find_model
    from qlora_engine.merge_pipeline import run_merge
    from qlora_engine.merge_plan import make_merge_plan

    trust = given["trust_remote_code"]
    disk_adapter = DiskAdapter.open(find_adapter(adapter))
    folder = find_model(base, revision=given["revision"], code=trust)
    checkpoint = Checkpoint.open(folder)
    architecture = read_architecture(folder, checkpoint.config, trust_remote_code=trust)
    plan = make_merge_plan(DiskBase.open(checkpoint, architecture), disk_adapter, options)
    quiet, as_json = given["quiet"], given["as_json"]
    screen = common.console(sys.stdout, quiet=quiet or as_json)
    if as_json:
        common.emit(dumps({"event": "plan", **plan_facts(plan)}))
    for note in plan.notes if not as_json and not quiet else ():
        print(f"note: {common.one_line(note)}", file=sys.stderr)
    if given["dry_run"]:
        screen.print(Text(describe(plan)), soft_wrap=True)
        return 0
    _state["out"] = out
    with progress(merged_jobs(plan), lambda layer: layer.name, quiet=quiet, as_json=as_json) as update:
        report = run_merge(plan, out, overwrite=given["overwrite"], resume=given["resume"], progress=update)
    if broken := [layer.name for layer in report.layers if not math.isfinite(layer.delta)]:
        print(
            f"warning: {len(broken)} merged weights are not finite, first '{common.one_line(broken[0])}'; "
            "the adapter seems to be broken (--safe refuses such a result)",
            file=sys.stderr,
        )
    if as_json:
        facts = report.to_json()
        del facts["layers"]
        common.emit(dumps({"event": "done", "out": str(out), **facts}))
    screen.print(Text(summary(out, plan, report)), soft_wrap=True)
    return 0


def merged_jobs(plan: MergePlan) -> int:
    """How many weights the adapter changes."""
    return sum(job.part is not None for job in plan.jobs)


def plan_facts(plan: MergePlan) -> dict[str, Any]:
    """The plan, JSON-able."""
    return {
        "architecture": plan.base.architecture.class_name,
        "base": plan.base.method,
        "save_format": plan.save_format,
        "dtype": plan.dtype,
        "bytes_in": plan.base.checkpoint.nbytes,
        "bytes_out": sum(job.nbytes for job in plan.jobs),
        "notes": list(plan.notes),
        "merged": [
            {"name": job.name, "kind": job.kind, "shape": list(job.shape), "rank": job.part.rank}
            for job in plan.jobs
            if job.part is not None
        ],
    }


def describe(plan: MergePlan) -> str:
    """The plan in a few lines."""
    kinds = {kind: sum(job.kind == kind for job in plan.jobs) for kind in ("merge", "quantise", "dequantise")}
    parts = [part for part in plan.adapter.parts.values() if part.rank]
    ranks = ", ".join(map(str, sorted({part.rank for part in parts}))) or "none"
    lines = [
        f"{plan.base.architecture.class_name}, {plan.base.method} base: {merged_jobs(plan)} weights change",
        f"  ranks of the adapter: {ranks}{', DoRA' if plan.adapter.config.use_dora else ''}",
        f"  merged dense {kinds['merge']}, quantised {kinds['quantise']}, only dequantised "
        f"{kinds['dequantise']}",
        f"  {human_bytes(plan.base.checkpoint.nbytes)} become "
        f"{human_bytes(sum(job.nbytes for job in plan.jobs))} ({plan.save_format}, {plan.dtype})",
        f"  largest weight {plan.largest.name}, {human_bytes(4 * plan.largest.numel_at_once)} in float32",
    ]
    return "\n".join(lines)


def summary(out: Path, plan: MergePlan, report: Any) -> str:
    """What was done, and how to use it."""
    lines = [
        f"Merged {len(report.layers)} weights in {human_seconds(report.seconds)}: "
        f"{human_bytes(report.bytes_in)} became {human_bytes(report.bytes_out)} "
        f"({report.save_format}, {report.dtype})"
    ]
    survived = [layer.survived for layer in report.layers if layer.survived is not None]
    if survived:
        errors = [layer.error for layer in report.layers if layer.error is not None]
        lines.append(
            f"Requantising added an error of {100 * sum(errors) / len(errors):.2f} % of the weights; of the "
            f"adapter's change {100 * min(survived):.0f} to {100 * max(survived):.0f} % survived "
            f"(mean {100 * sum(survived) / len(survived):.0f} %)"
        )
    loader = "qlora_engine.from_pretrained" if report.save_format == "native" else "transformers"
    lines.append(f"Wrote {out}; {loader} loads it")
    return "\n".join(lines)
