"""What ``loftq-init --dry-run`` shows: the plan as a table for people and as JSON for programs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.table import Table
from rich.text import Text

from qlora_engine.plan import Plan
from qlora_engine.report_table import human_bytes, human_width


def plan_facts(plan: Plan) -> dict[str, Any]:
    """The plan, JSON-able."""
    return {
        "architecture": plan.architecture.class_name,
        "save_format": plan.save_format,
        "dtype": plan.dtype,
        "bytes_in": plan.checkpoint.nbytes,
        "bytes_out": bytes_out(plan),
        "expected_memory": expected_memory(plan),
        "notes": list(plan.notes),
        "layers": [
            {
                "name": layer.path,
                "kind": layer.module.kind,
                "shape": list(layer.module.shape),
                "rank": layer.rank,
                "scaling": layer.scaling,
                **layer.spec.to_dict(),
                "bytes_in": layer.entry.nbytes,
                "bytes_out": plan.layer_bytes(layer),
                "adapter_bytes": plan.adapter_bytes(layer),
            }
            for layer in plan.layers
        ],
    }


def bytes_out(plan: Plan) -> int:
    """Bytes of the weight files to come."""
    rest = sum(plan.rest_bytes(entry) for entry in plan.rest)
    return rest + sum(plan.layer_bytes(layer) for layer in plan.layers)


def expected_memory(plan: Plan) -> int:
    """Bytes of resident memory that a run on the CPU will take at most, from measurements; see benchmarks."""
    return 700_000_000 + 24 * plan.largest.numel


def plan_table(plan: Plan) -> Table:
    """The plan by kind of layer, with sizes."""
    title = f"{plan.architecture.class_name}: {len(plan.layers)} layers to quantise"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, collapse_padding=True)
    for name in ("layers", "shape", "format", "rank", "scaling", "size", "becomes", "adapter"):
        table.add_column(name, justify="left" if name in ("layers", "format") else "right")
    counts: Counter[tuple[Any, ...]] = Counter()
    before: Counter[tuple[Any, ...]] = Counter()
    after: Counter[tuple[Any, ...]] = Counter()
    factors: Counter[tuple[Any, ...]] = Counter()
    for layer in plan.layers:
        width = human_width(layer.spec)
        name = ".".join("*" if part.isdecimal() else part for part in layer.path.split("."))
        shape = "x".join(map(str, layer.module.shape))
        key = (name, shape, width, str(layer.rank or "-"), f"{layer.scaling:g}" if layer.rank else "-")
        counts[key] += 1
        before[key] += layer.entry.nbytes
        after[key] += plan.layer_bytes(layer)
        factors[key] += plan.adapter_bytes(layer)
    for (name, *cells), count in counts.items():
        key = (name, *cells)
        sizes = before[key], after[key], factors[key]
        table.add_row(Text(f"{count} x {name}"), *cells, *map(human_bytes, sizes))
    sizes = plan.checkpoint.nbytes, bytes_out(plan), plan.adapter_bytes(*plan.layers)
    total = map(human_bytes, sizes)
    table.add_row(Text("whole model", style="bold"), "", f"{plan.save_format}, {plan.dtype}", "", "", *total)
    memory = human_bytes(expected_memory(plan))
    table.caption = f"largest layer {plan.largest.path}; expected peak memory on a CPU {memory}"
    table.caption_justify = "left"
    return table
