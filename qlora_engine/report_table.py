"""The report as text for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quant import QuantSpec

from .report import LayerReport, RunReport


def human_bytes(count: float) -> str:
    """Decimal units, three digits: 269 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def human_seconds(seconds: float) -> str:
    """12.3 s, 4 min 05 s, 2 h 03 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def human_width(spec: LayerReport | QuantSpec) -> str:
    """nf4/64, with a + for double quantisation."""
    return f"{spec.format}/{spec.block_size}{'+' if spec.double_quant else ''}"


def _gain(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %" if before else ""


def worst_table(report: RunReport, count: int = 5) -> Table:
    """The layers of the largest error."""
    table = Table(
        title=f"Worst of {len(report.layers)} layers", title_justify="left", box=None, pad_edge=False
    )
    table.add_column("layer", overflow="fold")
    for name in ("format", "rank", "plain", report_method(report), "change"):
        table.add_column(name, justify="right")
    for layer in report.worst(count):
        errors = (f"{layer.error_plain:.4f}", f"{layer.error:.4f}", _gain(layer.error_plain, layer.error))
        table.add_row(Text(layer.name), human_width(layer), str(layer.rank or "-"), *errors)
    return table


def report_method(report: RunReport) -> str:
    """The method's name, to head a column."""
    options = report.run.get("options")
    return str(options.get("method", "solved")) if isinstance(options, dict) else "solved"


def totals_table(report: RunReport) -> Table:
    """Errors, sizes and time of the whole run."""
    totals = report.totals
    table = Table(box=None, pad_edge=False, show_header=True)
    table.add_column("relative weight error")
    for name in ("plain", report_method(report), "change"):
        table.add_column(name, justify="right")
    rows = [
        ("geometric mean", "error_plain_mean", "error_mean"),
        ("all weights", "error_plain_total", "error_total"),
    ]
    if "output_error_mean" in totals:
        rows.append(("layer output, mean", "output_error_plain_mean", "output_error_mean"))
    for title, before, after in rows:
        pair = totals[before], totals[after]
        table.add_row(title, f"{pair[0]:.4f}", f"{pair[1]:.4f}", _gain(*pair))
    return table


def facts(report: RunReport) -> list[tuple[str, str]]:
    """Sizes and times, as pairs of label and text."""
    totals = report.totals
    ratio = report.bytes_in / report.bytes_out if report.bytes_out else 0.0
    sizes = f"{human_bytes(report.bytes_in)} -> {human_bytes(report.bytes_out)} ({ratio:.2f}x smaller)"
    weights = f"{totals['weights']:,} weights in {totals['layers']} layers"
    times = human_seconds(report.seconds), human_seconds(totals["solve_seconds"])
    return [
        ("size", sizes),
        ("adapter", human_bytes(report.adapter_bytes)),
        ("quantised", f"{weights} at {totals['bits_per_weight']:.3f} bits"),
        ("saved as", f"{report.save_format}, {report.dtype}"),
        ("time", f"{times[0]} ({times[1]} solving on {report.device})"),
        ("peak memory", human_bytes(report.peak_rss)),
    ]


def summary(report: RunReport) -> RenderableType:
    """What is printed at the end of a run."""
    lines = Table.grid(padding=(0, 2))
    for label, text in facts(report):
        lines.add_row(Text(label, style="bold"), Text(text))
    notes = [Text(f"note: {note}") for note in report.notes]
    return Group(worst_table(report), Text(), totals_table(report), Text(), lines, *notes)
